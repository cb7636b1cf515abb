"""The built-in world and its commonsense tasks, checked by a reader that knows only its text.

`read` parses corpus sentences with the lexicon's patterns and never sees how the world was drawn; every row
of every commonsense task is then answered from what it read. The math tasks and the conflict tasks have test
files of their own. Run: pytest tests/benchmarks/test_world.py
"""

import re
from collections import Counter, defaultdict
from functools import lru_cache
from itertools import combinations, islice

import pytest
import torch
import yaml

from moabench.benchmarks import world
from moabench.benchmarks.world import (
    LIMITS,
    MODEL,
    SPLITS,
    TASKS,
    Axes,
    WorldConfig,
    content_hash,
    corpus,
    corpus_hash,
    rows,
)
from moabench.benchmarks.world.facts import LEXICON, build_world
from moabench.benchmarks.world.text import BUCKETS
from moabench.methods.spec import ConfigError

ARC = ("arc_easy", "arc_challenge")
OPTIONS = {
    "boolq": 2,
    "piqa": 2,
    "winogrande": 2,
    "siqa": 3,
    "hellaswag": 4,
    "openbookqa": 4,
    "commonsenseqa": 5,
} | dict.fromkeys(ARC, 4)
COMMONSENSE = tuple(sorted(OPTIONS))
SMALL = WorldConfig(entities_per_kind=8)
PARAGRAPHS = 30_000  # about 40 an entity of the small world
DOMAINS = {
    path.stem: yaml.safe_load(path.read_text(encoding="utf-8"))
    for path in (LEXICON / "domains").glob("*.yaml")
}
RELATIONS = {domain: {**entry["inherited"], **entry["own"]} for domain, entry in DOMAINS.items()}
FILES = ("names", "reading", "reverse", "links", "goals", "scripts", "events", "twins", "openbook")
LEX = {name: yaml.safe_load((LEXICON / f"{name}.yaml").read_text(encoding="utf-8")) for name in FILES}
PEOPLE = {name for names in LEX["names"].values() for name in names}
KINDS = {kind: domain for domain, entry in DOMAINS.items() for kind in entry["kinds"]}
STATEMENTS = defaultdict(dict)  # "{s} eats {v}" -> {value: relation}
for _relations in RELATIONS.values():
    for _name, _spec in _relations.items():
        for _statement in _spec["statements"]:
            STATEMENTS[_statement].update(dict.fromkeys(_spec["values"], _name))
IS_A = {"is a {k}", "is one kind of {k}", "belongs to the {k} family"}
MARGIN = re.compile(r"^(?:being|as|like) (?:an?|every) \w+, |, as any \w+ does$", re.IGNORECASE)


def pattern(template, **groups):
    """A template of the lexicon as a regular expression; each {key} becomes its group, or any words."""
    parts = re.split(r"\{(\w)\}", template)
    parts[::2] = [re.escape(part) for part in parts[::2]]
    parts[1::2] = [groups.get(key, rf"(?P<{key}>.+)") for key in parts[1::2]]
    return re.compile("".join(parts), re.IGNORECASE)


def read_sentence(sentence):
    """(subject, relation, value), with relation `kind` for "x is a finch"; None for a sentence of another
    sort."""
    words = MARGIN.sub("", sentence.replace(" an ", " a ")).split()
    start = 1 if words[0].lower() in ("the", "every", "each", "a", "an") else 0
    if start >= len(words):
        return None
    subject, rest = words[start].lower(), words[start + 1 :]
    for i, word in enumerate(rest):
        around = rest[:i], rest[i + 1 :]
        if word in KINDS and " ".join([*around[0], "{k}", *around[1]]) in IS_A:
            return subject, "kind", word
        relation = STATEMENTS.get(" ".join(["{s}", *around[0], "{v}", *around[1]]), {}).get(word)
        if relation:
            return subject, relation, word
    return None


