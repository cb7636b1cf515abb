"""Rows of each source: published counts of the real ARC, our format from the hub's, and one clear error for whatever is broken.

pytest tests/benchmarks/test_data.py
"""

import json

import datasets
import pytest

from moabench.benchmarks import data, tasks
from moabench.benchmarks.config import DataConfig
from moabench.methods.spec import ConfigError

ROW = {"id": "a", "question": "Why?", "choices": ["one", "two"], "label": 1}


def local(root, **kwargs):
    return DataConfig("local", root=str(root), **kwargs)


def write(folder, *lines, split="train", task="arc_easy"):
    (folder / task).mkdir(exist_ok=True)
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (folder / task / f"{split}.jsonl").write_text(text + "\n")
    return local(folder)


@pytest.mark.parametrize(
    ("task", "split", "count"),
    [  # public counts; 3 train rows of ARC-Easy that repeat test rows are kept apart in train_overlap.jsonl
        ("arc_easy", "train", 2251 - 3),
        ("arc_easy", "validation", 570),
        ("arc_easy", "test", 2376),
        ("arc_challenge", "train", 1119),
        ("arc_challenge", "validation", 299),
        ("arc_challenge", "test", 1172),
    ],
)
def test_real_arc_has_the_published_counts(datasets_folder, task, split, count):
    rows = data.load_rows(task, split, local(datasets_folder))
    assert len(rows) == count
    assert all(0 <= row["label"] < len(row["choices"]) for row in rows)
    assert {row["task"] for row in rows} == {task}


@pytest.mark.parametrize("task", tasks.names())
def test_builtin_rows_have_the_format(task):
    for split in data.SPLITS:
        rows = data.load_rows(task, split, DataConfig("builtin", train_limit=7, eval_limit=5))
        assert len(rows) == (7 if split == "train" else 5)
        for row in rows:
            assert data._checked(row, "here", "x") == row
            assert row["skill"]


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
    "free answer": ({"question": "2 + 2?", "answer": "4"}, "free 'answer'"),
    "label as text": ({**ROW, "label": "1"}, "label='1': expected a whole number"),
    "label as bool": ({**ROW, "label": True}, "label=True: expected a whole number"),
    "label too large": ({**ROW, "label": 2}, "label=2: expected 0 to 1"),
    "label negative": ({**ROW, "label": -1}, "label=-1: expected 0 to 1"),
    "one choice": ({**ROW, "choices": ["one"], "label": 0}, "two or more"),
    "empty choice": ({**ROW, "choices": ["one", " "]}, "two or more non-empty"),
    "choices as text": ({**ROW, "choices": "one two"}, "expected a list of texts"),
    "empty question": ({**ROW, "question": " "}, "expected text"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_line_is_named_by_file_and_number(tmp_path, case):
    line, reason = BROKEN[case]
    config = write(tmp_path, ROW, "", line, ROW)
    with pytest.raises(ConfigError) as error:
        data.load_rows("arc_easy", "train", config)
    assert str(tmp_path / "arc_easy" / "train.jsonl") + ", line 3:" in str(error.value)
    assert reason in str(error.value)


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
    with pytest.raises(ConfigError, match=r"test.jsonl: no such file; task arc_easy needs its test split. There: train"):
        data.load_rows("arc_easy", "test", write(tmp_path, ROW))
    with pytest.raises(ConfigError, match="no rows"):
        data.load_rows("arc_easy", "train", write(tmp_path, ""))


def test_unknown_names_get_the_nearest():
    with pytest.raises(ConfigError, match=r"no such task. Did you mean 'arc_easy'"):
        data.load_rows("arc_eazy", "train", DataConfig("builtin"))
    with pytest.raises(ConfigError, match=r"split='tset'.*Did you mean 'test'"):
        data.load_rows("arc_easy", "tset", DataConfig("builtin"))


@pytest.mark.parametrize("source", ["local", "hub"])
def test_addsub_says_that_only_the_world_gives_it_choices(source, tmp_path):
    config = DataConfig(source, root=str(tmp_path) if source == "local" else None)
    with pytest.raises(ConfigError, match=rf"addsub with data.source={source}.*no choices.*Expected data.source=builtin\."):
        data.load_rows("addsub", "test", config)


HUB_ROWS = [
    {"id": "Q1", "question": "Why?", "choices": {"text": ["x", "y", "z"], "label": ["A", "B", "C"]}, "answerKey": "C"},
    {"id": "Q2", "question": "How?", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "1"},
]


def test_hub_rows_come_pinned_and_in_our_format(monkeypatch):
    asked = []

    def fake(*args, **kwargs):
        asked.append((args, kwargs))
        return datasets.Dataset.from_list(HUB_ROWS)

    monkeypatch.setattr(datasets, "load_dataset", fake)
    rows = data.load_rows("arc_challenge", "test", DataConfig("hub"))
    assert rows[0] == {"id": "Q1", "question": "Why?", "choices": ["x", "y", "z"], "label": 2, "task": "arc_challenge"}
    assert rows[1]["label"] == 0
    assert asked == [
        (("allenai/ai2_arc", "ARC-Challenge"), {"split": "test", "revision": tasks.get("arc_challenge").facts["hub"]["revision"]})
    ]
    assert len(data.load_rows("arc_challenge", "test", DataConfig("hub", eval_limit=1))) == 1


def test_hub_out_of_reach_is_one_error_and_no_other_source(monkeypatch):
    def offline(*args, **kwargs):
        raise ConnectionError("Couldn't reach the Hub\nlong story")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(ConfigError) as error:
        data.load_rows("arc_easy", "test", DataConfig("hub"))
    assert "allenai/ai2_arc" in str(error.value)
    assert "ConnectionError: Couldn't reach the Hub)" in str(error.value)


def test_hub_with_other_columns_is_named(monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: datasets.Dataset.from_list([{"question": "Why?", "answer": 1}]))
    with pytest.raises(ConfigError, match=r"ai2_arc, test row 0: no column 'id'; the columns are question, answer"):
        data.load_rows("arc_easy", "test", DataConfig("hub"))


@pytest.mark.parametrize("name", tasks.names())
def test_every_task_file_states_its_facts(name):
    task = tasks.get(name)
    assert 0 < task.chance < 1
    assert task.split in data.SPLITS
    assert task.facts["protocol"]
    assert task.facts["version"] >= 1
    hub = task.facts.get("hub")
    assert task.unavailable("hub") or (len(hub["revision"]) == 40 and {"question", "choices", "answer"} <= hub["fields"].keys())
    assert task.prompt(ROW) + task.answer(ROW) == "Question: Why?\nAnswer: two"
