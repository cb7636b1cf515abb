"""Rows of each source: published counts of the real ARC, our format from the hub's, and one clear error for
whatever is broken.

pytest tests/benchmarks/test_data.py
"""

import json

import datasets
import pytest

from moabench.benchmarks import tasks
from moabench.benchmarks.config.sections import DataConfig
from moabench.benchmarks.tasks import hub
from moabench.benchmarks.tasks import rows as data
from moabench.methods.spec import ConfigError

ROW = {"id": "a", "question": "Why?", "choices": ["one", "two"], "label": 1}


def local(root, **kwargs):
    return DataConfig("local", root=str(root), **kwargs)


def write(folder, *lines, split="train", task="arc_easy"):
    (folder / task).mkdir(exist_ok=True)
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (folder / task / f"{split}.jsonl").write_text(text + "\n")
    return local(folder)


# set: (train, validation, test) as they are published (docs/tasks.md); the public train sets are these and
# train_overlap.jsonl
COUNTS = {
    "arc_easy": (2248, 570, 2376),
    "arc_challenge": (1119, 299, 1172),
    "openbookqa": (4936, 500, 500),
    "boolq": (9426, 3270, None),
    "boolq_passage": (2000, 3270, None),
    "piqa": (5599, 1838, None),
    "siqa": (33410, 1954, None),
    "winogrande": (10234, 1267, None),
    "hellaswag": (None, 10042, None),
    "commonsenseqa": (9741, 1221, None),
    "gsm8k": (7473, None, 1319),
    "aqua": (None, 254, 254),
    "mathqa": (None, 4475, 2985),
    "svamp": (None, None, 1000),
    "addsub": (None, None, 395),
    "singleeq": (None, None, 508),
    "multiarith": (None, None, 600),
    "mawps": (579, 237, 238),
    "mawps_asdiv_a": (569, None, None),
    "asdiv": (None, None, 2305),
}


@pytest.mark.parametrize("task", COUNTS)
def test_every_local_file_has_its_published_count(datasets_folder, task):
    config = local(datasets_folder)
    assert data.splits(task, config) == tuple(
        split for split, count in zip(data.SPLITS, COUNTS[task], strict=True) if count
    )
    for split, count in zip(data.SPLITS, COUNTS[task], strict=True):
        if count:
            rows = data.load_rows(task, split, config)
            assert len(rows) == count
            assert {row["task"] for row in rows} == {tasks.SETS.get(task, task)}
            assert len({row["id"] for row in rows}) == count


def test_every_public_task_is_in_the_table():
    assert set(COUNTS) == {name for name in tasks.names() if not tasks.get(name).unavailable("local")} | set(
        tasks.SETS
    )


@pytest.mark.parametrize(
    "task", [name for name in tasks.names() if not tasks.get(name).unavailable("builtin")]
)
def test_builtin_rows_have_the_format(task):
    assert data.splits(task, DataConfig("builtin")) == data.SPLITS
    for split in data.SPLITS:
        rows = data.load_rows(task, split, DataConfig("builtin", train_limit=7, eval_limit=5))
        assert len(rows) == (7 if split == "train" else 5)
        for row in rows:
            assert data._checked(row, tasks.get(task), "here") == row
            assert row["skill"]
            assert row["domain"]
            assert len(row["choices"]) == len(set(row["choices"])), (
                row
            )  # every protocol needs choices, free answers too


def test_limits_take_the_first_rows(tmp_path):
    config = write(tmp_path, *[{**ROW, "id": str(i)} for i in range(5)])
    rows = data.load_rows("arc_easy", "train", local(tmp_path, train_limit=2, eval_limit=1))
    assert [row["id"] for row in rows] == ["0", "1"]
    assert len(data.load_rows("arc_easy", "train", config)) == 5


