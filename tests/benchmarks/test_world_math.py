"""The math tasks of the built-in world, checked by a reader with a parser and an evaluator of its own.

Equations are parsed as Python expressions, worked solutions and the corpus with regular expressions; nothing
is taken from the code that wrote them but the rows. Run: pytest tests/benchmarks/test_world_math.py
"""

import ast
import operator
import random
import re
from collections import Counter, defaultdict
from fractions import Fraction
from functools import cache
from itertools import combinations

import pytest
import yaml

from moabench.benchmarks import world
from moabench.benchmarks.world import LIMITS, SPLITS, Axes, WorldConfig, rows
from moabench.benchmarks.world.facts import LEXICON, build_world
from moabench.benchmarks.world.writers import arithmetic
from moabench.methods.spec import ConfigError

TASKS = ("addsub", "singleeq", "multiarith", "svamp", "mawps", "gsm8k", "aqua", "mathqa")
STEPS = {
    "addsub": {1},
    "singleeq": {1},
    "svamp": {1},
    "multiarith": {2},
    "aqua": {2},
    "mawps": {1, 2},
    "mathqa": {1, 2},
    "gsm8k": {2, 3},
}
LETTERED = ("aqua", "mathqa")
SEEDS = range(20)
WORDS = yaml.safe_load((LEXICON / "stories.yaml").read_text(encoding="utf-8"))
NAMES = {name: split for split, names in WORDS["names"].items() for name in names}
SUM = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")
IN_WORDS = re.compile(
    r"(\d+) (plus|and|minus|less|times|divided by|taken from) (\d+) (?:is|makes?|leaves) (\d+)\."
)
SIGN_OF_WORD = {"plus": "+", "and": "+", "minus": "-", "less": "-", "times": "*", "divided by": "/"}
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: Fraction}
SIGN_OF = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}
SIGNS = {"add": "+", "sub": "-", "mul": "*", "div": "/"}


def evaluate(node, steps):
    """Value of a parsed expression; appends (left, sign, right, result) of every operation, inner ones
    first."""
    if isinstance(node, ast.Constant):
        return node.value
    left, right = evaluate(node.left, steps), evaluate(node.right, steps)
    value = OPERATORS[type(node.op)](left, right)
    steps.append((int(left), SIGN_OF[type(node.op)], int(right), value))
    return value


@cache
def steps_of(equation):
    """The operations of "(5+3)-2=6", and the number after the sign of equality."""
    left, right = equation.split("=")
    steps = []
    evaluate(ast.parse(left, mode="eval").body, steps)
    return tuple(steps), int(right)


def numbers_of(text):
    return [int(n) for n in re.findall(r"\d+", text)]


def answer_of(row):
    return int(row["choices"][row["label"]])


def written(task, seed, split, axes=None):
    """Drafts straight from the writer, for the seeds that need no shuffled rows."""
    return arithmetic.WRITERS[task](build_world(seed), split, axes or Axes())


@cache
def paragraphs(n=30_000):
    rng = random.Random(5)
    return [arithmetic.paragraph(build_world(0), rng) for _ in range(n)]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("split", SPLITS)
def test_every_equation_solution_and_answer_is_right(task, split):
    for row in rows(task, split):
        steps, result = steps_of(row["equation"])
        assert steps[-1][-1] == result == answer_of(row), row
        assert row["answer"] == ("ABCDE"[row["label"]] if task in LETTERED else str(result)), row
        told = [(int(a), sign, int(b), int(c)) for a, sign, b, c in SUM.findall(row["solution"])]
        assert told == list(steps), (
            row
        )  # the equation's operations, in their order, each with its true result
        assert len(row["solution"].split("\n")) == len(steps) in STEPS[task], row
        assert len(row["skill"].split(">")) == len(steps) and "answer is" not in row["solution"]


@pytest.mark.parametrize("task", TASKS)
def test_numbers_stay_in_their_range(task):
    for left, sign, right, value in {
        step for split in SPLITS for row in rows(task, split) for step in steps_of(row["equation"])[0]
    }:
        assert value == int(value) and 2 <= value <= 100
        if sign in "+-":
            assert 2 <= left <= 20 and 2 <= right <= 20
        else:
            assert 2 <= right <= 10 and 2 <= (left if sign == "*" else value) <= 10


@pytest.mark.parametrize("task", TASKS)
def test_a_skill_has_its_operation(task):
    """`join` always adds, `share` always divides, in every task."""
    found = defaultdict(set)
    for row in rows(task, "train"):
        for skill, (_, sign, _, _) in zip(row["skill"].split(">"), steps_of(row["equation"])[0], strict=True):
            found[skill].add(sign)
    assert {skill: {SIGNS[WORDS["skills"][skill]["operation"]]} for skill in found} == found