def read(paragraphs):
    """{subject: {relation: {values}}} of the paragraphs; a pronoun stands for the subject named last."""
    known = defaultdict(lambda: defaultdict(set))
    owned = [
        pattern(form, p=r"(?P<p>\w+)", e=r"(?:the )?(?P<e>\w+)")
        for entry in LEX["links"].values()
        for form in entry["statements"]
    ]
    for paragraph in paragraphs:
        topic = None
        for sentence in sentences(paragraph):
            if fact := read_sentence(sentence):
                subject, relation, value = fact
                topic = topic if subject in ("it", "she", "he") else subject
                known[topic][relation].add(value)
            for form in owned:
                if match := form.fullmatch(sentence):
                    known[match["p"].lower()]["thing"].add(match["e"].lower())
    return known


def sentences(paragraph):
    return paragraph.rstrip(".").split(". ")


@lru_cache(maxsize=3)
def text(seed, n=PARAGRAPHS):
    return list(islice(corpus(seed, SMALL), n))


@lru_cache(maxsize=3)
def known_of(seed):
    return read(text(seed))


def small_rows(task, split="test", seed=0, **axes):
    return rows(task, split, seed, config=SMALL, axes=Axes(**axes))


def named(row, known):
    """The one entity of the corpus that the question names."""
    (name,) = {word for word in re.findall(r"\w+", row["question"].lower()) if "kind" in known.get(word, ())}
    return name


def only(values):
    (value,) = values
    return value


def right(row):
    return row["choices"][row["label"]]


@pytest.mark.parametrize(
    ("task", "hops"),
    [("arc_easy", 1), ("arc_easy", 2), ("arc_challenge", 1), ("arc_challenge", 2), ("arc_challenge", 3)],
)
def test_arc_follows_from_the_corpus_in_as_many_hops(task, hops):
    known = known_of(0)
    for split in SPLITS:
        for row in small_rows(task, split, hops=hops):
            entity, relation = named(row, known), row["skill"].split(":")[1]
            if linked := hops == (2 if task == "arc_easy" else 3):
                entity = only(known[entity]["thing"])
            kind = only(known[entity]["kind"])
            assert KINDS[kind] == row["domain"]
            stated = task == "arc_easy" or hops == 1
            assert (relation in known[entity]) == stated, f"{split}, linked={linked}: {row}"
            assert right(row) == only(known[entity if stated else kind][relation]), row
            assert len(set(row["choices"])) == 4 and set(row["choices"]) <= set(
                RELATIONS[row["domain"]][relation]["values"]
            )


def test_distractors_of_one_hop_questions_are_true_of_siblings():
    known, siblings = known_of(0), defaultdict(set)
    for facts in known.values():
        for kind in facts.get("kind", ()):
            for relation, values in facts.items():
                siblings[kind, relation] |= values
    for row in small_rows("arc_easy"):
        assert (
            set(row["choices"])
            <= siblings[only(known[named(row, known)]["kind"]), row["skill"].split(":")[1]]
        )


@pytest.mark.parametrize(
    ("task", "hops"), [("piqa", 1), ("piqa", 2), ("openbookqa", None), ("openbookqa", 1), ("openbookqa", 2)]
)
def test_goals_need_what_the_kind_passes_on(task, hops):
    known, given = known_of(0), Counter()
    for row in small_rows(task, hops=hops):
        kind, relation = only(known[named(row, known)]["kind"]), row["skill"].split(":")[-1]
        values = RELATIONS[row["domain"]][relation]["values"]
        found = [only(set(re.findall(r"\w+", choice)) & set(values)) for choice in row["choices"]]
        assert [value == only(known[kind][relation]) for value in found] == [
            i == row["label"] for i in range(len(found))
        ], row
        if task == "piqa":
            assert (kind in row["question"]) == (hops == 1)
        elif book := row.get("context"):
            told = {subject: value for subject, _, value in map(read_sentence, sentences(book))}
            assert (
                told[kind] == right(row) and len(told) == len(set(told.values()) & set(row["choices"])) == 3
            )
            assert all({value} == known[other][relation] for other, value in told.items())
        given[row["skill"].split(":")[1], bool(row.get("context"))] += 1
    if task == "openbookqa":
        expected = {None: {("given", True), ("recall", False)}, 1: {("given", True)}, 2: {("recall", False)}}
        assert set(given) == expected[hops]


