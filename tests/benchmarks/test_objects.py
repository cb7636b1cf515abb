"""Data files as tasks and mixes read them: every object comes back with its line, or one error names the
line. The same for both.

pytest tests/benchmarks/test_objects.py
"""

import json
from pathlib import Path

import pytest

from moabench.benchmarks.config.mix import MixConfig
from moabench.benchmarks.config.sections import DataConfig
from moabench.benchmarks.data import mixes
from moabench.benchmarks.tasks.objects import DEEPEST, objects
from moabench.benchmarks.tasks.rows import Reader, load_rows
from moabench.methods.spec import ConfigError

ROWS = [
    {
        "question": f"Why {i}?",
        "choices": ["one", "two"],
        "label": i % 2,
        "instruction": f"Do {i}.",
        "output": "x",
    }
    for i in range(5)
]
"""Rows that are both a task's and a mix's."""


def lines(*items):
    return "\n".join(map(json.dumps, items))


def as_task(path):
    (path / "arc_easy").mkdir(exist_ok=True)
    (path / "arc_easy" / "train.jsonl").write_bytes((path / "rows").read_bytes())
    return load_rows("arc_easy", "train", DataConfig("local", root=str(path)))


def as_mix(path):
    return mixes.training_rows(MixConfig("test", file=str(path / "rows")), [], Reader(DataConfig("builtin")))[
        0
    ]


WAYS = pytest.mark.parametrize("way", [as_task, as_mix], ids=["task", "mix"])
GOOD = {
    "lines": lines(*ROWS),
    "lines and gaps": "\n" + lines(*ROWS).replace("\n", "\r\n\r\n") + "\n ",
    "a list": json.dumps(ROWS),
    "a list over lines": "\n" + json.dumps(ROWS, indent=2) + "\n\n",
}


@WAYS
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "with a mark"])
@pytest.mark.parametrize("form", GOOD)
def test_every_row_is_read(tmp_path, form, mark, way):
    (tmp_path / "rows").write_bytes(mark + GOOD[form].encode())
    rows = way(tmp_path)
    assert len(rows) == 5
    key = "question" if way is as_task else "instruction"
    assert [row[key] for row in rows] == [row[key] for row in ROWS]
    assert len({row["id"] for row in rows}) == 5


FIRST = lines(ROWS[0])
DEEP, DEEPER = (
    json.dumps({**ROWS[0], "notes": None}).replace("null", "[" * depth + "]" * depth)
    for depth in (DEEPEST, 100_000)
)
CUT = json.dumps(ROWS, indent=1)[:-2]
BROKEN = {
    "a second list": (json.dumps(ROWS[:2]) + "\n\n" + json.dumps(ROWS[2:]), 3, "more after the end"),
    "a list a line": ("\n".join(json.dumps([row]) for row in ROWS), 2, "more after the end"),
    "rows after a list": (json.dumps(ROWS) + "\n" + FIRST, 2, "more after the end"),
    "two in a line": (FIRST + "\n" + FIRST + FIRST, 2, "not JSON"),
    "cut": (lines(*ROWS)[:-5], 5, "not JSON"),
    "a list that is cut": (CUT, CUT.count("\n") + 1, "not JSON"),
    "no object": (FIRST + "\n3", 2, "expected a JSON object, got int"),
    "half a character": (FIRST + "\n" + FIRST.replace("Why", "\\ud83d"), 2, "half of a surrogate"),
    "half a character in a key": (FIRST.replace('"label"', '"x\\uDC00": 1, "label"'), 1, "half of a surr"),
    "half a character inside": (FIRST.replace("one", "\\udfff"), 1, "choices"),
    "a long number": (FIRST.replace('"label": 0', f'"label": {"9" * 6000}'), 1, "thousands of digits"),
    "deep": (FIRST + "\n" + DEEP, 2, f"more than {DEEPEST} lists"),
    "very deep": (DEEPER, 1, f"more than {DEEPEST} lists"),
    "not closed": (FIRST + "\n" + "[" * 100_000, 2, ""),
}


@WAYS
@pytest.mark.parametrize("case", BROKEN)
def test_what_cannot_be_read_is_named_by_its_line(tmp_path, case, way):
    text, line, reason = BROKEN[case]
    (tmp_path / "rows").write_text(text)
    with pytest.raises(ConfigError, match=f"line {line}: .*{reason}"):
        way(tmp_path)


def test_a_whole_character_may_be_two_escapes():
    (_, item), *_ = objects(b'{"a": "\\ud83d\\ude00"}', Path("x"))
    assert item == {"a": "\U0001f600"}


def test_depth_is_counted_not_brackets():
    wide = {"a": [[i] for i in range(200)], "b": "[" * 200}
    assert [item for _, item in objects(json.dumps(wide).encode(), Path("x"))] == [wide]
