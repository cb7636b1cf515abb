"""Rows of a task from one of three sources, never silently swapped.

    builtin   the world of benchmarks/world: needs nothing
    local     JSONL files, data.root/<task>/<split>.jsonl
    hub       the public data set that the task's file names, at a pinned revision

A row is {"id": str, "task": str, "question": str} with what the task's kind needs:

    choices   choices (list of texts) and label (index of the right one, from 0)
    number    answer (a number as text); from the built-in world choices and label too
    letter    choices, label and answer, the label's letter

and may carry `context`, `solution`, `equation`, `skill`, `domain` and more. Whatever is wrong with a source
is one ConfigError that names the key, or the file and line, and what was expected.
"""

from __future__ import annotations

import hashlib
from itertools import islice
from pathlib import Path
from typing import Any

from moabench.benchmarks import tasks
from moabench.methods.spec import ConfigError, nearest

from . import extraction
from .extraction import VOCABULARY
from .hub import READERS
from .objects import objects

SPLITS = ("train", "validation", "test")


def load_rows(task: str, split: str, data: Any) -> list[dict[str, Any]]:
    """Rows of one split in the order of the source, the first `train_limit` or `eval_limit` of them. `task`
    may be one of tasks.SETS.

    data: the config group (source, root, train_limit, eval_limit, seed, world, revisions). Raises
    ConfigError.
    """
    if split not in SPLITS:
        raise ConfigError(f"split={split!r}: expected one of {', '.join(SPLITS)}.{nearest(split, SPLITS)}")
    found = _available(task, data)
    limit = getattr(data, "train_limit" if split == "train" else "eval_limit", None)
    rows = _SOURCES[data.source](found, task, split, data, limit)
    if not rows:
        raise ConfigError(
            f"task {task}, split {split}, data.source={data.source}: no rows, expected at least one."
        )
    return [{**row, "task": found.name} for row in rows]


class Reader:
    """The rows of one `data` section, each split read once: what a run hashes is what it uses."""

    def __init__(self, data: Any) -> None:
        self.data = data
        self._kept: dict[tuple[str, str], list[dict[str, Any]]] = {}

    def rows(self, task: str, split: str) -> list[dict[str, Any]]:
        """As `load_rows`."""
        if (task, split) not in self._kept:
            self._kept[task, split] = load_rows(task, split, self.data)
        return self._kept[task, split]

    def reported(self, task: str) -> list[dict[str, Any]]:
        """The rows that a run evaluates on: those of the split that the task's file names, or with
        `data.held_out` those that `is_held_out` says of its train split, the first `eval_limit` of them.
        Raises ConfigError."""
        if not getattr(self.data, "held_out", False):
            return self.rows(task, tasks.get(task).split)
        if "train" not in splits(task, self.data):
            raise ConfigError(
                f"data.held_out=True: task {task} with data.source={self.data.source} has no train split to "
                "hold rows out of."
            )
        rows = self.rows(task, "train")
        found = [row for row in rows if is_held_out(row)]
        if not found:
            raise ConfigError(
                f"data.held_out=True (as in trials of train.lr_grid): none of the {len(rows)} training rows "
                f"of {task} is in the tenth that is held out; expected more rows."
            )
        return found[: self.data.eval_limit]


def is_instruction(row: dict[str, Any]) -> bool:
    """True for a row of an instruction file (data/mixes.py), which is of no task. `task` comes from where a
    row was read; what other keys it has says nothing."""
    return not row["task"]


def is_held_out(row: dict[str, Any]) -> bool:
    """True for a tenth of all training rows, whatever their order and number."""
    return hashlib.sha256(f"{row['task']} {row['id']}".encode()).digest()[0] < 26


def splits(task: str, data: Any) -> tuple[str, ...]:
    """The splits that the source has for `task` (or a set of tasks.SETS), found without reading them."""
    found = _available(task, data)
    if data.source == "local":
        folder = _local_folder(found, task, data.root)
        return tuple(split for split in SPLITS if (folder / f"{split}.jsonl").is_file())
    if data.source == "hub":
        return tuple(split for split in SPLITS if split in _hub_splits(found.facts["hub"]))
    return SPLITS