def test_passages_answer_their_question_and_are_not_in_the_corpus():
    known, seen = known_of(0), set(re.findall(r"\w+", "\n".join(text(0)).lower()))
    start, truths = (
        "|".join(re.escape(form.removesuffix("{c}?")) for form in LEX["reading"]["questions"]),
        Counter(),
    )
    for split in SPLITS:
        for row in small_rows("boolq", split):
            told = read([row["context"]])
            subject, relation, value = read_sentence(re.fullmatch(rf"(?:{start})(.*)\?", row["question"])[1])
            skill = row["skill"].removeprefix("read:")
            truth = only(
                told[subject][relation] if skill != "kind" else known[only(told[subject]["kind"])][relation]
            )
            assert row["choices"] == ["false", "true"] and row["label"] == (value == truth), row
            assert len(told) == (2 if skill == "pair" else 1) or skill == "pair", row
            assert not set(told) & seen and (skill == "kind") == (relation not in told[subject])
            if skill == "pair":
                assert value in {only(facts[relation]) for facts in told.values() if relation in facts}
            assert 3 <= len(sentences(row["context"])) <= 5
            truths[split, skill, row["label"]] += 1
    assert all(truths[split, skill, 0] == truths[split, skill, 1] for split, skill, _ in truths)
    assert not any(set(one) & set(other) for one, other in combinations(BUCKETS.values(), 2))


def test_concepts_have_one_answer():
    known = known_of(0)
    kinds = {kind: {relation: only(values) for relation, values in known[kind].items()} for kind in KINDS}
    nouns = "|".join(LEX["reverse"]["nouns"].values())
    for split in SPLITS:
        for row in small_rows("commonsenseqa", split):
            clauses = re.match(
                rf"(?:Which of these|Which one is the (?:{nouns}) that|Some (?:{nouns})) (.+?) and "
                r"([^.?]+)[.?]",
                row["question"],
            )
            given = [read_sentence(f"x {clause}")[1:] for clause in clauses.groups()]
            fitting = [
                k for k in kinds if KINDS[k] == row["domain"] and all(kinds[k].get(r) == v for r, v in given)
            ]
            sort, relation = row["skill"].split(":")
            answers = fitting if sort == "which" else {kinds[kind][relation] for kind in fitting}
            assert only(set(row["choices"]) & set(answers)) == right(row) and len(set(row["choices"])) == 5, (
                row
            )


def events_read():
    """{event wording: {aspect: answer}} from the corpus."""
    forms = {
        (aspect, pattern(f, v="(?P<v>.+)", p=r"\w+"))
        for aspect, e in LEX["events"]["aspects"].items()
        for f in e["statements"]
    }
    found = defaultdict(lambda: defaultdict(set))
    for paragraph in text(0, 4 * PARAGRAPHS):  # events are told rarely
        first, *rest = sentences(paragraph)
        people = set(re.findall(r"\w+", first)) & PEOPLE
        for sentence in rest if len(people) == 1 else ():
            for aspect, form in forms:
                if match := form.fullmatch(sentence):
                    found[neutral(first)][aspect].add(match["v"])
    return found


def neutral(sentence):
    """The sentence without names, in lower case."""
    return re.sub(r"\b(?:" + "|".join(PEOPLE) + r")\b", "{p}", sentence.rstrip(".")).lower()


def test_feelings_wishes_and_reasons_are_told_in_the_corpus():
    known, seen = events_read(), defaultdict(set)
    for split in SPLITS:
        for row in small_rows("siqa", split):
            event, aspect = neutral(row["context"]), row["skill"].removeprefix("social:")
            assert [choice in known[event][aspect] for choice in row["choices"]] == [
                i == row["label"] for i in range(3)
            ], row
            seen[split] |= {event, *row["choices"]} if aspect != "feeling" else {event}
    assert (
        not seen["train"] & seen["test"]
        and not seen["train"] & seen["validation"]
        and not seen["test"] & seen["validation"]
    )