@pytest.mark.parametrize("task", TASKS)
def test_the_question_has_the_numbers_of_the_equation_and_svamp_one_more(task):
    for split in SPLITS:
        for row in rows(task, split):
            asked, used = (
                Counter(numbers_of(row["question"])),
                Counter(numbers_of(row["equation"].split("=")[0])),
            )
            assert used <= asked, row
            assert (asked - used).total() == (1 if task == "svamp" else 0), row


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("split", SPLITS)
def test_options_are_different_positive_and_balanced(task, split):
    found, options = rows(task, split), 5 if task in LETTERED else 4
    for row in found:
        assert len(row["choices"]) == len(set(row["choices"])) == options and all(
            int(choice) > 0 for choice in row["choices"]
        )
    counts = Counter(row["label"] for row in found)
    assert set(counts) == set(range(options)) and max(counts.values()) - min(counts.values()) <= 1


@pytest.mark.parametrize("task", TASKS)
def test_rows_are_many_and_complete(task):
    for split in SPLITS:
        found = rows(task, split)
        assert len(found) == LIMITS[split] == len({row["question"] for row in found})
        assert (
            all(row["skill"] and row["domain"] for row in found)
            and len({row["domain"] for row in found}) >= 4
        )
    if task == "mathqa":
        assert {row["category"] for row in rows(task, "test")} == {"gain", "rate", "share", "general"}


@pytest.mark.parametrize("seed", SEEDS)
def test_splits_share_no_name_and_no_step_in_any_task(seed, monkeypatch):
    """All math tasks together: a pair of numbers that some step of a test question works on is in no step of
    a training question. Full size for the first seed, a prefix of each split for the others."""
    if seed:
        monkeypatch.setattr(arithmetic, "SIZES", {"train": 500, "validation": 100, "test": 300})
    pairs, names, skills = defaultdict(set), defaultdict(set), defaultdict(set)
    for task in TASKS:
        for split in SPLITS:
            drafts = written(task, seed, split)
            assert len(drafts) == arithmetic.SIZES[split]
            for draft in drafts:
                pairs[split] |= {(min(a, b), max(a, b)) for a, _, b, _ in steps_of(draft["equation"])[0]}
                people = {word for word in re.findall(r"[A-Z][a-z]+", draft["question"]) if word in NAMES}
                assert people, f"nobody in {draft['question']}"
                names[split] |= people
                skills[task, split].add(draft["skill"])
        assert skills[task, "train"] == skills[task, "test"] >= skills[task, "validation"]
    for one, other in combinations(SPLITS, 2):
        assert not pairs[one] & pairs[other] and not names[one] & names[other]


def test_svamp_asks_several_questions_about_one_story():
    stories = defaultdict(set)
    for draft in written("svamp", 0, "test"):
        body, question = re.fullmatch(r"(.*\.) ([^.]*\?)", draft["question"]).groups()
        stories[body].add((question, draft["answer"]))
    several = [asked for asked in stories.values() if len(asked) > 1]
    differing = [asked for asked in several if len({answer for _, answer in asked}) > 1]
    assert len(several) > 50 and len(differing) > 0.8 * len(several)


@pytest.mark.parametrize("facts", [1, 2, 3])
def test_axis_facts_is_the_number_of_sentences_that_svamp_does_not_need(facts):
    for row in rows("svamp", "test", axes=Axes(facts=facts), n=300):
        *sentences, question = re.split(r"(?<=[.?]) ", row["question"])
        used = numbers_of(row["equation"].split("=")[0])
        assert (
            len(sentences) == 2 + facts
            and all(len(numbers_of(sentence)) == 1 for sentence in sentences)
            and not numbers_of(question)
        )
        assert (
            Counter(used) <= Counter(numbers_of(" ".join(sentences)))
            and answer_of(row) == steps_of(row["equation"])[1]
        )


@pytest.mark.parametrize("task", ["multiarith", "mawps", "gsm8k", "aqua"])
@pytest.mark.parametrize("hops", [1, 2, 3])
def test_axis_hops_is_the_number_of_steps(task, hops):
    found = {split: rows(task, split, axes=Axes(hops=hops)) for split in ("train", "test")}
    for row in found["test"]:
        assert len(steps_of(row["equation"])[0]) == hops and answer_of(row) == steps_of(row["equation"])[1]
    assert len(found["test"]) >= 300 and {row["skill"] for row in found["test"]} == {
        row["skill"] for row in found["train"]
    }


def test_an_axis_outside_the_choice_is_an_error():
    with pytest.raises(ConfigError, match=r"hops=4.*1, 2, 3"):
        rows("gsm8k", "test", axes=Axes(hops=4))


def test_corpus_sums_are_true_and_cover_every_fact_that_is_asked():
    known = set()
    for paragraph in paragraphs():
        found = SUM.findall(paragraph)
        for a, word, b, c in IN_WORDS.findall(paragraph):
            found.append((b, "-", a, c) if word == "taken from" else (a, SIGN_OF_WORD[word], b, c))
        for a, sign, b, c in found:
            steps, _ = steps_of(f"{a}{sign}{b}={c}")
            assert steps[0][-1] == int(c), paragraph
            known.add((int(a), sign, int(b)))
    for task in TASKS:
        for split in SPLITS:
            asked = {step[:3] for row in rows(task, split) for step in steps_of(row["equation"])[0]}
            assert asked <= known, (task, split, sorted(asked - known)[:5])