def _available(task: str, data: Any) -> tasks.Task:
    """The task of `task`; ConfigError where the source cannot give it."""
    if data.source not in _SOURCES:
        raise ConfigError(
            f"data.source={data.source!r}: expected one of "
            f"{', '.join(_SOURCES)}.{nearest(data.source, _SOURCES)}"
        )
    found = tasks.get(tasks.SETS.get(task, task))
    if task in tasks.SETS and data.source != "local":
        raise ConfigError(f"data set {task} with data.source={data.source}: only data.source=local has it.")
    if reason := found.unavailable(data.source):
        possible = [s for s in _SOURCES if not found.unavailable(s)]
        raise ConfigError(
            f"task {task} with data.source={data.source}: {reason}. Expected "
            f"data.source={' or '.join(possible)}."
        )
    return found


def _builtin(task: tasks.Task, _: str, split: str, data: Any, limit: int | None) -> list[dict[str, Any]]:
    from moabench.benchmarks import world

    if task.name not in world.TASKS:
        raise ConfigError(
            f"task {task.name} with data.source=builtin: the world has no such "
            f"task.{nearest(task.name, world.TASKS)}"
        )
    try:
        return world.rows(task.name, split, seed=data.seed, n=limit, axes=getattr(data, "world", None))
    except ConfigError as error:  # a difficulty that this task does not have
        raise ConfigError(f"task {task.name}, data.world: {error}") from None


def _local(task: tasks.Task, name: str, split: str, data: Any, limit: int | None) -> list[dict[str, Any]]:
    path = _local_file(task, name, split, data.root)
    rows, lines = [], {}
    for line, item in islice(objects(path.read_bytes(), path), limit):
        where = f"{path}, line {line}"
        row = _checked(item, task, where, f"{name}-{split}-{len(rows)}", free=name == "asdiv")
        # Rows are held out, and paired between runs, by their ids.
        if row["id"] in lines:
            raise ConfigError(
                f"{where}: id={row['id']!r}: line {lines[row['id']]} has it too; expected an id of its own, "
                "or none."
            )
        lines[row["id"]] = line
        rows.append(row)
    return rows


def _local_folder(task: tasks.Task, name: str, root: str | None) -> Path:
    if not root:
        raise ConfigError(
            f"data.root={root!r}: data.source=local needs a folder with <task>/<split>.jsonl files."
        )
    base = Path(root).expanduser()
    if not base.is_dir():
        raise ConfigError(
            f"data.root={root!r}: no such folder; expected one with <task>/<split>.jsonl files."
        )
    folder = name if name in tasks.SETS else task.facts.get("local", name)
    if not (base / folder).is_dir():
        there = [p.name for p in base.iterdir() if p.is_dir()]
        raise ConfigError(
            f"data.root={root!r}: no folder '{folder}' for task {name} in it.{nearest(folder, there)}"
        )
    return base / folder


def _local_file(task: tasks.Task, name: str, split: str, root: str | None) -> Path:
    path = _local_folder(task, name, root) / f"{split}.jsonl"
    if not path.is_file():
        there = sorted(p.stem for p in path.parent.glob("*.jsonl"))
        raise ConfigError(
            f"{path}: no such file; task {name} needs its {split} split. There: "
            f"{', '.join(there) or 'no .jsonl file'}."
        )
    return path


def _checked(
    row: dict[str, Any], task: tasks.Task, where: str, default_id: str = "", free: bool = False
) -> dict[str, Any]:
    """`row` as the task needs it; ConfigError with `where`, the key and the reason otherwise. default_id: of
    a row that brings none; free: an answer may be any text."""
    given = row.get("id")
    if given is not None and (not isinstance(given, str | int) or isinstance(given, bool)):
        raise ConfigError(f"{where}: id={_shown(given)}: expected text or a whole number.")
    row = {**row, "id": default_id if given is None else str(given)}
    for key in ("question", "context", "solution", "equation"):
        _typed(row, key, str, where, needed=key == "question")
    for key in ("answer", "skill", "domain"):  # columns of the tables of a run
        if row.get(key) is not None:
            _typed(row, key, str, where)
    if not row["question"].strip():
        raise ConfigError(f"{where}: question={row['question']!r}: expected text.")
    if task.facts.get("blank") and "_" not in row["question"]:
        raise ConfigError(f"{where}: question={_shown(row['question'])}: expected a blank '_' in it.")
    if task.kind != "number" or "choices" in row or "label" in row:
        _check_choices(row, task, where)
    if task.kind != "choices":
        _check_answer(row, task, where, free)
    return row