def test_the_next_step_is_the_next_in_the_corpus():
    orders = defaultdict(list)
    for paragraph in text(0):
        first, *rest = sentences(paragraph)
        match = re.fullmatch(rf"(?:One day )?({'|'.join(PEOPLE)}) (.+)", first)
        steps = (
            [re.fullmatch(rf"(?:(?:Then|Next|After that) )?{match[1]} (.+)", sentence) for sentence in rest]
            if match
            else []
        )
        if len(steps) > 2 and all(steps):
            orders[match[2]] = max(orders[match[2]], [step[1] for step in steps], key=len)
    forms = [pattern(form, p=r"\w+") for form in LEX["scripts"]["questions"]]
    for split in SPLITS:
        for row in small_rows("hellaswag", split):
            match = only(filter(None, (form.fullmatch(row["question"]) for form in forms)))
            order, shown = orders[match["a"]], match["d"].split(", ")
            assert order[: len(shown)] == shown and order[len(shown)] == right(row)
            same = set(order) & set(row["choices"])
            near = {order[len(shown) - 1], *order[len(shown) : len(shown) + 3]}
            assert same == (near if row["skill"] == "next:order" else {right(row)})


def roles(event, sides):
    """The event with {a} and {b} in the place of its two sides, and the role of each side."""
    first, second = sorted(sides, key=event.lower().index)
    return event.lower().replace(first, "{a}", 1).replace(second, "{b}", 1), {first: "{a}", second: "{b}"}


def test_traits_are_told_in_the_corpus_and_twins_are_opposite():
    side = rf"({'|'.join(PEOPLE)}|the \w+)"
    forms = (
        rf"(.+?)(?:, and|\.) (?P<x>{side}) was (?P<t>\w+)",
        rf"(.+?)\. the (?:one who was )?(?P<t>\w+)(?: one)? was (?P<x>{side})",
    )
    forms = [re.compile(rf"{form}\. (?P<y>{side}) was (?P<u>\w+)", re.IGNORECASE) for form in forms]
    known = defaultdict(dict)
    for paragraph in text(0):
        for match in filter(None, (form.fullmatch(paragraph.rstrip(".")) for form in forms)):
            one, other = match["x"].lower(), match["y"].lower()
            if one in match[1].lower() and other in match[1].lower():
                key, role = roles(match[1], (one, other))
                known[key] |= {match["t"]: role[one], match["u"]: role[other]}
    for split in SPLITS:
        twins = defaultdict(list)
        for row in small_rows("winogrande", split):
            event, trait = re.fullmatch(r"(.+?)(?: because|, so) _ was (\w+)\.", row["question"]).groups()
            key, role = roles(event, [choice.lower() for choice in row["choices"]])
            assert role[right(row).lower()] == known[key][trait], row
            twins[event, tuple(row["choices"])].append((trait, row["label"]))
        for found in twins.values():
            assert {label for _, label in found} == {0, 1} and len({trait for trait, _ in found}) == 2


@pytest.mark.parametrize("seed", range(20))
def test_splits_share_no_entity_no_event_and_no_question(seed, monkeypatch):
    if seed > 1:  # less of each split, for time
        world._rows.cache_clear()
        for split, limit in {"train": 600, "validation": 100, "test": 300}.items():
            monkeypatch.setitem(LIMITS, split, limit)
    names = build_world(seed).names | PEOPLE
    for task in COMMONSENSE:
        asked, found = {}, {}
        for split in SPLITS:
            some = rows(task, split, seed)
            asked[split] = {normal(f"{row.get('context', '')} {row['question']}") for row in some}
            found[split] = {
                word
                for row in some
                for word in re.findall(r"\w+", row["question"])
                if word in names or word.lower() in names
            }
            found[split] |= {shape for row in some if (shape := SHAPES.get(task, lambda row: None)(row))}
        for one, other in combinations(SPLITS, 2):
            assert not asked[one] & asked[other] and not found[one] & found[other], f"{task}: {one}, {other}"
    world._rows.cache_clear()


def normal(question):
    return " ".join(re.findall(r"\w+", question.lower()))


SHAPES = {  # what a question is about, besides names
    "siqa": lambda row: neutral(row["context"]),
    "hellaswag": lambda row: right(row),
    "boolq": lambda row: re.search(
        r"(?:the )?(\w+)", re.sub("Is it true that |Can one say that ", "", row["question"])
    )[1],
    "winogrande": lambda row: re.sub(
        "|".join(row["choices"]), "", re.split(" because|, so", row["question"])[0], flags=re.I
    ),
}


