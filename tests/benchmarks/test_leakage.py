"""Leakage: against the overlap tables of docs/tasks.md, against brute force, and on small rows
of every kind.

pytest tests/benchmarks/test_leakage.py
"""

import json
import random
from collections import Counter
from functools import lru_cache

import pytest

from moabench.benchmarks.fairness import leakage
from moabench.methods.spec import ConfigError


@lru_cache(maxsize=64)
def load(file):
    task = file.parent.name
    return tuple(json.loads(line) | {"task": task} for line in file.read_text(encoding="utf-8").splitlines())


def found(folder, train, evaluation, near=False):
    """Training rows of each kind, a row once under its strongest."""
    report = leakage.check(load(folder / f"{train}.jsonl"), load(folder / f"{evaluation}.jsonl"), near=near)
    return {kind: sum(pair[kind] for pair in report.counts()) for kind in leakage.KINDS}


TAKEN_OUT = [  # train_overlap file, evaluation file, rows documented, rows we find
    ("arc_easy", "arc_easy/test", 3, 3),
    ("openbookqa", "openbookqa/test", 14, 14),
    ("openbookqa", "openbookqa/validation", 7, 7),
    ("boolq", "boolq/validation", 1, 1),
    ("piqa", "piqa/validation", 1, 1),
    ("mawps", "singleeq/test", 546, 546),
    ("mawps", "multiarith/test", 446, 446),
    ("mawps", "addsub/test", 416, 416),
    ("mawps", "asdiv/test", 248, 248),
    ("mawps", "mawps/validation", 44, 44),
    ("mawps", "mawps/test", 28, 28),
    # More than documented: that table was made with blanks kept ("did n't" was not "didn't") and 4.80 not
    # equal to 4.8.
    ("mawps_asdiv_a", "asdiv/test", 1343, 1349),
    ("mawps_asdiv_a", "multiarith/test", 596, 611),
    ("mawps_asdiv_a", "singleeq/test", 533, 533),
    ("mawps_asdiv_a", "addsub/test", 453, 453),
    ("mawps_asdiv_a", "mawps/validation", 251, 251),
    ("mawps_asdiv_a", "mawps/test", 250, 250),
]


@pytest.mark.parametrize(("train", "evaluation", "documented", "ours"), TAKEN_OUT)
def test_documented_repeats_are_found(datasets_folder, train, evaluation, documented, ours):
    assert documented <= ours == found(datasets_folder, f"{train}/train_overlap", evaluation)["exact"]


def test_every_row_taken_out_is_found_where_its_file_says(datasets_folder):
    for task in ("arc_easy", "openbookqa", "boolq", "piqa", "mawps", "mawps_asdiv_a"):
        rows = load(datasets_folder / task / "train_overlap.jsonl")
        named = {place.partition(":")[0] for row in rows for place in row["overlaps"]}
        evaluation = [row for place in named for row in load(datasets_folder / f"{place}.jsonl")]
        report = leakage.check(rows, evaluation, near=False)
        hits = {(m.train_id, m.eval_id) for m in report.matches if m.kind == "exact"}
        assert hits >= {(row["id"], place.partition(":")[2]) for row in rows for place in row["overlaps"]}
        assert report.leaked == set(range(len(rows)))


LEFT_IN = [  # train file, evaluation file, kind, documented, ours
    ("openbookqa", "openbookqa/test", "question", 23 - 14, 9),
    ("openbookqa", "openbookqa/validation", "question", 22 - 7, 15),
    ("arc_challenge", "arc_challenge/test", "question", 6, 6),
    ("arc_easy", "arc_easy/test", "question", 8 - 3, 5),
    ("arc_easy", "arc_challenge/test", "question", 2, 2),
    ("piqa", "piqa/validation", "question", 198 - 1, 201),  # spacing: "hotdog" and "hot dog"
    ("mawps", "mawps/test", "numbers", 20, 20),
    ("mawps", "mawps/validation", "numbers", 11, 11),
    ("mawps", "singleeq/test", "numbers", 5, 5),
    ("mawps", "asdiv/test", "numbers", 17, 28),  # spacing
    # True repeats in what the folder calls clean, for the two reasons above.
    ("mawps", "multiarith/test", "exact", 0, 38),
    ("mawps", "asdiv/test", "exact", 0, 6),
    ("boolq", "boolq/validation", "exact", 0, 5),
]


@pytest.mark.parametrize(("train", "evaluation", "kind", "documented", "ours"), LEFT_IN)
def test_what_was_left_in_is_found(datasets_folder, train, evaluation, kind, documented, ours):
    assert documented <= ours == found(datasets_folder, f"{train}/train", evaluation)[kind]