BROKEN = {
    "not JSON": ('{"question": "Why?",', "not JSON"),
    "no object": ("[1, 2]", "expected a JSON object, got list"),
    "no question": ({k: v for k, v in ROW.items() if k != "question"}, "key 'question' is missing"),
    "near key": ({**{k: v for k, v in ROW.items() if k != "label"}, "labels": 1}, "Did you mean 'labels'?"),
    "label as text": ({**ROW, "label": "1"}, "label='1': expected a whole number"),
    "label as bool": ({**ROW, "label": True}, "label=True: expected a whole number"),
    "label too large": ({**ROW, "label": 2}, "label=2: expected 0 to 1"),
    "label negative": ({**ROW, "label": -1}, "label=-1: expected 0 to 1"),
    "one choice": ({**ROW, "choices": ["one"], "label": 0}, "two or more"),
    "empty choice": ({**ROW, "choices": ["one", " "]}, "two or more non-empty"),
    "choices as text": ({**ROW, "choices": "one two"}, "expected a list of texts"),
    "empty question": ({**ROW, "question": " "}, "expected text"),
    "skill as a number": ({**ROW, "id": "b", "skill": 3}, "skill=3: expected text"),
    "domain as an object": ({**ROW, "id": "b", "domain": {"a": 1}}, "domain={'a': 1}: expected text"),
    "answer as a number": ({**ROW, "id": "b", "answer": 1}, "answer=1: expected text"),
    "id as a list": ({**ROW, "id": ["b"]}, "id=['b']: expected text or a whole number"),
    "id as a bool": ({**ROW, "id": True}, "id=True: expected text or a whole number"),
    "id twice": (ROW, "id='a': line 1 has it too"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_line_is_named_by_file_and_number(tmp_path, case):
    line, reason = BROKEN[case]
    config = write(tmp_path, ROW, "", line, ROW)
    with pytest.raises(ConfigError) as error:
        data.load_rows("arc_easy", "train", config)
    assert str(tmp_path / "arc_easy" / "train.jsonl") + ", line 3:" in str(error.value)
    assert reason in str(error.value)


NUMBER = {"id": "n", "question": "2 + 2?", "answer": "4"}
LETTER = {**ROW, "answer": "B"}
BROKEN_BY_TASK = {
    "no number": ("gsm8k", NUMBER, {"answer": "four"}, "answer='four': expected a number"),
    "thousands comma": ("gsm8k", NUMBER, {"answer": "1,250"}, "answer='1,250': expected a number"),
    "infinite": ("svamp", NUMBER, {"answer": "inf"}, "expected a number"),
    "answer as a number": ("addsub", NUMBER, {"answer": 4}, "answer=4: expected text"),
    "no answer": ("mawps", NUMBER, {"answer": None}, "answer=None: expected text"),
    "answer missing": ("multiarith", NUMBER, {"answer": ...}, "key 'answer' is missing"),
    "half of the choices": ("singleeq", NUMBER, {"choices": ["4", "5"]}, "key 'label' is missing"),
    "other letter": ("aqua", LETTER, {"answer": "A"}, "answer='A': expected 'B', the letter of label 1"),
    "no letter": ("aqua", LETTER, {"answer": "two"}, "answer='two': expected 'B'"),
    "letter missing": ("mathqa", LETTER, {"answer": ...}, "key 'answer' is missing"),
    "no options": ("aqua", LETTER, {"choices": ...}, "key 'choices' is missing"),
    "truths in another order": (
        "boolq",
        {**ROW, "choices": ["false", "true"]},
        {"choices": ["true", "false"]},
        "in this order",
    ),
    "three solutions": ("piqa", ROW, {"choices": ["a", "b", "c"]}, "3 choices: expected at most 2"),
    "six letters": ("aqua", LETTER, {"choices": list("abcdef")}, "6 choices: expected at most 5"),
    "no blank": (
        "winogrande",
        {**ROW, "question": "so _ left"},
        {"question": "so left"},
        "expected a blank '_'",
    ),
    "context as a list": ("siqa", {**ROW, "context": "Ann left."}, {"context": ["Ann"]}, "expected text"),
    "solution as a number": ("gsm8k", NUMBER, {"solution": 4}, "solution=4: expected text"),
}


@pytest.mark.parametrize("case", BROKEN_BY_TASK)
def test_a_row_is_checked_by_the_kind_of_its_task(tmp_path, case):
    task, good, change, reason = BROKEN_BY_TASK[case]
    bad = {key: value for key, value in {**good, **change}.items() if value is not ...}
    config = write(tmp_path, good, bad, split="test", task=task)
    assert data.load_rows(task, "test", local(tmp_path, eval_limit=1))[0]["task"] == task
    with pytest.raises(ConfigError) as error:
        data.load_rows(task, "test", config)
    assert str(tmp_path / task / "test.jsonl") + ", line 2:" in str(error.value)
    assert reason in str(error.value)


def test_keys_of_tables_may_be_missing_or_null(tmp_path):
    nothing = dict.fromkeys(("id", "skill", "domain", "answer"))
    config = write(tmp_path, ROW, {**ROW, **nothing}, {**ROW, "id": 7, "skill": "s", "domain": "d"})
    assert [row["id"] for row in data.load_rows("arc_easy", "train", config)] == [
        "a", "arc_easy-train-1", "7"
    ]  # fmt: skip


GOLD = ["7", "-3", "1250.5", "0.5", "007", "1000000"]
UNSAID = [
    ".5",
    "1e3",
    "+5",
    "5.",
    " 7 ",
    "7\n",
    "\u0663",
    "\uff17",
    "1_0",
    "nan",
    "9" * 400,
    "1,000",
    "\u22127",
]
"""Numbers for Python that a response cannot say, or is not found right for saying."""


@pytest.mark.parametrize("answer", [*GOLD, *UNSAID])
def test_a_gold_answer_is_right_for_its_own_text(tmp_path, answer):
    config = write(tmp_path, {**NUMBER, "answer": answer}, split="test", task="gsm8k")
    if answer in UNSAID:
        with pytest.raises(ConfigError, match=r"test.jsonl, line 1: answer=.*expected a number in digits"):
            data.load_rows("gsm8k", "test", config)
        return
    row, form = data.load_rows("gsm8k", "test", config)[0], tasks.get("gsm8k").form()
    found = form.extract(form.answer(row), row)
    assert form.correct(found.paper, row) and form.correct(found.strict, row)


def test_numbers_of_public_sets_are_written_in_digits():
    given = {
        " 1,234.0": "1234", ".5": "0.5", "+5": "5", "5.": "5", "1e3": "1000", "2.50": "2.5", 3.0: "3",
        "-.25": "-0.25", "100": "100", "1E-3": "0.001", "1e999999": "1e999999", "no": "no", "nan": "nan",
    }  # fmt: skip
    assert {key: hub._number(key) for key in given} == given


@pytest.mark.parametrize("rows", [1, 3])
def test_too_few_rows_to_hold_some_out_are_refused(tmp_path, rows):
    write(tmp_path, *[{**ROW, "id": str(i)} for i in range(rows)])
    assert not any(data.is_held_out({"task": "arc_easy", "id": str(i)}) for i in range(rows))
    with pytest.raises(ConfigError, match=rf"held_out=True.*lr_grid.*none of the {rows} training rows"):
        data.Reader(local(tmp_path, held_out=True)).reported("arc_easy")


def test_sets_that_are_no_task_take_the_form_of_one(tmp_path):
    write(tmp_path, {**NUMBER, "answer": "Ann"}, task="asdiv")  # names and clock times are among its answers
    assert data.load_rows("asdiv", "train", local(tmp_path))[0] == {
        **NUMBER,
        "answer": "Ann",
        "task": "mawps",
    }
    assert data.splits("asdiv", local(tmp_path)) == ("train",)
    write(tmp_path, {**NUMBER, "answer": "Ann"}, task="mawps_asdiv_a")
    with pytest.raises(ConfigError, match="expected a number"):
        data.load_rows("mawps_asdiv_a", "train", local(tmp_path))
    with pytest.raises(ConfigError, match=r"only data\.source=local has it"):
        data.load_rows("asdiv", "train", DataConfig("hub"))


def test_text_that_is_not_utf8_is_named(tmp_path):
    config = write(tmp_path, ROW)
    (tmp_path / "arc_easy" / "train.jsonl").write_bytes(json.dumps(ROW).encode() + b"\n\xff\xfe\n")
    with pytest.raises(ConfigError, match=r"train.jsonl.*not UTF-8"):
        data.load_rows("arc_easy", "train", config)


def test_missing_places_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"data.root='.*nowhere'.*no such folder"):
        data.load_rows("arc_easy", "train", local(tmp_path / "nowhere"))
    (tmp_path / "arc_esy").mkdir()
    with pytest.raises(ConfigError, match=r"no folder 'arc_easy'.*Did you mean 'arc_esy'"):
        data.load_rows("arc_easy", "train", local(tmp_path))
    with pytest.raises(
        ConfigError, match=r"test.jsonl: no such file; task arc_easy needs its test split. There: train"
    ):
        data.load_rows("arc_easy", "test", write(tmp_path, ROW))
    with pytest.raises(ConfigError, match="no rows"):
        data.load_rows("arc_easy", "train", write(tmp_path, ""))


def test_unknown_names_get_the_nearest():
    with pytest.raises(ConfigError, match=r"no such task. Did you mean 'arc_easy'"):
        data.load_rows("arc_eazy", "train", DataConfig("builtin"))
    with pytest.raises(ConfigError, match=r"split='tset'.*Did you mean 'test'"):
        data.load_rows("arc_easy", "tset", DataConfig("builtin"))


HUB = {  # task: (public rows, the first in our format but for id and task)
    "arc_easy": (
        [
            {
                "id": "Q1",
                "question": "Why?",
                "choices": {"text": ["x", "y", "z"], "label": ["A", "B", "C"]},
                "answerKey": "C",
            },
            {
                "id": "Q2",
                "question": "How?",
                "choices": {"text": ["x", "y"], "label": ["1", "2"]},
                "answerKey": "1",
            },
        ],
        {"id": "Q1", "question": "Why?", "choices": ["x", "y", "z"], "label": 2},
    ),
    "openbookqa": (
        [
            {
                "id": "7",
                "question_stem": "The sun is",
                "choices": {"text": ["x", "y"], "label": ["A", "B"]},
                "answerKey": "B ",
            }
        ],
        {"id": "7", "question": "The sun is", "choices": ["x", "y"], "label": 1},
    ),
    "boolq": (
        [{"question": "is it so", "passage": "It is so.", "answer": True}],
        {"question": "is it so", "choices": ["false", "true"], "label": 1},
    ),
    "boolq_passage": (
        [{"question": "is it so", "passage": "It -- It is so.", "idx": 0, "label": 0}],
        {"question": "is it so", "context": "It -- It is so.", "choices": ["false", "true"], "label": 0},
    ),
    "piqa": (
        [{"goal": "Cut it", "sol1": "a knife", "sol2": "a spoon", "label": 1}],
        {"question": "Cut it", "choices": ["a knife", "a spoon"], "label": 1},
    ),
    "siqa": (
        [
            {
                "context": "Ann left.",
                "question": "Why?",
                "answerA": "p",
                "answerB": "q",
                "answerC": "r",
                "label": "2\n",
            }
        ],
        {"question": "Why?", "context": "Ann left.", "choices": ["p", "q", "r"], "label": 1},
    ),
    "hellaswag": (
        [
            {
                "ind": 4,
                "activity_label": "Cooking",
                "ctx_a": "[header] A pot [title] Take it.",
                "ctx_b": "then",
                "endings": ["a [step] b.", "c", "d", "e"],
                "label": "3",
            }
        ],
        {"question": "Cooking: A pot. Take it. Then", "choices": ["a b.", "c", "d", "e"], "label": 3},
    ),
    "winogrande": (
        [{"sentence": "Ann saw Bo, so _ left.", "option1": "Ann", "option2": "Bo", "answer": "2"}],
        {"question": "Ann saw Bo, so _ left.", "choices": ["Ann", "Bo"], "label": 1},
    ),
    "gsm8k": (
        [{"question": "1000 + 250?", "answer": "It is <<1000+250=1250>>1250.\n#### 1,250"}],
        {"question": "1000 + 250?", "answer": "1250", "solution": "It is <<1000+250=1250>>1250."},
    ),
    "aqua": (
        [
            {
                "question": "2 + 2?",
                "options": ["A)3", "B)f(2)", "C)4", "D)5", "E)none"],
                "rationale": "add",
                "correct": "C",
            }
        ],
        {
            "question": "2 + 2?",
            "choices": ["3", "f(2)", "4", "5", "none"],
            "label": 2,
            "answer": "C",
            "solution": "add",
        },
    ),
    "mathqa": (
        [
            {
                "Problem": "2 + 2 ?",
                "Rationale": "add",
                "options": options,
                "correct": "d",
                "annotated_formula": "add(2,2)",
                "linear_formula": "add(n0,n1)|",
                "category": "general",
            }
            for options in (
                "a ) 1 , b ) 2 , c ) 3 , 000 , d ) 4 , e ) none of these",
                "['a ) 1', 'b ) 2', 'c ) 3 , 000', 'd ) 4', 'e ) none of these']",
            )
        ],
        {
            "question": "2 + 2 ?",
            "choices": ["1", "2", "3 , 000", "4", "none of these"],
            "label": 3,
            "answer": "D",
            "solution": "add",
            "category": "general",
        },
    ),
    "svamp": (
        [
            {
                "ID": "chal-1",
                "Body": "Ann has 3 hens",
                "Question": "How many?",
                "Equation": "3.0",
                "Answer": "3.0",
                "Type": "Addition",
            }
        ],
        {
            "id": "chal-1",
            "question": "Ann has 3 hens. How many?",
            "answer": "3",
            "equation": "3.0",
            "type": "Addition",
        },
    ),
    "addsub": ([{"input": " 2 + 2? ", "output_answer": "4.0"}], {"question": "2 + 2?", "answer": "4"}),
    "multiarith": ([{"question": " 2 + 2? ", "final_ans": "4"}], {"question": "2 + 2?", "answer": "4"}),
    "mawps": (
        [{"id": "m__1", "question": "2 + 2?", "chain": "", "result": "1,000", "equation": "x=2+2"}],
        {"id": "m__1", "question": "2 + 2?", "answer": "1000", "equation": "x=2+2"},
    ),
}
HUB |= {"arc_challenge": HUB["arc_easy"], "commonsenseqa": HUB["arc_easy"], "singleeq": HUB["addsub"]}


@pytest.fixture
def fake_hub(tmp_path, monkeypatch):
    """fake_hub(task, rows) lays out a folder as the hub has it; `datasets` reads it instead. Gives the list
    of what is asked for."""
    real, asked = datasets.load_dataset, []

    def load_dataset(path, name=None, *, split, revision):
        asked.append((path, name, split, revision))
        folder = tmp_path / "hub" / path / (name or "default")
        files = {file.stem: str(file) for file in folder.iterdir()}
        return real("parquet", data_files=files, split=split, cache_dir=str(tmp_path / "cache"))

    def lay(task, rows):
        hub = tasks.get(task).facts["hub"]
        folder = tmp_path / "hub" / hub["path"] / (hub.get("name") or "default")
        folder.mkdir(parents=True)
        for split in {part for theirs in data._hub_splits(hub).values() for part in theirs.split("+")}:
            datasets.Dataset.from_list(rows).to_parquet(str(folder / f"{split}.parquet"))
        return asked

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return lay


@pytest.mark.parametrize("task", HUB)
def test_hub_rows_come_pinned_and_in_our_format(task, fake_hub):
    rows, expected = HUB[task]
    hub = tasks.get(task).facts["hub"]
    revision = hub["revision"] or "f" * 40
    config = DataConfig("hub", revisions={} if hub["revision"] else {task: revision})
    asked = fake_hub(task, rows)
    for split in data.splits(task, config):
        theirs = data._hub_splits(hub)[split]
        found = data.load_rows(task, split, config)
        assert found[0] == {"id": f"{task}-{split}-0", **expected, "task": task}
        assert len(found) == len(rows) * len(theirs.split("+"))
        assert asked[-1] == (hub["path"], hub.get("name"), theirs, revision)
    assert (
        len(
            data.load_rows(
                task, split, DataConfig("hub", eval_limit=1, train_limit=1, revisions=config.revisions)
            )
        )
        == 1
    )


def test_every_task_that_the_hub_has_is_tested():
    assert set(HUB) == {name for name in tasks.names() if not tasks.get(name).unavailable("hub")}


@pytest.mark.parametrize("task", HUB)
def test_hub_revisions_are_commits_or_asked_for(task, monkeypatch):
    revision = tasks.get(task).facts["hub"]["revision"]
    if revision:
        assert len(revision) == 40 and set(revision) <= set("0123456789abcdef")
        return
    monkeypatch.setattr(datasets, "load_dataset", None)  # not reached
    with pytest.raises(ConfigError, match=rf"Name one: data.revisions.{task}="):
        data.load_rows(task, "test", DataConfig("hub"))


def test_a_revision_of_the_users_wins(fake_hub):
    asked = fake_hub("piqa", HUB["piqa"][0])
    data.load_rows("piqa", "validation", DataConfig("hub", revisions={"piqa": "main"}))
    assert asked[0][3] == "main"


def test_hub_splits_without_labels_are_not_offered():
    config = DataConfig("hub")
    assert data.splits("boolq", config) == ("train", "validation")
    assert data.splits("svamp", config) == ("test",)
    with pytest.raises(
        ConfigError, match=r"google/boolq has no labelled test split. There: train, validation"
    ):
        data.load_rows("boolq", "test", config)


HIDDEN = {
    "piqa": ({"label": -1}, "label=-1: expected 0 to 1"),
    "winogrande": ({"answer": ""}, "answer='': expected one of 1, 2"),
    "hellaswag": ({"label": ""}, "label='': expected one of 0, 1, 2, 3"),
    "arc_easy": ({"answerKey": "F"}, "answerKey='F': expected one of A, B, C"),
    "gsm8k": ({"answer": "It is 5."}, "expected a solution, #### and a number"),
    "multiarith": ({"final_ans": "five"}, "answer='five': expected a number"),
}


@pytest.mark.parametrize("task", HIDDEN)
def test_a_hub_row_without_a_label_is_named(task, fake_hub):
    change, reason = HIDDEN[task]
    good = HUB[task][0][0]
    fake_hub(task, [good, {**good, **change}])
    with pytest.raises(ConfigError) as error:
        data.load_rows(task, tasks.get(task).split, DataConfig("hub"))
    assert f"{tasks.get(task).split} row 1: " in str(error.value)
    assert reason in str(error.value)


def test_hub_out_of_reach_is_one_error_and_no_other_source(monkeypatch):
    def offline(*args, **kwargs):
        raise ConnectionError("Couldn't reach the Hub\nlong story")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(ConfigError) as error:
        data.load_rows("arc_easy", "test", DataConfig("hub"))
    assert "allenai/ai2_arc" in str(error.value)
    assert "ConnectionError: Couldn't reach the Hub)" in str(error.value)


def test_hub_with_other_columns_is_named(monkeypatch):
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda *a, **k: datasets.Dataset.from_list([{"question": "Why?", "answer": 1}]),
    )
    with pytest.raises(
        ConfigError, match=r"ai2_arc, test row 0: no column 'choices'; the columns are question, answer"
    ):
        data.load_rows("arc_easy", "test", DataConfig("hub"))


@pytest.mark.parametrize("source", ["local", "hub"])
def test_what_only_the_world_has_says_so(source, tmp_path):
    config = DataConfig(source, root=str(tmp_path) if source == "local" else None)
    with pytest.raises(
        ConfigError, match=rf"conflict_first with data.source={source}.*Expected data.source=builtin\."
    ):
        data.load_rows("conflict_first", "test", config)
    with pytest.raises(
        ConfigError, match=r"boolq_passage with data.source=builtin.*Expected data.source=local or hub\."
    ):
        data.load_rows("boolq_passage", "validation", DataConfig("builtin"))
