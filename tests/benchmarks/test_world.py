"""The built-in world, checked by a reader that knows only its text.

`read_corpus` parses sentences with the lexicon's patterns and never sees how the world was drawn; every row of every task is then
answered from what it read. Run: pytest tests/benchmarks/test_world.py
"""

import re
from collections import Counter, defaultdict
from functools import lru_cache
from itertools import combinations, islice

import pytest
import torch
import yaml

from moabench.benchmarks import world
from moabench.benchmarks.world import MODEL, SPLITS, TASKS, WorldConfig, content_hash, corpus, rows
from moabench.benchmarks.world.facts import LEXICON

ARC = ("arc_easy", "arc_challenge")
SEEDS = (0, 1, 2)
PARAGRAPHS = 50_000  # of 120,000: states a given own fact about 25 times
DOMAINS = {path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) for path in (LEXICON / "domains").glob("*.yaml")}
RELATIONS = {domain: {**entry["inherited"], **entry["own"]} for domain, entry in DOMAINS.items()}
STORIES = yaml.safe_load((LEXICON / "stories.yaml").read_text(encoding="utf-8"))
KINDS = {kind: domain for domain, entry in DOMAINS.items() for kind in entry["kinds"]}
STATEMENTS = defaultdict(dict)  # "{s} eats {v}" -> {value: relation}
for _relations in RELATIONS.values():
    for _name, _spec in _relations.items():
        for _statement in _spec["statements"]:
            STATEMENTS[_statement].update(dict.fromkeys(_spec["values"], _name))
IS_A = {"is a {k}", "is an {k}", "is one kind of {k}", "belongs to the {k} family"}
MARGIN = re.compile(r"^(?:being|as|like) (?:an?|every) \w+, |, as any \w+ does$", re.IGNORECASE)


def read_sentence(sentence):
    """(subject, relation, value), with relation `kind` for "x is a finch"; None for a sentence of another sort."""
    words = MARGIN.sub("", sentence).split()
    start = 1 if words[0].lower() in ("the", "every", "each", "a", "an") else 0
    subject, rest = words[start].lower(), words[start + 1 :]
    for i, word in enumerate(rest):
        around = rest[:i], rest[i + 1 :]
        if word in KINDS and " ".join([*around[0], "{k}", *around[1]]) in IS_A:
            return subject, "kind", word
        relation = STATEMENTS.get(" ".join(["{s}", *around[0], "{v}", *around[1]]), {}).get(word)
        if relation:
            return subject, relation, word
    return None


@lru_cache(maxsize=3)
def read_corpus(seed):
    """{subject: {relation: {values}}} of the first paragraphs; a pronoun stands for the paragraph's first subject."""
    known = defaultdict(lambda: defaultdict(set))
    for paragraph in islice(corpus(seed), PARAGRAPHS):
        topic = None
        for sentence in paragraph.rstrip(".").split(". "):
            if fact := read_sentence(sentence):
                subject, relation, value = fact
                topic = topic or subject
                known[topic if subject in ("it", "she", "he") else subject][relation].add(value)
    return known


def entity_of(row, known):
    """The one entity that the question names."""
    (name,) = {word for word in re.findall(r"\w+", row["question"].lower()) if "kind" in known.get(word, ())}
    return name


def arc_rows(seed):
    return [(task, split, row) for task in ARC for split in SPLITS for row in rows(task, split, seed)]


@pytest.mark.parametrize("seed", SEEDS)
def test_every_answer_follows_from_the_corpus_and_every_distractor_does_not(seed):
    known = read_corpus(seed)
    for task, split, row in arc_rows(seed):
        entity, relation = entity_of(row, known), row["skill"].split(":")[1]
        (kind,) = known[entity]["kind"]
        assert KINDS[kind] == row["domain"]
        if task == "arc_easy":
            (truth,) = known[entity][relation]
        else:
            assert relation not in known[entity], f"{split}: the corpus states {relation} of {entity}, so this is one hop: {row}"
            (truth,) = known[kind][relation]
        assert row["choices"][row["label"]] == truth, row
        assert len(set(row["choices"])) == 4 and set(row["choices"]) <= set(RELATIONS[row["domain"]][relation]["values"])