def _shown(value: Any) -> str:
    """A value in an error, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 200 else text[:200] + "..."


def _typed(row: dict[str, Any], key: str, kind: type, where: str, needed: bool = True) -> None:
    if key not in row:
        if needed:
            raise ConfigError(f"{where}: key '{key}' is missing.{nearest(key, row)}")
    elif not isinstance(row[key], kind) or isinstance(row[key], bool):
        raise ConfigError(f"{where}: {key}={_shown(row[key])}: expected {_KINDS[kind]}.")


def _check_choices(row: dict[str, Any], task: tasks.Task, where: str) -> None:
    _typed(row, "choices", list, where)
    _typed(row, "label", int, where)
    choices, words = row["choices"], task.facts["words"]
    if len(choices) < 2 or not all(isinstance(c, str) and c.strip() for c in choices):
        raise ConfigError(f"{where}: choices={choices!r}: expected two or more non-empty texts.")
    if isinstance(words, list) and choices != words:
        raise ConfigError(f"{where}: choices={choices!r}: expected {words!r}, in this order.")
    most = len(words if isinstance(words, list) else VOCABULARY[words])
    if len(choices) > most:
        raise ConfigError(
            f"{where}: {len(choices)} choices: expected at most {most}, as the task's published form has."
        )
    if not 0 <= row["label"] < len(choices):
        raise ConfigError(
            f"{where}: label={row['label']}: expected 0 to {len(choices) - 1}, the index of one of "
            f"the {len(choices)} choices."
        )


def _check_answer(row: dict[str, Any], task: tasks.Task, where: str, free: bool) -> None:
    _typed(row, "answer", str, where)
    if task.kind == "letter":
        right = "ABCDE"[row["label"]]
        if row["answer"] != right:
            raise ConfigError(
                f"{where}: answer={row['answer']!r}: expected {right!r}, the letter of label {row['label']}."
            )
    elif not (_is_number(row["answer"]) or (free and row["answer"].strip())):
        raise ConfigError(
            f"{where}: answer={_shown(row['answer'])}: expected a number in digits, such as '-3' or '1250.5'."
        )


def _is_number(text: str) -> bool:
    """Whether a response that says `text` is found right, as the papers read it and strictly."""
    found = extraction.number(f"The answer is {text}.")
    return found.strict == text and extraction.same_number(found.paper, text)


_KINDS = {str: "text", list: "a list of texts", int: "a whole number"}


def _hub(task: tasks.Task, _: str, split: str, data: Any, limit: int | None) -> list[dict[str, Any]]:
    """Rows of the pinned public data set, read by the reader that the task's file names."""
    import datasets

    hub = task.facts.get("hub")
    if not hub:
        raise ConfigError(
            f"task {task.name} with data.source=hub: its file names no public data set. Expected "
            "data.source=builtin or local."
        )
    theirs = _hub_splits(hub)
    if split not in theirs:
        raise ConfigError(
            f"task {task.name} with data.source=hub: {hub['path']} has no labelled {split} split. "
            f"There: {', '.join(theirs)}."
        )
    revision = (getattr(data, "revisions", None) or {}).get(task.name) or hub["revision"]
    if revision is None:
        raise ConfigError(
            f"task {task.name} with data.source=hub: no commit of {hub['path']} is known to us that could be "
            f"pinned. Name one: data.revisions.{task.name}=<commit, branch or refs/convert/parquet>."
        )
    try:
        rows = datasets.load_dataset(hub["path"], hub.get("name"), split=theirs[split], revision=revision)
    except Exception as error:  # offline, gone, unknown split: `datasets` raises a dozen types for these
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"task {task.name} with data.source=hub: {hub['path']} at revision {revision[:12]}, split "
            f"{split}, could not be loaded ({type(error).__name__}: {first}). Needs a network or a filled "
            "cache; data.source=builtin needs neither."
        ) from error
    if limit is not None:
        rows = rows.select(range(min(limit, len(rows))))
    return [
        _from_hub(row, task, f"{hub['path']}, {split} row {i}", f"{task.name}-{split}-{i}")
        for i, row in enumerate(rows)
    ]


def _hub_splits(hub: dict[str, Any]) -> dict[str, str]:
    """Our split -> theirs, where theirs is labelled."""
    return hub["splits"] if isinstance(hub["splits"], dict) else {split: split for split in hub["splits"]}


def _from_hub(row: dict[str, Any], task: tasks.Task, where: str, default_id: str) -> dict[str, Any]:
    try:
        ours = READERS[task.facts["hub"]["reader"]](row)
    except KeyError as error:
        raise ConfigError(f"{where}: no column {error}; the columns are {', '.join(row)}.") from None
    except ValueError as error:
        raise ConfigError(f"{where}: {error}.") from None
    return _checked(ours, task, where, default_id)


_SOURCES = {"builtin": _builtin, "local": _local, "hub": _hub}
