"""Run folders as tidy tables. `load("runs/").runs` has one row a run; the larger tables are read when they
are first asked for.

    study = load("runs/")
    study.runs       a run a row: run, state, reason, method, model, task, protocol, data, seed, every key of
                     its config (`train.lr`), of its environment (`environment.code.commit`) and of its
                     metrics (`eval/.../acc`)
    study.history, study.routing, study.samples, study.probes, study.matrices     the runs' parquet files,
                                                                                  with a column `run`
    study.skipped    what could not be read, and why: run, file, reason

Only finished runs have metrics and tables. Failed, running and interrupted ones are rows with their state and
reason, since a table that leaves out what failed is wrong. A column that a run lacks (an older schema) is
null there.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from moabench.benchmarks.machine import environment as environments
from moabench.benchmarks.machine.files import read_json
from moabench.methods.spec import ConfigError, nearest

from . import condition, summary
from . import folder as runs

NAMED = ("method", "model", "task", "mix")
"""Sections of the config whose `name` is the column of that name, as on the command line (`method=lora`)."""

TABLES = ("history", "routing", "samples", "probes", "matrices")
"""The parquet files of a run folder."""

IDENTITY = (
    "run",
    "path",
    "state",
    "reason",
    "method",
    "model",
    "task",
    "protocol",
    "data",
    "seed",
    "accuracy",
)
"""First columns of `Study.runs`."""

RESUMED = "environment.resumed"
"""Column: in what the attempts of a resumed run differ; absent or null for a run of one environment."""

WORKERS = 8


class Study:
    """Runs to be looked at together. `configs`: run -> its config as nested data. `skipped`: (run, file,
    reason), see the module."""

    def __init__(
        self, table: pd.DataFrame, configs: Mapping[str, dict], skipped: Sequence[tuple[str, str, str]] = ()
    ):
        self.runs = table
        self.configs = configs
        self._skipped = list(skipped)

    @property
    def finished(self) -> pd.DataFrame:
        """The rows of `runs` that have results."""
        return self.runs[self.runs["state"] == "finished"]

    @property
    def skipped(self) -> pd.DataFrame:
        """What could not be read; of the parquet files once their table was asked for."""
        return pd.DataFrame(self._skipped, columns=["run", "file", "reason"])

    @cached_property
    def history(self) -> pd.DataFrame:
        """A logged step a row."""
        return self._table("history")

    @cached_property
    def routing(self) -> pd.DataFrame:
        """A split, task, site and expert a row."""
        return self._table("routing")

    @cached_property
    def samples(self) -> pd.DataFrame:
        """An evaluated question a row."""
        return self._table("samples")

    @cached_property
    def probes(self) -> pd.DataFrame:
        """A probe step, site and measure a row."""
        return self._table("probes")

    @cached_property
    def matrices(self) -> pd.DataFrame:
        """An entry of a matrix over experts a row."""
        return self._table("matrices")

    def where(self, query: str) -> Study:
        """The runs for which `query` holds: `method == "lora" and seed < 3`; names with a dot or a slash in
        backticks. Raises ConfigError for what is no condition on columns."""
        return Study(condition.kept(self.runs, query), self.configs, self._skipped)

    def column(self, name: str) -> pd.Series:
        """A column of `runs`. Raises ConfigError, with the nearest name, for an unknown one."""
        if name not in self.runs:
            raise ConfigError(f"column {name!r}: no run has it.{nearest(name, self.runs.columns)}")
        return self.runs[name]

    def notes(self) -> list[str]:
        """In words: how many runs have no results and why, and what was skipped."""
        states = self.runs["state"].value_counts()
        lines = [f"{count} {state}" for state, count in states.items() if state != "finished"]
        found = [
            f"{states.get('finished', 0)} of {len(self.runs)} runs are finished"
            + (f" ({', '.join(lines)})" if lines else "")
        ]
        for (file, reason), rows in self.skipped.groupby(["file", "reason"], sort=True):
            named = ", ".join(rows["run"].head(3)) + (" ..." if len(rows) > 3 else "")
            found.append(f"{file}: {reason} in {len(rows)} {'runs' if len(rows) > 1 else 'run'} ({named})")
        return found

    def _table(self, name: str) -> pd.DataFrame:
        rows = self.finished
        read = functools.partial(_read_parquet, name)
        parts = _parallel(read, [Path(path) for path in rows["path"]])
        kept = []
        for run, part in zip(rows["run"], parts, strict=True):
            if isinstance(part, str):
                self._skipped.append((run, f"{name}.parquet", part))
            elif part.num_columns:
                kept.append(part.add_column(0, "run", pa.repeat(run, part.num_rows)))
        table, failed = _concatenated(kept)
        self._skipped += [(run, f"{name}.parquet", reason) for run, reason in failed]
        return table.to_pandas() if table is not None else pd.DataFrame({"run": pd.Series(dtype=str)})


def load(*folders: str | Path) -> Study:
    """The run folders in `folders`; a folder that is a run itself is read alone. Raises ConfigError if there
    is none."""
    found = [path for folder in folders for path in _found(Path(folder).expanduser())]
    records: dict[str, dict[str, Any]] = {}
    configs, skipped = {}, []
    for path, record in zip(found, _parallel(_read_run, found), strict=True):
        if isinstance(record, str):
            skipped.append((path.name, *record.split(": ", 1)))
        elif path.name in records:
            skipped.append((path.name, "status.json", f"the same run is in {records[path.name]['path']}"))
        else:
            configs[path.name] = record.pop("config")
            records[path.name] = record
    rows = list(records.values())
    return Study(pd.DataFrame(rows, columns=_ordered(rows)), configs, skipped)


def flat(data: Any, prefix: str = "") -> dict[str, Any]:
    """Nested data by dotted keys; lists of plain values as tuples, of mappings by number (`experts.0.r`)."""
    if isinstance(data, Mapping):
        return {
            key: value
            for name, part in data.items()
            for key, value in flat(part, f"{prefix}.{name}" if prefix else str(name)).items()
        }
    if isinstance(data, list | tuple):
        if any(isinstance(part, Mapping) for part in data):
            return flat(dict(enumerate(data)), prefix)
        return {prefix: tuple(data)}
    return {prefix: data}


def _found(folder: Path) -> list[Path]:
    if (folder / "status.json").is_file():
        return [folder]
    found = runs.find(folder)
    if not found:
        there = "has no run folder in it" if folder.is_dir() else "is no folder"
        raise ConfigError(
            f"{str(folder)!r} {there}; expected a folder with <run>/status.json files, as run.py's runs_dir."
        )
    return found


def _read_run(path: Path) -> dict[str, Any] | str:
    """One row of `Study.runs` with the nested config beside it; a text `<file>: <reason>` if the folder
    cannot be read."""
    file = "status.json"
    try:
        status, state = runs.status_of(path), runs.state_of(path)
        if state == "broken":
            return status["reason"].rstrip(".")
        file = "config.yaml"
        config = _read_config((path / file).read_text(encoding="utf-8")) if (path / file).is_file() else {}
        file = "metrics.json"
        metrics = (read_json(path / file) or {}) if state == "finished" else {}
        accuracy = summary.accuracy(metrics)
        file = "environment.json"
        environment = read_json(path / file) or {}
        changed = environments.changed(environment)
        environment.pop("before", None)
    except Exception as error:  # whatever a parser raises for a cut or foreign file costs this run alone
        return f"{file}: cannot be read ({type(error.__cause__ or error).__name__})"
    row = {"run": path.name, "path": str(path), "state": state, "reason": status.get("reason")}
    row |= _named(config) | {"accuracy": accuracy} | flat(environment, "environment") | metrics
    row |= {RESUMED: ", ".join(changed)} if changed else {}
    return row | {"config": config}


def _read_config(text: str) -> dict[str, Any]:
    """The nested config. Sections recur from run to run, and parsing them is most of the time of `load`: each
    text is parsed once."""
    sections: list[list[str]] = []
    for line in text.splitlines(keepends=True):
        if (not line[0].isspace() and not line.startswith("- ")) or not sections:
            sections.append([])
        sections[-1].append(line)
    return {key: value for lines in sections for key, value in json.loads(_parsed("".join(lines))).items()}


@functools.lru_cache(maxsize=4096)
def _parsed(text: str) -> str:
    """A section of YAML as JSON text, so that no two runs share an object that one of them could change."""
    return json.dumps(yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)))


def _named(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config by dotted keys, with the names of its sections as the command line has them."""
    found = flat(config)
    for section in NAMED:
        if isinstance(config.get(section), Mapping):
            found[section] = found.pop(f"{section}.name", None)
    for section, key in (("data", "source"), ("budget", "size")):
        found[section] = found.pop(f"{section}.{key}", None)
    return {str(key): value for key, value in found.items()}