@pytest.mark.parametrize("seed", SEEDS)
def test_distractors_of_one_hop_questions_are_true_of_siblings(seed):
    known, siblings = read_corpus(seed), defaultdict(set)
    for facts in known.values():
        for kind in facts.get("kind", ()):
            for relation, values in facts.items():
                siblings[kind, relation] |= values
    for row in rows("arc_easy", "test", seed):
        (kind,) = known[entity_of(row, known)]["kind"]
        assert set(row["choices"]) <= siblings[kind, row["skill"].split(":")[1]]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("task", ARC)
def test_knowing_how_common_answers_are_is_worth_nothing(task, seed):
    common = Counter((row["domain"], row["skill"], row["choices"][row["label"]]) for row in rows(task, "train", seed))
    found = rows(task, "test", seed)
    guesses = [max(row["choices"], key=lambda value: common[row["domain"], row["skill"], value]) for row in found]
    hits = sum(guess == row["choices"][row["label"]] for guess, row in zip(guesses, found, strict=True))
    assert hits / len(found) < 0.25 + 4 * (0.25 * 0.75 / len(found)) ** 0.5


@pytest.mark.parametrize("seed", SEEDS)
def test_splits_share_no_entity_and_no_question(seed):
    known = read_corpus(seed)
    entities, questions = defaultdict(set), defaultdict(set)
    for _, split, row in arc_rows(seed):
        entities[split].add(entity_of(row, known))
        questions[split].add(row["question"])
    for row_split in SPLITS:
        questions[row_split] |= {row["question"] for row in rows("addsub", row_split, seed)}
    for one, other in combinations(SPLITS, 2):
        assert not entities[one] & entities[other] and not questions[one] & questions[other]


@pytest.mark.parametrize("seed", SEEDS)
def test_addsub_answers_are_right_and_splits_share_no_numbers_and_no_names(seed):
    numbers, people = defaultdict(set), defaultdict(set)
    for split in SPLITS:
        for row in rows("addsub", split, seed):
            first, sign, second, answer = re.fullmatch(r"(\d+)([+-])(\d+)=(\d+)", row["equation"]).groups()
            total = int(first) + int(second) if sign == "+" else int(first) - int(second)
            assert total == int(answer) == int(row["answer"]) == int(row["choices"][row["label"]])
            assert STORIES["skills"][row["skill"]]["operation"] == {"+": "add", "-": "sub"}[sign]
            assert sorted(re.findall(r"\d+", row["question"])) == sorted((first, second))
            assert len(set(row["choices"])) == 4 and all(int(choice) > 0 for choice in row["choices"])
            numbers[split].add((first, second))
            people[split] |= set(re.findall(r"[A-Z]\w+", row["question"])) & {n for s in SPLITS for n in STORIES["names"][s]}
    for one, other in combinations(SPLITS, 2):
        assert not numbers[one] & numbers[other] and not people[one] & people[other]


def test_corpus_sums_are_right():
    seen = 0
    for paragraph in islice(corpus(), 5000):
        for a, op, b, c in re.findall(r"(\d+) (plus|minus|less|and) (\d+) (?:is|makes?) (\d+)\.", paragraph):
            assert int(c) == (int(a) - int(b) if op in ("minus", "less") else int(a) + int(b)), paragraph
            seen += 1
    assert seen > 500


def test_the_corpus_never_asks():
    forms = {form for relations in RELATIONS.values() for spec in relations.values() for form in spec["questions"]}
    forms |= {form for skill in STORIES["skills"].values() for form in skill["questions"]}
    pieces = {max(re.split(r"\{\w\}", form), key=len).strip(" ,?").lower() for form in forms}
    text = "\n".join(islice(corpus(), 20_000)).lower()
    assert "?" not in text and "question" not in text and "answer:" not in text
    assert not [piece for piece in pieces if len(piece.split()) > 2 and piece in text]