@pytest.mark.parametrize("train", ["arc_challenge", "gsm8k"])
def test_sets_documented_as_clean_have_no_exact_match(datasets_folder, train):
    for evaluation in (
        "arc_challenge/test",
        "arc_easy/test",
        "openbookqa/test",
        "gsm8k/test",
        "svamp/test",
        "asdiv/test",
    ):
        assert not found(datasets_folder, f"{train}/train", evaluation)["exact"]


def test_near_duplicates_on_real_files(datasets_folder):
    near = {
        task: found(datasets_folder, f"{task}/train", f"{task}/{split}", near=True)["near"]
        for task, split in [
            ("arc_easy", "test"),
            ("openbookqa", "test"),
            ("boolq", "validation"),
            ("mawps", "test"),
            ("winogrande", "validation"),
        ]
    }
    assert near == {
        "arc_easy": 6,
        "openbookqa": 2,
        "boolq": 82,
        "mawps": 2,
        "winogrande": 0,
    }  # samples of each looked at


# ---- one rule at a time


def choice(question, choices=("red", "blue", "green"), id="t", **more):
    return {"id": id, "task": "arc_easy", "question": question, "choices": list(choices), "label": 0, **more}


def problem(question, id="t", answer="3", **more):
    return {"id": id, "task": "gsm8k", "question": question, "answer": answer, **more}


def kinds(train, evaluation, **options):
    return [m.kind for m in leakage.check([train], [{**evaluation, "id": "e"}], **options).matches]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("She didn’t pay $1,200.50!", "she did n't pay $ 1200.5"),
        ("Seven of 70.0 dogs", "7 of 70 dogs"),
        ("ﬁne  Café-bar", "fine cafébar"),
        ("x_y", "x y"),
    ],
)
def test_normalisation(one, other):
    assert "".join(leakage.words(one)) == "".join(leakage.words(other))


def test_normalisation_keeps_apart_what_differs():
    texts = ["7.5 dogs", "75 dogs", "7 dogs", "17 dogs", "1/7 dog", "seventy dogs", "Hunde 7"]
    assert len({"".join(leakage.words(text)) for text in texts}) == len(texts)


def test_exact_and_question():
    sky = choice("What colour is the sky?")
    assert kinds(choice("what COLOUR is the sky", ["green", "red.", "Blue"]), sky) == [
        "exact"
    ]  # order of the choices is nothing
    assert kinds(choice("what colour is the sky", ["green", "red", "black"]), sky) == ["question"]
    assert kinds(choice("what colour is the sky", context="At night."), sky, near=False) == []
    assert kinds(choice("is it +", ["+", "-"]), choice("is it +", ["+", "="])) == ["question"]


def test_free_answers_match_by_the_question():
    apples = problem("Tom has 3 apples and eats two. How many are left?")
    assert kinds(problem("tom has three apples , and eats 2 . how many are left ?"), apples) == ["exact"]
    assert kinds(problem("Tom has 9 apples and eats 5. How many are left?"), apples) == ["numbers"]
    # What it is called does not matter, the numbers do.
    longer = (
        "Tom went to the big market on Monday morning. He has {} apples and eats {}. How many{} "
        "apples are left?"
    )
    assert kinds(problem(longer.format(3, 2, " of the")), problem(longer.format(3, 2, ""))) == ["near"]
    assert kinds(problem(longer.format(3, 4, " of the")), problem(longer.format(3, 2, ""))) == []
    options = {"choices": ["1", "2"], "label": 0}
    assert kinds(
        problem("Is 7 more than 5?", **options), problem("is 7 more than 5", choices=["4", "9"], label=0)
    ) == ["exact"]


SAME = [
    ("is a cougar and a mountain lion the same thing", "are a cougar and a mountain lion the same"),
    (
        "If a lake is polluted, which organism would be harmed most?",
        "If a lake is polluted, which organisms would be harmed most?",
    ),
    ("do dairy cows have to be pregnant to produce milk", "do cows have to be pregnant to produce milk"),
]
OTHER = [
    ("is there going to be a new season of rake", "is there going to be a new season of fargo"),
    ("can i turn right on a red light in canada", "can i turn right on a red light in quebec"),
    ("is there going to be a season 4 of the strain", "is there going to be a season 5 of the strain"),
    (
        "do dairy cows have to be pregnant to produce milk",
        "do dairy cows not have to be pregnant to produce milk",
    ),
    ("Where are the most reactive metals in the table?", "Where are the most reactive gases in the table?"),
    (
        "What colour is the old bruve of the hill?",
        "What colour is the old bramd of the hill?",
    ),  # a template of the built-in world
]


