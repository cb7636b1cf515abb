"""Rows of a task from one of three sources, never silently swapped.

    builtin   the world of benchmarks/world: needs nothing
    local     JSONL files, data.root/<task>/<split>.jsonl
    hub       the public data set that the task's file names, at a pinned revision

A row is {"id": str, "task": str, "question": str, "choices": [str, ...], "label": int from 0}, and may carry more (`skill`, ...).
Whatever is wrong with a source is one ConfigError that names the key, or the file and line, and what was expected.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moabench.methods.spec import ConfigError, nearest

from . import tasks

SPLITS = ("train", "validation", "test")


def load_rows(task: str, split: str, data: Any) -> list[dict[str, Any]]:
    """Rows of one split in the order of the source, the first `train_limit` or `eval_limit` of them.

    data: the config group (source, root, train_limit, eval_limit, seed). Raises ConfigError.
    """
    if split not in SPLITS:
        raise ConfigError(f"split={split!r}: expected one of {', '.join(SPLITS)}.{nearest(split, SPLITS)}")
    if data.source not in _SOURCES:
        raise ConfigError(f"data.source={data.source!r}: expected one of {', '.join(_SOURCES)}.{nearest(data.source, _SOURCES)}")
    found = tasks.get(task)
    if reason := found.unavailable(data.source):
        possible = [s for s in _SOURCES if not found.unavailable(s)]
        raise ConfigError(f"task {task} with data.source={data.source}: {reason}. Expected data.source={' or '.join(possible)}.")
    limit = getattr(data, "train_limit" if split == "train" else "eval_limit", None)
    rows = _SOURCES[data.source](found, split, data, limit)
    if not rows:
        raise ConfigError(f"task {task}, split {split}, data.source={data.source}: no rows, expected at least one.")
    return [{**row, "task": task} for row in rows]


def _builtin(task: tasks.Task, split: str, data: Any, limit: int | None) -> list[dict[str, Any]]:
    from . import world

    if task.name not in world.TASKS:
        raise ConfigError(f"task {task.name} with data.source=builtin: the world has no such task.{nearest(task.name, world.TASKS)}")
    return world.rows(task.name, split, seed=data.seed, n=limit)


def _local(task: tasks.Task, split: str, data: Any, limit: int | None) -> list[dict[str, Any]]:
    path = _local_file(task, split, data.root)
    rows = []
    with path.open(encoding="utf-8") as lines:
        try:
            for number, line in enumerate(lines, 1):
                if limit is not None and len(rows) == limit:
                    break
                if line.strip():
                    rows.append(_checked(_parsed(line, path, number), f"{path}, line {number}", f"{task.name}-{split}-{number - 1}"))
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path}, after line {len(rows)}: not UTF-8 text ({error.reason}).") from None
    return rows


def _local_file(task: tasks.Task, split: str, root: str | None) -> Path:
    if not root:
        raise ConfigError(f"data.root={root!r}: data.source=local needs a folder with <task>/<split>.jsonl files.")
    base = Path(root).expanduser()
    if not base.is_dir():
        raise ConfigError(f"data.root={root!r}: no such folder; expected one with <task>/<split>.jsonl files.")
    name = task.facts.get("local", task.name)
    if not (base / name).is_dir():
        there = [p.name for p in base.iterdir() if p.is_dir()]
        raise ConfigError(f"data.root={root!r}: no folder '{name}' for task {task.name} in it.{nearest(name, there)}")
    path = base / name / f"{split}.jsonl"
    if not path.is_file():
        there = sorted(p.stem for p in path.parent.glob("*.jsonl"))
        raise ConfigError(f"{path}: no such file; task {task.name} needs its {split} split. There: {', '.join(there) or 'no .jsonl file'}.")
    return path


def _parsed(line: str, path: Path, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}, line {number}: not JSON ({error.msg} at column {error.colno}).") from None
    if not isinstance(row, dict):
        raise ConfigError(f"{path}, line {number}: expected a JSON object, got {type(row).__name__}.")
    return row


def _checked(row: dict[str, Any], where: str, default_id: str) -> dict[str, Any]:
    """`row` in our format; ConfigError with `where`, the key and the reason otherwise."""
    for key, kind in (("question", str), ("choices", list), ("label", int)):
        if key not in row:
            free = " (the row has a free 'answer'; a multiple-choice task needs choices)" if "answer" in row else ""
            raise ConfigError(f"{where}: key '{key}' is missing{free}.{nearest(key, row)}")
        if not isinstance(row[key], kind) or isinstance(row[key], bool):
            raise ConfigError(f"{where}: {key}={row[key]!r}: expected {_KINDS[kind]}.")
    if not row["question"].strip():
        raise ConfigError(f"{where}: question={row['question']!r}: expected text.")
    choices = row["choices"]
    if len(choices) < 2 or not all(isinstance(c, str) and c.strip() for c in choices):
        raise ConfigError(f"{where}: choices={choices!r}: expected two or more non-empty texts.")
    if not 0 <= row["label"] < len(choices):
        raise ConfigError(
            f"{where}: label={row['label']}: expected 0 to {len(choices) - 1}, the index of one of the {len(choices)} choices."
        )
    return {**row, "id": str(row.get("id", default_id))}


_KINDS = {str: "text", list: "a list of texts", int: "a whole number"}


def _hub(task: tasks.Task, split: str, data: Any, limit: int | None) -> list[dict[str, Any]]:
    """Rows of the pinned public data set; what it calls its columns stands in the task's file."""
    import datasets

    hub = task.facts.get("hub")
    if not hub:
        raise ConfigError(
            f"task {task.name} with data.source=hub: its file names no public data set. Expected data.source=builtin or local."
        )
    try:
        rows = datasets.load_dataset(hub["path"], hub.get("name"), split=split, revision=hub["revision"])
    except Exception as error:  # offline, gone, unknown split: `datasets` raises a dozen types for these
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"task {task.name} with data.source=hub: {hub['path']} at revision {hub['revision'][:12]}, split {split}, could not "
            f"be loaded ({type(error).__name__}: {first}). Needs a network or a filled cache; data.source=builtin needs neither."
        ) from error
    if limit is not None:
        rows = rows.select(range(min(limit, len(rows))))
    return [_from_hub(row, hub, f"{hub['path']}, {split} row {i}", f"{task.name}-{split}-{i}") for i, row in enumerate(rows)]


def _from_hub(row: dict[str, Any], hub: dict[str, Any], where: str, default_id: str) -> dict[str, Any]:
    """Our row from theirs: `answer` names one of `names` (ARC: the letters), or is the index itself where there are no names."""
    fields = hub["fields"]
    missing = [key for key in fields.values() if key.split(".")[0] not in row]
    if missing:
        raise ConfigError(f"{where}: no column '{missing[0]}'; the columns are {', '.join(row)}.")
    ours = {key: _dig(row, fields[key]) for key in ("id", "question", "choices") if key in fields}
    answer, names = _dig(row, fields["answer"]), _dig(row, fields["names"]) if "names" in fields else None
    if names is not None and answer not in names:
        raise ConfigError(f"{where}: {fields['answer']}={answer!r}: expected one of {', '.join(names)}.")
    ours["choices"] = list(ours["choices"])
    return _checked({**ours, "label": names.index(answer) if names is not None else int(answer)}, where, default_id)


def _dig(row: dict[str, Any], path: str) -> Any:
    """`row["a"]["b"]` for "a.b"."""
    for key in path.split("."):
        row = row[key]
    return row


_SOURCES = {"builtin": _builtin, "local": _local, "hub": _hub}