@pytest.mark.parametrize("task", COMMONSENSE)
def test_knowing_how_common_answers_are_is_worth_nothing(task):
    common = Counter((row["domain"], row["skill"], right(row)) for row in rows(task, "train"))
    found = rows(task, "test")
    chance = 1 / OPTIONS[task]
    for sign in (1, -1):
        guesses = [
            max(row["choices"], key=lambda value: sign * common[row["domain"], row["skill"], value])
            for row in found
        ]
        hits = sum(guess == right(row) for guess, row in zip(guesses, found, strict=True))
        assert hits / len(found) < chance + 4 * (chance * (1 - chance) / len(found)) ** 0.5


def test_the_corpus_never_asks():
    forms = {
        form for relations in RELATIONS.values() for spec in relations.values() for form in spec["questions"]
    }
    forms |= {form for entry in LEX["events"]["aspects"].values() for form in entry["questions"]}
    forms |= {
        goal
        for entry in LEX["goals"].values()
        for spec in entry.values()
        for goal in spec["goals"] + spec["solutions"]
    }
    forms |= {
        *LEX["scripts"]["questions"],
        *LEX["twins"]["questions"].values(),
        *LEX["openbook"]["questions"],
    }
    forms |= {*LEX["reading"]["questions"], *LEX["reverse"]["kinds"], *LEX["reverse"]["concepts"]}
    pieces = {max(re.split(r"\{\w\}", form), key=len).strip(" ,?.").lower() for form in forms}
    lower = "\n".join(text(0)).lower()
    assert "?" not in lower and "question" not in lower and "answer:" not in lower and "_" not in lower
    assert not [piece for piece in pieces if len(piece.split()) > 2 and piece in lower]


def test_held_out_paragraphs_are_of_the_same_sort_and_not_in_the_corpus():
    held = list(islice(corpus(0, SMALL, heldout=True), 400))
    assert not set(held) & set(text(0)) and len(set(held)) > 390
    lengths = [sum(map(len, some)) / len(some) for some in (held, text(0))]
    assert lengths[0] == pytest.approx(lengths[1], rel=0.1)
    entities = {entity.name for entity in build_world(0, SMALL).entities}
    assert len(entities & set(re.findall(r"[a-z]+", " ".join(held).lower()))) > 0.3 * len(entities)


@pytest.mark.parametrize("task", TASKS)
def test_rows_are_many_complete_and_balanced(task):
    for split in SPLITS:
        found = rows(task, split)
        assert len(found) == LIMITS[split] and len({row["id"] for row in found}) == len(found)
        assert all(
            {"question", "choices", "label", "skill", "domain"} <= set(row) and row["skill"] and row["domain"]
            for row in found
        )
        assert all(
            len(row["choices"]) == OPTIONS.get(task, len(row["choices"])) == len(set(row["choices"]))
            for row in found
        )
        counts = Counter((len(row["choices"]), row["label"]) for row in found)
        for options in {n for n, _ in counts}:
            each = [counts[options, label] for label in range(options)]
            assert max(each) - min(each) <= 1, f"{task} {split}: {each}"
    assert {row["skill"] for row in rows(task, "test")} == {row["skill"] for row in rows(task, "train")}
    if task in COMMONSENSE:
        assert len({row["skill"] for row in found}) >= 2 and len({row["domain"] for row in found}) >= 2


@pytest.mark.parametrize("facts", [1, 2, 4, 8])
def test_axis_facts_is_the_number_of_sentences(facts):
    assert {len(sentences(row["context"])) for row in small_rows("boolq", facts=facts)} == {facts}
    if facts <= 4:
        assert {len(row["question"].split(", ")) for row in small_rows("hellaswag", facts=facts)} == {facts}


def test_axis_hops_of_passages():
    assert {row["skill"] for row in small_rows("boolq", hops=1)} == {"read:one", "read:pair"}
    assert {row["skill"] for row in small_rows("boolq", hops=2)} == {"read:kind"}


@pytest.mark.parametrize(
    ("task", "axes"),
    [
        ("arc_easy", {"hops": 3}),
        ("arc_challenge", {"hops": 4}),
        ("boolq", {"facts": 9}),
        ("piqa", {"hops": 3}),
    ],
)
def test_an_axis_outside_a_tasks_choice_is_an_error(task, axes):
    with pytest.raises(ConfigError, match=f"axes.{only(axes)}={only(axes.values())}: expected one of 1, 2"):
        small_rows(task, **axes)


