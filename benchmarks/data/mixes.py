"""Mixes: what is trained on. One YAML of conf/mix is one mix, and its parts add up.

    own     the train splits of the tasks that are evaluated, of those that have one
    parts   train splits of named tasks, each with a weight and a cap; for a task of `own` they adjust its
            part
    file    an instruction file in the format of LLM-Adapters: JSON list or JSONL of {instruction, input,
            output, answer}
    hub     the same from a data set on the Hugging Face hub, at a given revision

    mix=own                           mix=math_mix mix.parts.gsm8k.cap=1000      mix=own
                                      mix.parts.boolq.weight=0.5
    mix=math_14k mix.file=math_14k.json                                          mix=own
                                                                                 mix.parts.commonsenseqa.weight=1

The rows depend on the mix, the data source and the seed only, so every method of a comparison trains on the
same ones. Torch-free.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moabench.benchmarks import tasks
from moabench.benchmarks.config.mix import MixConfig, PartConfig, Published, part_names
from moabench.benchmarks.tasks import rows as sources
from moabench.benchmarks.tasks.objects import objects
from moabench.methods.spec import ConfigError, nearest

Row = dict[str, Any]


SEED = 0
"""Of the choice of rows: one data set for all seeds of a study."""


def training_rows(
    mix: MixConfig, eval_tasks: Sequence[str], reader: sources.Reader, seed: int = SEED
) -> tuple[list[Row], dict[str, Any]]:
    """(rows, record) of a mix: its parts one after the other, each in the order of its source.

    A row that is taken twice is the same object twice. The record says, for each part, what was there and
    what was taken, which evaluated tasks have no train split, and how a file compares with the published one.
    Raises ConfigError.
    """
    data = reader.data
    parts, missing = _parts(mix, eval_tasks, data)
    rows, record = (
        [],
        {"name": mix.name, "source": data.source, "seed": seed, "parts": {}, "without_train_split": missing},
    )
    for task, part in parts.items():
        available = reader.rows(task, "train")
        taken = _weighted(
            _capped(available, part.cap, f"{seed}/{task}/cap"), part.weight, f"{seed}/{task}/weight"
        )
        record["parts"][task] = {**asdict(part), "available": len(available), "taken": len(taken)}
        rows += taken
    if mix.file is not None or (mix.hub is not None and mix.hub.revision is not None):
        instructions, origin = _from_file(mix) if mix.file is not None else _from_hub(mix)
        taken = instructions[: getattr(data, "train_limit", None)]
        record["instructions"] = {**origin, "available": len(instructions), "taken": len(taken)}
        record["instructions"]["differs"] = _differences(record["instructions"], mix.published)
        rows += taken
    if not rows:
        raise ConfigError(f"mix={mix.name}: no rows; expected a part with a weight above 0.")
    return rows, record | {"rows": len(rows)}


def _parts(mix: MixConfig, eval_tasks: Sequence[str], data: Any) -> tuple[dict[str, PartConfig], list[str]]:
    """(task -> part, tasks that were wished for and have no train split in this source)."""
    wished = dict.fromkeys(eval_tasks, PartConfig(optional=True)) if mix.own else {}
    wished |= {task: part for task, part in mix.parts.items() if task not in wished}
    found, missing = {}, []
    for task, part in wished.items():
        wanted = mix.parts.get(task, part)
        if not wanted.weight:
            continue
        if _has_train(task, data):
            found[task] = wanted
        elif part.optional:
            missing.append(task)
        else:
            raise ConfigError(
                f"mix.parts.{task}: no train split with data.source={data.source}. Expected one of "
                f"{_trainable(data)}, or mix.parts.{task}.optional=true."
            )
    if mix.own and missing and not found and mix.file is None and mix.hub is None:
        raise ConfigError(
            f"mix={mix.name}: none of {', '.join(eval_tasks)} has a train split with "
            f"data.source={data.source}. Expected another mix (mix=math_mix, mix=commonsense_mix) or a part, "
            f"mix.parts.<task>.weight=1, with one of {_trainable(data)}."
        )
    return found, missing


def _has_train(task: str, data: Any) -> bool:
    elsewhere = task in tasks.SETS and data.source != "local"
    if elsewhere or tasks.get(tasks.SETS.get(task, task)).unavailable(data.source):
        return False
    return "train" in sources.splits(task, data)


def _trainable(data: Any) -> str:
    """The tasks that can be trained on in this source, in words."""
    found = []
    for task in part_names():
        try:
            found += [task] * _has_train(task, data)
        except ConfigError:  # this task's folder is not there
            continue
    return ", ".join(found) or "the tasks that have one (here: none)"


def _capped(rows: list[Row], cap: int | None, seed: str) -> list[Row]:
    return rows if cap is None or cap >= len(rows) else _sample(rows, cap, seed)


def _weighted(rows: list[Row], weight: float, seed: str) -> list[Row]:
    """Whole passes, then a seeded choice for what remains of the weight."""
    return rows * int(weight) + _sample(rows, round((weight - int(weight)) * len(rows)), seed)


def _sample(rows: list[Row], count: int, seed: str) -> list[Row]:
    """`count` rows in the order of the source."""
    return [rows[index] for index in sorted(random.Random(seed).sample(range(len(rows)), count))]


# ---- instruction files


def pair(row: Mapping[str, Any], template: str = "llm_adapters") -> tuple[str, str]:
    """(prompt, answer) of an instruction row: `instruction` and `input` in the template that the evaluation
    uses, and `output`."""
    from moabench.benchmarks.tasks.formats import TEMPLATES

    text = TEMPLATES[template]
    if not row.get("input"):
        return text.format(row["instruction"]), row["output"]
    # Both published templates have this second form, which differs from the first in these two places only.
    text = text.replace(
        "describes a task.", "describes a task, paired with an input that provides further context."
    )
    indent = text.partition("### Instruction:")[0].rpartition("\n")[2]
    asked = f"{row['instruction']}\n\n{indent}### Input:\n{indent}{row['input']}"
    return text.format(asked), row["output"]


def _from_file(mix: MixConfig) -> tuple[list[Row], dict[str, Any]]:
    path = Path(mix.file).expanduser()
    if not path.is_file():
        near = (
            nearest(path.name, [p.name for p in path.parent.glob("*.json*")]) if path.parent.is_dir() else ""
        )
        raise ConfigError(
            f"mix.file={mix.file!r}: no such file; expected a JSON list or JSONL of instructions.{near}"
        )
    content = path.read_bytes()
    items = ((f"{path}, line {line}", item) for line, item in objects(content, path))
    rows, empty = _instructions(items, mix.name)
    if not rows:
        raise ConfigError(f"{path}: no rows, expected at least one.")
    # The name of the place says nothing to others; the content does.
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
    return rows, {"file": path.name, "git_blob": blob, "empty": empty}


def _from_hub(mix: MixConfig) -> tuple[list[Row], dict[str, Any]]:
    import datasets

    hub = mix.hub
    try:
        found = datasets.load_dataset(
            hub.path, hub.name, data_files=hub.file, split=hub.split, revision=hub.revision
        )
    except Exception as error:  # offline, gone, unknown split: `datasets` raises a dozen types for these
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"mix.hub.path={hub.path!r} at revision {hub.revision[:12]}, split {hub.split}, could not be "
            f"loaded ({type(error).__name__}: {first}). Needs a network or a filled cache; mix.file needs "
            "neither."
        ) from error
    items = ((f"{hub.path}, {hub.split} row {i}", item) for i, item in enumerate(found))
    rows, empty = _instructions(items, mix.name)
    return rows, asdict(hub) | {"empty": empty}


def _instructions(items: Iterable[tuple[str, Mapping[str, Any]]], mix: str) -> tuple[list[Row], int]:
    """(rows, how many were left out for an instruction or output that is empty: published files have such)
    of (where, item) pairs."""
    found = [_instruction(item, where, mix, i) for i, (where, item) in enumerate(items)]
    rows = [row for row in found if row["instruction"].strip() and row["output"].strip()]
    return rows, len(found) - len(rows)


def _instruction(item: Mapping[str, Any], where: str, mix: str, number: int) -> Row:
    """The row of one instruction; ConfigError with `where`, the key and the reason for a malformed one."""
    for key in ("instruction", "output"):
        if key not in item:
            raise ConfigError(f"{where}: key '{key}' is missing.{nearest(key, item)}")
        if not isinstance(item[key], str):
            raise ConfigError(f"{where}: {key}={item[key]!r}: expected text.")
    given = item.get("input")
    if given is not None and not isinstance(given, str):
        raise ConfigError(f"{where}: input={given!r}: expected text.")
    return {
        "id": f"{mix}-{number}",
        "task": "",
        "mix": mix,
        "instruction": item["instruction"],
        "input": given or "",
        "output": item["output"],
    }


def _differences(found: Mapping[str, Any], published: Published | None) -> list[str]:
    """How the file differs from the published one, in words."""
    if published is None:
        return []
    told = []
    rows = found["available"] + found["empty"]
    if published.rows is not None and rows != published.rows:
        told.append(f"{rows} rows, the published file has {published.rows}")
    if published.git_blob and "git_blob" in found and found["git_blob"] != published.git_blob:
        told.append(f"git blob {found['git_blob'][:12]}, the published file has {published.git_blob[:12]}")
    return told