def test_statements_of_the_corpus_are_true():
    """A story of one step that states its result in words."""
    fitting = {
        re.compile(
            re.sub(r"\\\{([abr])\\\}", repeatable(), re.sub(r"\\\{[pqo]\\\}", r"\\w+", re.escape(text)))
        ): SIGNS[entry["operation"]]
        for entry in WORDS["skills"].values()
        for text in entry["statements"]
    }
    seen = 0
    for paragraph in paragraphs()[:5000]:
        for pattern, sign in fitting.items():
            if match := pattern.fullmatch(paragraph):
                steps, result = steps_of("{a}{sign}{b}={r}".format(sign=sign, **match.groupdict()))
                assert steps[0][-1] == result, paragraph
                seen += 1
    assert seen > 500


def repeatable():
    return r"(?P<\1>\\d+)"


def wordings(node, path=()):
    """(path, text) of every text of the lexicon."""
    if isinstance(node, str):
        yield path, node
    elif isinstance(node, dict):
        for key, value in node.items():
            yield from wordings(value, (*path, key))
    elif isinstance(node, list):
        for value in node:
            yield from wordings(value, path)


def test_the_corpus_never_asks():
    text = "\n".join(paragraphs())
    assert "?" not in text and "Find" not in text and "Question" not in text and "answer" not in text.lower()
    manners = {"asked", "questions", "ask", "sentences"}
    asked = [
        form
        for path, form in wordings(WORDS)
        if manners & set(path) and path[-1] not in ("skill", "sum", "line")
    ]
    assert len(asked) > 100
    told = re.sub(r"\d+", "#", re.sub(r"\b(?:" + "|".join(NAMES) + r")\b", "@", text))
    for theme in WORDS["themes"].values():
        told = re.sub(r"\b(?:" + "|".join(theme) + r")\b", "%", told)
    for form in asked:
        plain = re.sub(r"\{[pq]\}", "@", re.sub(r"\{[abcdn]\}", "#", re.sub(r"\{[ou]\}", "%", form)))
        assert plain not in told, form
        piece = max(re.split(r"[@#%]", plain), key=len).strip(" ,?.")
        assert len(piece.split()) < 3 or piece not in told, piece


def candidates(row):
    """Rule -> the options among which somebody guesses who follows the rule and knows no language."""
    options, asked = [int(choice) for choice in row["choices"]], numbers_of(row["question"])
    apart = {n: sum(abs(n - other) for other in options) for n in options}
    pairs = [(x, y) for i, x in enumerate(asked) for j, y in enumerate(asked) if i != j]
    return {
        "largest": {max(options)},
        "smallest": {min(options)},
        "central": {min(options, key=apart.get)},
        "remote": {max(options, key=apart.get)},
        "not in the question": set(options) - set(asked),
        "sum of all": {sum(asked)} & set(options),
        "difference of the first two": {abs(asked[0] - asked[1])} & set(options),
        "result of one operation": {r for x, y in pairs for r in (x + y, x - y, x * y, Fraction(x, y))}
        & set(options),
    }


def rule_scores(task, seed=0):
    """Expected share of right answers of each rule; a guess among all options where a rule leaves none."""
    found = rows(task, "test", seed)
    common = Counter((row["skill"], answer_of(row)) for row in rows(task, "train", seed))
    scores = Counter()
    for row in found:
        for rule, left in candidates(row).items():
            left = left or {int(choice) for choice in row["choices"]}
            scores[rule] += (answer_of(row) in left) / len(left)
        best = max(row["choices"], key=lambda choice: common[row["skill"], int(choice)])
        scores["commonest of the skill"] += int(best) == answer_of(row)
    return {rule: score / len(found) for rule, score in scores.items()}


@pytest.mark.parametrize("task", TASKS)
def test_simple_rules_are_worth_little(task):
    scores, chance = rule_scores(task), 0.2 if task in LETTERED else 0.25
    for rule in ("largest", "smallest", "central", "remote", "not in the question"):
        assert scores[rule] < chance + 0.12, scores
    assert scores["commonest of the skill"] < 0.45, (
        scores
    )  # knows what must be done, and from it how large results are
    for rule in (
        "sum of all",
        "difference of the first two",
        "result of one operation",
    ):  # with one step two or more operations are left
        assert scores[rule] < (0.6 if STEPS[task] == {1} else 0.45), scores


def test_same_seed_same_rows_other_seed_other_pairs():
    assert written("gsm8k", 0, "test") == written("gsm8k", 0, "test")
    owners = [arithmetic.owners(seed, WorldConfig()) for seed in (0, 1)]
    assert owners[0].keys() == owners[1].keys() and owners[0] != owners[1]
    assert set(TASKS) <= set(world.TASKS)