def _ordered(records: Iterable[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys([*IDENTITY, *(key for record in records for key in record)]))


def _read_parquet(name: str, path: Path) -> pa.Table | str:
    """The table; why not, in words, if it cannot be read."""
    file = path / f"{name}.parquet"
    if not file.is_file():
        return "absent (older schema, or a method that has none)"
    try:
        return pq.read_table(file, use_threads=False, memory_map=True).replace_schema_metadata()
    except (OSError, pa.ArrowException) as error:
        return f"cannot be read ({type(error).__name__})"


def _concatenated(parts: list[pa.Table]) -> tuple[pa.Table | None, list[tuple[str, str]]]:
    """All rows, and (run, reason) of the tables whose columns have other types than the same columns of the
    tables before."""
    if not parts:
        return None, []
    try:
        return pa.concat_tables(parts, promote_options="permissive"), []
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        pass
    kept, failed, schema = [], [], pa.schema([])
    for part in parts:
        try:
            schema = pa.unify_schemas([schema, part.schema], promote_options="permissive")
            kept.append(part)
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            failed.append(
                (part["run"][0].as_py(), f"types that do not fit ({' '.join(str(error).split())[:120]})")
            )
    return pa.concat_tables(kept, promote_options="permissive"), failed


def _parallel(function: Callable, items: Sequence) -> list:
    with ThreadPoolExecutor(WORKERS) as pool:
        return list(pool.map(function, items))