@pytest.mark.parametrize("axes", [{"hops": 0}, {"facts": 1.5}, {"conflict": 1.1}])
def test_impossible_axes_are_an_error(axes):
    with pytest.raises(ConfigError, match=rf"axes\.{only(axes)}="):
        Axes(**axes)


def test_same_seed_same_world_other_seed_other_world():
    def draw():
        world.build_world.cache_clear()
        world._rows.cache_clear()
        return corpus_hash(0, SMALL, 200), [small_rows(task, "validation") for task in COMMONSENSE]

    first = draw()
    assert first == draw()
    assert (
        corpus_hash(1, SMALL, 200)
        != first[0]
        != corpus_hash(0, WorldConfig(told_share=0.3, entities_per_kind=8), 200)
    )
    assert small_rows("arc_easy")[:7] == rows("arc_easy", "test", n=7, config=SMALL)


def test_content_hash_sees_every_task(monkeypatch):
    monkeypatch.setattr(world, "TASKS", COMMONSENSE)
    first = content_hash(0, SMALL, 50)
    monkeypatch.setattr(world, "TASKS", COMMONSENSE[1:])
    assert content_hash(0, SMALL, 50) != first


def test_rows_are_copies():
    rows("boolq", "test")[0]["choices"].append("spoilt")
    assert len(rows("boolq", "test")[0]["choices"]) == 2


def test_dials_act():
    assert len(build_world(0, SMALL).entities) == 8 * len(KINDS)
    told = [len(e.told) for e in build_world(0, WorldConfig(told_share=0.0)).entities]
    assert set(told) == {0}


@pytest.mark.parametrize(
    ("task", "split", "hint"), [("arc_esy", "test", "arc_easy"), ("addsub", "valid", "validation")]
)
def test_errors_name_the_nearest(task, split, hint):
    with pytest.raises(ConfigError, match=f"Did you mean '{hint}'"):
        rows(task, split)


@pytest.fixture(scope="module")
def tiny():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(
        MODEL, dtype=torch.float32
    ).eval(), AutoTokenizer.from_pretrained(MODEL)


def test_shipped_files_are_small_and_name_no_place():
    assert (MODEL / "model.safetensors").stat().st_size <= 12e6
    for name in (
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "README.md",
    ):
        assert "/home/" not in (MODEL / name).read_text(encoding="utf-8") and "/tmp/" not in (
            MODEL / name
        ).read_text(encoding="utf-8")


def test_model_card_names_this_world():
    assert corpus_hash() in (MODEL / "README.md").read_text(encoding="utf-8"), (
        "the corpus changed: run pretrain and calibrate again"
    )


def test_tokenizer_round_trips_and_keeps_pad_out_of_text(tiny):
    _, tokenizer = tiny
    texts = [*islice(corpus(), 500), "Question: Ünïcode, 1234567 ✓\n\tAnswer: \\ {}"]
    for paragraph in texts:
        ids = tokenizer(paragraph).input_ids
        assert tokenizer.decode(ids) == paragraph
        assert tokenizer.pad_token_id not in ids and tokenizer.eos_token_id not in ids
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert len(tokenizer("2048").input_ids) == 4
    assert len(tokenizer("Please choose the correct answer to the question:").input_ids) == 9


def test_pretraining_repeats_exactly_and_writes_a_loadable_folder(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from moabench.benchmarks.world.pretrain import Recipe, build, save

    torch.set_num_threads(1)
    recipe, config = Recipe(steps=3, rows=2, length=32, warmup=1, vocabulary=400), WorldConfig(documents=200)
    model, tokenizer, report = build(recipe, config)
    again, _, _ = build(recipe, config)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    save(model, tokenizer, tmp_path, recipe, report)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
    assert (
        AutoTokenizer.from_pretrained(tmp_path)("The finch eats").input_ids
        == tokenizer("The finch eats").input_ids
    )
    assert report["corpus hash"] in (tmp_path / "README.md").read_text(encoding="utf-8")