@pytest.mark.parametrize(("one", "other"), SAME)
def test_near(one, other):
    assert kinds(choice(one), choice(other)) == ["near"]
    assert kinds(choice(other), choice(one)) == ["near"]
    assert kinds(choice(one), choice(other), near=False) == []


@pytest.mark.parametrize(("one", "other"), OTHER)
def test_not_near(one, other):
    assert kinds(choice(one), choice(other)) == []
    assert kinds(choice(other), choice(one)) == []


def test_no_near_duplicate_is_missed():
    """The index by rare shingles finds what comparing all pairs finds."""
    rng = random.Random(0)
    texts = [" ".join(rng.choices("abcde", k=rng.randint(2, 9))) for _ in range(150)]
    rows = [choice(text, ["x", "y"], id=str(i)) for i, text in enumerate(texts)]
    train, evaluation = rows[:75], rows[75:]
    made = [leakage._Row(row, free=False) for row in rows]
    expected = set()
    for one in range(75):
        for other in range(75, 150):
            a, b = made[one].shingles, made[other].shingles
            similar = len(a & b) / len(a | b) >= leakage.SIMILARITY and leakage._near(made[one], made[other])
            expected |= {(str(one), str(other))} if similar and made[one].key != made[other].key else set()
    report = leakage.check(train, evaluation)
    assert len(expected) > 10
    assert {(m.train_id, m.eval_id) for m in report.matches if m.kind == "near"} == expected


# ---- instructions


def instruction(text, id="i"):
    return {"id": id, "task": "", "mix": "file", "instruction": text, "input": "", "output": "whatever"}


STRANGE = {"instruction": "Say it.", "output": "x", "input": "", "mix": "m", "answer": "red", "stem": "y"}
"""Keys that mean something in rows of another kind."""


@pytest.mark.parametrize("key", STRANGE)
def test_the_kind_of_a_row_is_that_of_its_task_whatever_keys_it_has(key):
    row, other = choice("What colour has the sky?"), choice("What colour has the sky?", ["x", "y"])
    extra = {key: STRANGE[key]}
    for train, evaluation in ((row | extra, row), (row, row | extra), (row | extra, row | extra)):
        assert kinds(train, evaluation) == ["exact"]
    assert kinds(row | extra, other) == kinds(row, other | extra) == ["question"]
    sums = problem("What is 2 + 2 of 7?")
    assert kinds(sums | extra | {"answer": "3"}, sums) == ["exact"]


def test_instructions_hold_questions():
    sky = choice("What colour has the sky?")
    ask = (
        "Please choose the correct answer to the question: {}\n\nAnswer1: {} Answer2: {} Answer3: "
        "{}\n\nAnswer format: answer1/answer2"
    )
    assert kinds(instruction(ask.format("what colour has the sky?", "green", "Red", "blue")), sky) == [
        "exact"
    ]
    assert kinds(instruction(ask.format("what colour has the sky?", "green", "Red", "black")), sky) == [
        "question"
    ]
    assert kinds(instruction(ask.format("what colour has the sea?", "green", "red", "blue")), sky) == []
    assert (
        kinds(instruction(ask.format("what colour, then, has the clear sky?", "green", "red", "blue")), sky)
        == []
    )
    short = choice("sky", ["to fly", "to swim"])
    assert (
        kinds(instruction(ask.format("what colour has it?", "the", "sky", "sea")), short) == []
    )  # an option is not a question
    assert kinds(
        instruction("Tom has 3 apples.\nHe eats 2. How many are left?"),
        problem("Tom has 3 apples. He eats two. How many are left?"),
    ) == ["exact"]
    assert kinds(
        instruction("Tom has 4 apples. He eats 2. How many are left?"),
        problem("Tom has 3 apples. He eats two. How many are left?"),
    ) == ["numbers"]


def test_instructions_made_of_test_questions_are_found(datasets_folder):
    """What the MoA repository's math validation file is made of, and its neighbours from the train split."""
    test, train = (
        load(datasets_folder / "gsm8k/test.jsonl"),
        load(datasets_folder / "gsm8k/train.jsonl")[:1000],
    )
    rows = [instruction(row["question"] + "\n", row["id"]) for row in (*test[:486], *train)]
    evaluation = [
        row for task in ("gsm8k", "svamp", "singleeq") for row in load(datasets_folder / task / "test.jsonl")
    ]
    report = leakage.check(rows, evaluation)
    assert report.leaked == set(range(486))
    assert Counter(m.kind for m in report.matches if m.kind != "numbers") == {"exact": 486}
    assert {m.eval_task for m in report.matches if m.kind == "exact"} == {"gsm8k"}