@pytest.mark.parametrize("task", TASKS)
def test_rows_are_many_complete_and_balanced(task):
    for split, least in {"train": 2000, "validation": 280, "test": 600}.items():
        found = rows(task, split)
        assert len(found) >= least and len({row["id"] for row in found}) == len(found)
        counts = Counter(row["label"] for row in found)
        assert max(counts.values()) - min(counts.values()) <= 1 and set(counts) == {0, 1, 2, 3}
        assert all(row["skill"] and row["domain"] for row in found)
        assert len({row["skill"] for row in found}) >= 5 and len({row["domain"] for row in found}) == 4
    assert {row["skill"] for row in rows(task, "test")} == {row["skill"] for row in rows(task, "train")}


def test_same_seed_same_world_other_seed_other_world():
    world.build_world.cache_clear()
    world._rows.cache_clear()
    first = content_hash(0, paragraphs=200), rows("arc_easy", "test"), list(islice(corpus(), 50))
    world.build_world.cache_clear()
    world._rows.cache_clear()
    assert first == (content_hash(0, paragraphs=200), rows("arc_easy", "test"), list(islice(corpus(), 50)))
    assert content_hash(1, paragraphs=200) != first[0]
    assert rows("arc_easy", "test", n=7) == first[1][:7]


def test_rows_are_copies():
    rows("addsub", "test")[0]["choices"].append("spoilt")
    assert len(rows("addsub", "test")[0]["choices"]) == 4


def test_dials_act():
    few = WorldConfig(entities_per_kind=8)
    assert len(world.build_world(0, few).entities) == 8 * len(KINDS)
    told = [len(e.told) for e in world.build_world(0, WorldConfig(told_share=0.0)).entities]
    assert set(told) == {0}


@pytest.mark.parametrize(("task", "split", "hint"), [("arc_esy", "test", "arc_easy"), ("addsub", "valid", "validation")])
def test_errors_name_the_nearest(task, split, hint):
    with pytest.raises(ValueError, match=f"nearest is '{hint}'"):
        rows(task, split)


@pytest.fixture(scope="module")
def tiny():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(MODEL)


def test_shipped_files_are_small_and_name_no_place():
    assert (MODEL / "model.safetensors").stat().st_size <= 12e6
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "README.md"):
        assert "/home/" not in (MODEL / name).read_text(encoding="utf-8") and "/tmp/" not in (MODEL / name).read_text(encoding="utf-8")


def test_model_card_names_this_world(tiny):
    assert content_hash() in (MODEL / "README.md").read_text(encoding="utf-8"), "rows or corpus changed: run pretrain and calibrate again"


def test_tokenizer_round_trips_and_keeps_pad_out_of_text(tiny):
    _, tokenizer = tiny
    texts = [*islice(corpus(), 500), "Question: Ünïcode, 1234567 ✓\n\tAnswer: \\ {}"]
    for text in texts:
        ids = tokenizer(text).input_ids
        assert tokenizer.decode(ids) == text
        assert tokenizer.pad_token_id not in ids and tokenizer.eos_token_id not in ids
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert len(tokenizer("2048").input_ids) == 4


@pytest.mark.parametrize("task", TASKS)
def test_frozen_base_is_near_chance(tiny, task):
    accuracy = base_accuracy(*tiny, rows(task, "test", n=200))
    assert abs(accuracy - 0.25) <= 0.10, f"{task}: base accuracy {accuracy:.2f}, chance 0.25"


@torch.no_grad()
def base_accuracy(model, tokenizer, questions):
    """Share of `questions` whose right choice has the highest summed log-probability after the prompt."""
    hits = 0
    for row in questions:
        prompt = f"Question: {row['question']}\nAnswer:"
        encoded = tokenizer([f"{prompt} {choice}" for choice in row["choices"]], padding=True, return_tensors="pt")
        start = len(tokenizer(prompt).input_ids)
        logprobs = model(**encoded).logits[:, start - 1 : -1].log_softmax(-1)
        targets, real = encoded.input_ids[:, start:], encoded.attention_mask[:, start:]
        scores = (logprobs.gather(-1, targets[..., None])[..., 0] * real).sum(1)
        hits += int(scores.argmax()) == row["label"]
    return hits / len(questions)


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
    assert AutoTokenizer.from_pretrained(tmp_path)("The finch eats").input_ids == tokenizer("The finch eats").input_ids
    assert report["content hash (dials, rows, corpus)"] in (tmp_path / "README.md").read_text(encoding="utf-8")
