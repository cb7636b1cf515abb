"""Mixes: every YAML, the real train splits, weights and caps, instruction files, and one error for whatever
is wrong.

pytest tests/benchmarks/test_mixes.py
"""

import json
import subprocess
from collections import Counter
from types import SimpleNamespace

import datasets
import pytest
import yaml

from moabench.benchmarks.config.choices import CONF
from moabench.benchmarks.config.mix import MixConfig
from moabench.benchmarks.config.sections import DataConfig
from moabench.benchmarks.data import mixes
from moabench.benchmarks.tasks.rows import Reader
from moabench.methods.spec import ConfigError, build

FILES = sorted((CONF / "mix").glob("*.yaml"))
BUILTIN = DataConfig("builtin")


def shipped(name, **options):
    return build(MixConfig, yaml.safe_load((CONF / "mix" / f"{name}.yaml").read_text()) | options, "mix")


def mix(**options):
    return build(MixConfig, {"name": "test", **options}, "mix")


@pytest.fixture
def local(tmp_path):
    """A folder with two tasks to train on and one without a train split."""
    for task, splits in {
        "arc_easy": ("train", "test"),
        "arc_challenge": ("train",),
        "openbookqa": ("test",),
    }.items():
        (tmp_path / task).mkdir()
        for split in splits:
            rows = [
                {"id": f"{task}-{i}", "question": f"{task} {i}?", "choices": ["a", "b"], "label": i % 2}
                for i in range(10)
            ]
            (tmp_path / task / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return DataConfig("local", root=str(tmp_path))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_file_builds(path):
    content = yaml.safe_load(path.read_text())
    assert content["name"] == path.stem
    if "file" not in content:
        assert shipped(path.stem).name == path.stem
        return
    with pytest.raises(
        ConfigError,
        match=rf"mix: name='{path.stem}', file=null: expected mix.file=path/to/{path.stem}.json, or mix.hub",
    ):
        shipped(path.stem)
    assert shipped(path.stem, file="x.json").published.git_blob
    assert shipped(path.stem, hub={"path": "some/copy", "revision": "0" * 40}).hub.split == "train"


def test_local_mixes_have_the_documented_rows(datasets_folder):
    data = DataConfig("local", root=str(datasets_folder))
    rows, record = mixes.training_rows(shipped("commonsense_mix"), ["boolq"], Reader(data), 0)
    taken = {
        "boolq": 9426,
        "piqa": 5599,
        "siqa": 33410,
        "winogrande": 10234,
        "arc_easy": 2248,
        "arc_challenge": 1119,
        "openbookqa": 4936,
    }
    assert Counter(row["task"] for row in rows) == taken
    assert {task: part["taken"] for task, part in record["parts"].items()} == taken
    assert record["without_train_split"] == ["hellaswag"]
    rows, record = mixes.training_rows(shipped("math_mix"), ["svamp"], Reader(data), 0)
    assert len(rows) == 7473 + 579
    assert record["without_train_split"] == ["aqua"]
    rows, _ = mixes.training_rows(
        shipped("math_mix", parts={"mawps_asdiv_a": {}}), ["svamp"], Reader(data), 0
    )
    assert len(rows) == 569


def test_own_takes_the_evaluated_tasks_that_can_be_trained_on(local):
    rows, record = mixes.training_rows(mix(own=True), ("arc_easy", "openbookqa"), Reader(local), 0)
    assert [row["id"] for row in rows] == [f"arc_easy-{i}" for i in range(10)]
    assert record["without_train_split"] == ["openbookqa"]
    assert record["rows"] == 10
    assert json.loads(json.dumps(record)) == record
    # parts adjust and add
    _, record = mixes.training_rows(
        mix(own=True, parts={"arc_easy": {"cap": 3}, "arc_challenge": {}}), ("arc_easy",), Reader(local), 0
    )
    assert {task: part["taken"] for task, part in record["parts"].items()} == {
        "arc_easy": 3,
        "arc_challenge": 10,
    }
    _, record = mixes.training_rows(
        mix(own=True, parts={"arc_easy": {"weight": 0}}), ("arc_easy", "arc_challenge"), Reader(local), 0
    )
    assert record["rows"] == 10


def test_own_without_anything_to_train_on_names_what_there_is(local):
    with pytest.raises(
        ConfigError,
        match=r"mix=test: none of openbookqa has a train split.*mix=math_mix.*one of arc_challenge, "
        r"arc_easy\.",
    ):
        mixes.training_rows(mix(own=True), ["openbookqa"], Reader(local), 0)
    with pytest.raises(
        ConfigError,
        match=r"mix.parts.openbookqa: no train split with data.source=local.*arc_challenge, arc_easy",
    ):
        mixes.training_rows(mix(parts={"openbookqa": {}}), ["arc_easy"], Reader(local), 0)
    with pytest.raises(ConfigError, match=r"no rows; expected a part with a weight above 0"):
        mixes.training_rows(mix(parts={"arc_easy": {"weight": 0}}), ["arc_easy"], Reader(local), 0)


def counted(local, seed=0, **part):
    rows, record = mixes.training_rows(mix(parts={"arc_easy": part}), ["arc_easy"], Reader(local), seed)
    assert record["parts"]["arc_easy"]["taken"] == len(rows)
    return Counter(row["id"] for row in rows)


def test_weights_and_caps(local):
    assert set(counted(local, weight=2).values()) == {2}
    assert len(counted(local, weight=0.5)) == 5
    assert sorted(counted(local, weight=1.5).values()) == [1] * 5 + [2] * 5
    assert len(counted(local, cap=4)) == 4
    assert len(counted(local, cap=99)) == 10
    assert sorted(counted(local, cap=4, weight=2.5).values()) == [2, 2, 3, 3]


def test_choices_depend_on_the_seed_and_nothing_else(local):
    assert counted(local, 1, cap=5) == counted(local, 1, cap=5)
    assert len({tuple(counted(local, seed, cap=5)) for seed in range(8)}) > 4
    both = mix(parts={"arc_challenge": {}, "arc_easy": {"cap": 5}})
    rows, _ = mixes.training_rows(both, ["arc_easy"], Reader(local), 1)
    assert {row["id"] for row in rows if row["task"] == "arc_easy"} == set(
        counted(local, 1, cap=5)
    )  # other parts change nothing
    order = [row["id"] for row in rows if row["task"] == "arc_easy"]
    assert order == sorted(order)  # the order of the source


def test_builtin_mixes():
    data = DataConfig("builtin", train_limit=5)
    _, record = mixes.training_rows(mix(own=True), ["arc_easy", "arc_challenge"], Reader(data), 0)
    assert {task: part["taken"] for task, part in record["parts"].items()} == {
        "arc_easy": 5,
        "arc_challenge": 5,
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parts": {"arc_eazy": {}}}, r"mix: parts.arc_eazy: no such task. Did you mean 'arc_easy'"),
        ({"parts": {"arc_easy": {"weight": -1}}}, r"parts.arc_easy.weight=-1: expected a number >= 0"),
        ({"parts": {"arc_easy": {"cap": 0}}}, r"parts.arc_easy.cap=0: expected a whole number >= 1"),
        (
            {"parts": {"arc_easy": {"wieght": 1}}},
            r"unknown key 'parts.arc_easy.wieght'.*Did you mean 'weight'",
        ),
        ({"parts": ["arc_easy"]}, r"mix.parts=\['arc_easy'\]"),
        ({"file": "x", "hub": {"path": "a/b", "revision": "c"}}, r"expected one of the two"),
        ({"hub": {"path": "a/b"}}, r"mix.hub.revision \(known: hub.path=a/b\)"),
        ({}, r"expected mix.file"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        mix(**options)


# ---- instruction files

ITEMS = [
    {
        "instruction": "Is it so?\nAnswer: true/false",
        "input": "",
        "output": "the correct answer is true",
        "answer": "true",
    },
    {"instruction": "Add.", "input": "2 and 3", "output": "5"},
    {"instruction": "Say [,].", "output": "]"},
]


def read(path, **options):
    return mixes.training_rows(mix(file=str(path), **options), ["arc_easy"], Reader(BUILTIN), 0)


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(ITEMS),
        json.dumps(ITEMS, indent=4) + "\n",
        "\n".join(map(json.dumps, ITEMS)),
        "\n" + "\n\n".join(map(json.dumps, ITEMS)) + "\n",
    ],
    ids=["list", "indented list", "lines", "lines with gaps"],
)
def test_instruction_files(tmp_path, text):
    (tmp_path / "some.json").write_text(text)
    rows, record = read(tmp_path / "some.json")
    assert [(row["instruction"], row["input"], row["output"]) for row in rows] == [
        (item["instruction"], item.get("input", ""), item["output"]) for item in ITEMS
    ]
    assert [row["id"] for row in rows] == ["test-0", "test-1", "test-2"]
    assert {row["task"] for row in rows} == {""}
    assert record["instructions"]["file"] == "some.json"
    assert str(tmp_path) not in json.dumps(record)


def test_the_published_file_is_told_from_others(tmp_path):
    path = tmp_path / "some.json"
    path.write_text(json.dumps(ITEMS))
    blob = subprocess.run(
        ["git", "hash-object", str(path)], capture_output=True, text=True, check=True
    ).stdout.strip()
    assert read(path, published={"rows": 3, "git_blob": blob})[1]["instructions"]["differs"] == []
    differs = read(path, published={"rows": 4, "git_blob": "0" * 40})[1]["instructions"]["differs"]
    assert differs == [
        "3 rows, the published file has 4",
        f"git blob {blob[:12]}, the published file has 000000000000",
    ]


def test_rows_with_nothing_to_learn_are_left_out_and_counted(tmp_path):
    """The published math_data.json has 3 empty outputs among 3,260."""
    path, empty = tmp_path / "some.json", {"instruction": "x", "input": "y", "output": ""}
    path.write_text(json.dumps([ITEMS[0], empty, ITEMS[1], {**empty, "output": "z", "instruction": "\n"}]))
    rows, record = read(path, published={"rows": 4})
    assert [row["id"] for row in rows] == ["test-0", "test-2"]
    found = record["instructions"]
    assert (found["available"], found["taken"], found["empty"]) == (2, 2, 2)
    assert found["differs"] == []


def test_file_and_parts_add_up(tmp_path, local):
    (tmp_path / "some.json").write_text(json.dumps(ITEMS))
    both = mix(file=str(tmp_path / "some.json"), parts={"arc_easy": {"cap": 2}})
    assert [row["task"] for row in mixes.training_rows(both, [], Reader(local), 0)[0]] == ["arc_easy"] * 2 + [
        ""
    ] * 3


GOOD = json.dumps(ITEMS[0])
BROKEN = {
    "not JSON": (f"{GOOD}\n{{'a'}}", r"line 2: not JSON"),
    "no end": (f"[{GOOD},\n{GOOD}", r"line 2: not JSON \(expected ',' or '\]'"),
    "no end after a comma": (f"[{GOOD},\n", r"line 2: not JSON \(the list has no end\)"),
    "no comma": (f"[{GOOD}\n{GOOD}]", r"line 2: not JSON \(expected ','"),
    "no object": (f"[{GOOD},\n\n3]", r"line 3: expected a JSON object, got int"),
    "missing key": (
        f'[{GOOD},\n{{"instruction": "x", "ouput": "y"}}]',
        r"line 2: key 'output' is missing. Did you mean 'ouput'",
    ),
    "nothing but empty outputs": ('{"instruction": "x", "output": " "}', r"no rows"),
    "wrong type": ('{"instruction": ["x"], "output": "y"}', r"line 1: instruction=\['x'\]: expected text"),
    "input": ('{"instruction": "x", "output": "y", "input": 3}', r"line 1: input=3: expected text"),
    "empty": ("[]", r"no rows"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_malformed_row_is_named_by_file_and_line(tmp_path, case):
    text, message = BROKEN[case]
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(ConfigError, match=rf"bad.json.*{message}"):
        read(tmp_path / "bad.json")


def test_a_missing_file_is_named(tmp_path):
    (tmp_path / "math_10k.json").write_text("[]")
    with pytest.raises(
        ConfigError, match=r"mix.file='.*math_10.json': no such file.*Did you mean 'math_10k.json'"
    ):
        read(tmp_path / "math_10.json")
    (tmp_path / "bytes.json").write_bytes(b'[{"\xff"}]')
    with pytest.raises(ConfigError, match=r"bytes.json, line 1: not UTF-8"):
        read(tmp_path / "bytes.json")


def test_hub(monkeypatch):
    asked = []

    def fake(*args, **kwargs):
        asked.append((args, kwargs))
        return datasets.Dataset.from_list([{"input": "", **item} for item in ITEMS])

    monkeypatch.setattr(datasets, "load_dataset", fake)
    rows, record = mixes.training_rows(
        mix(hub={"path": "a/b", "revision": "abc"}),
        [],
        Reader(SimpleNamespace(source="builtin", train_limit=2)),
        0,
    )
    assert [row["output"] for row in rows] == [item["output"] for item in ITEMS[:2]]
    assert asked == [(("a/b", None), {"data_files": None, "split": "train", "revision": "abc"})]
    assert (record["instructions"]["available"], record["instructions"]["taken"]) == (3, 2)

    def offline(*args, **kwargs):
        raise ConnectionError("no network\nlong story")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(
        ConfigError,
        match=r"mix.hub.path='a/b' at revision abc.*ConnectionError: no network\).*mix.file needs neither",
    ):
        mixes.training_rows(mix(hub={"path": "a/b", "revision": "abc"}), [], Reader(BUILTIN), 0)


def test_text_of_an_instruction():
    head = (
        "Below is an instruction that describes a task. Write a response that appropriately completes "
        "the request."
    )
    wide = " " * 16
    row = {"instruction": "Add {x}.", "input": "", "output": "5"}
    prompt, answer = mixes.pair(row)
    assert prompt == f"{head} \n\n{wide}### Instruction:\n{wide}Add {{x}}.\n\n{wide}### Response:\n{wide}"
    assert answer == "5"
    assert mixes.pair(row, "alpaca")[0] == f"{head}\n\n### Instruction:\nAdd {{x}}.\n\n### Response:"
    head = head.replace("a task.", "a task, paired with an input that provides further context.")
    row["input"] = "2 {}"
    assert (
        mixes.pair(row, "alpaca")[0]
        == f"{head}\n\n### Instruction:\nAdd {{x}}.\n\n### Input:\n2 {{}}\n\n### Response:"
    )
    assert (
        f"\n{wide}Add {{x}}.\n\n{wide}### Input:\n{wide}2 {{}}\n\n{wide}### Response:\n" in mixes.pair(row)[0]
    )