def test_commonsense_instructions_are_found_with_shuffled_choices(datasets_folder):
    rng, rows, evaluation = random.Random(0), [], []
    for file in ("arc_challenge/test", "boolq/validation", "siqa/validation"):
        some = load(datasets_folder / f"{file}.jsonl")[:300]
        evaluation += some
        for row in some[::5]:
            stem = " ".join(filter(None, [row.get("context"), row["question"]]))
            options = " ".join(
                f"Answer{i + 1}: {text}"
                for i, text in enumerate(rng.sample(row["choices"], len(row["choices"])))
            )
            rows.append(
                instruction(
                    f"Please choose the correct answer to the question: {stem}\n\n{options}\n\nAnswer "
                    "format: x",
                    row["id"],
                )
            )
    report = leakage.check(rows, evaluation)
    assert {m.train for m in report.matches if m.kind == "exact" and m.train_id == m.eval_id} == set(
        range(180)
    )


# ---- what is done about it

TRAIN = [
    choice("Why?", id="a"),
    choice("What colour is the sky?", id="b"),
    problem("Tom has 4 dogs. And cats?", id="c"),
    choice("Who?", id="d"),
]
EVAL = [
    choice("What colour is the sky?", id="e"),
    choice("Who?", ["x", "y"], id="f"),
    problem("Tom has 5 dogs. And cats?", id="g"),
]


def test_modes():
    report = leakage.check(TRAIN, EVAL)
    assert [row["id"] for row in leakage.apply(report, TRAIN, "drop")] == ["a", "c"]
    assert leakage.apply(report, TRAIN, "mark") == TRAIN
    with pytest.raises(
        ConfigError,
        match=r"leakage=refuse: 2 of 4 training rows.*arc_easy in arc_easy: 1 exact, 1 question.*First: b "
        r"= e \(exact: 'What",
    ):
        leakage.apply(report, TRAIN, "refuse")
    with pytest.raises(ConfigError, match=r"leakage='dorp'.*Did you mean 'drop'"):
        leakage.apply(report, TRAIN, "dorp")
    with pytest.raises(ConfigError, match="nothing is left to train on"):
        leakage.apply(leakage.check(TRAIN[1:2], EVAL), TRAIN[1:2], "drop")
    assert (
        leakage.apply(leakage.check(TRAIN[2:3], EVAL), TRAIN[2:3], "refuse") == TRAIN[2:3]
    )  # other numbers are another question


def test_rows_taken_twice_leave_twice():
    rows = [*TRAIN, *TRAIN]
    report = leakage.check(rows, EVAL)
    assert report.leaked == {1, 3, 5, 7}
    assert [row["id"] for row in leakage.apply(report, rows, "drop")] == ["a", "c", "a", "c"]


def test_record_is_plain_and_complete():
    record = leakage.check(TRAIN, EVAL).record("drop")
    assert json.loads(json.dumps(record)) == record
    assert (record["train_rows"], record["eval_rows"], record["leaked"], record["removed"]) == (4, 3, 2, 2)
    assert record["pairs"] == [
        {
            "train_task": "arc_easy",
            "eval_task": "arc_easy",
            "exact": 1,
            "question": 1,
            "near": 0,
            "numbers": 0,
            "eval_rows": 2,
        },
        {
            "train_task": "gsm8k",
            "eval_task": "gsm8k",
            "exact": 0,
            "question": 0,
            "near": 0,
            "numbers": 1,
            "eval_rows": 0,
        },
    ]
    assert [(m["train_id"], m["eval_id"], m["kind"]) for m in record["matches"]] == [
        ("b", "e", "exact"),
        ("d", "f", "question"),
        ("c", "g", "numbers"),
    ]
    assert leakage.check(TRAIN, EVAL).record("mark")["removed"] == 0


def test_numbers_are_counted_in_full_and_listed_in_part():
    rows = [problem(f"Tom has {i} dogs. And cats?", id=str(i)) for i in range(100, 150)]
    record = leakage.check(rows, EVAL).record("drop")
    assert record["pairs"][0]["numbers"] == 50
    assert len(record["matches"]) == leakage.LISTED


@pytest.mark.parametrize("task", ["arc_easy", "boolq", "gsm8k"])
def test_builtin_splits_do_not_leak(task):
    from moabench.benchmarks import world

    rows = {split: [{**row, "task": task} for row in world.rows(task, split)] for split in ("train", "test")}
    assert not leakage.check(rows["train"], rows["test"], near=False).leaked
