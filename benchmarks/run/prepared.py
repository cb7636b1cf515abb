"""A run before it begins: its method, its rows, what it reads and the hash of all that. Everything is read
here and once; what was hashed is what is trained on and evaluated. Imports no torch, so that a finished run
is found without it."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from moabench.benchmarks import tasks
from moabench.benchmarks.bases.fingerprint import model_fingerprint
from moabench.benchmarks.config.hashing import digest
from moabench.benchmarks.config.run import RunConfig, run_hash
from moabench.benchmarks.data import mixes
from moabench.benchmarks.evaluation import forgetting
from moabench.benchmarks.fairness import leakage
from moabench.benchmarks.machine import files, processes
from moabench.benchmarks.tasks.rows import Reader, is_held_out, is_instruction
from moabench.methods.catalog import Method
from moabench.methods.spec import ConfigError

Row = dict[str, Any]


@dataclass(frozen=True)
class TrainingRows:
    """What is trained on. skills: names of the true skills in the order of their ids; metrics: of the run."""

    rows: list[Row]
    skills: tuple[str, ...] = ()
    metrics: dict[str, Any] | None = None


class Prepared:
    """One run, prepared. Raises ConfigError for bad data.

    inputs: fingerprints of the weights and of the rows that the run reads, and the number of its processes;
    part of the hash. held_out: texts whose loss is measured before and after training. weights: the files of
    the base, as they were read for `inputs`.
    """

    def __init__(self, cfg: RunConfig, reader: Reader | None = None) -> None:
        self.cfg = cfg
        self.method: Method = cfg.parsed_method
        self.reader = reader or Reader(cfg.data)
        self.held_out = forgetting.held_out_texts(cfg)
        self.inputs = self._inputs()
        self.hash = run_hash(cfg, self.inputs)

    @property
    def trains(self) -> bool:
        """False for the frozen base alone."""
        return self.method.tuner != "none"

    @property
    def name(self) -> str:
        """Of the run folder, but for the hash."""
        cfg = self.cfg
        return f"{cfg.task.name}-{self.method.name}-{cfg.model.name}-s{cfg.seed}"

    # ---- what is read

    def _inputs(self) -> dict[str, Any]:
        cfg = self.cfg
        found: dict[str, Any] = {"evaluation": self._evaluation()}
        if self.trains:
            found["training"] = self._training()
        if processes.count() > 1:  # each has batches of its own, so that the same config is another run
            found["processes"] = processes.count()
        if cfg.forgetting not in ("auto", "none"):
            found["held_out"] = digest(self.held_out)[:16]
        self.weights = model_fingerprint(cfg.model, cfg.runs_dir)  # last: it can take long, and keeps a file
        return {"model": self.weights.digest} | found

    def _evaluation(self) -> dict[str, str]:
        """By task: SHA-256 (16 hex digits) of its protocol's version and of the rows it reports; of its
        commit, where it is pinned to one of the hub."""
        found = {}
        for name in self.cfg.task.eval:
            content = self._commit(name) or self.reader.reported(name)
            found[name] = digest([tasks.get(name).facts["version"], content])[:16]
        return found

    def _training(self) -> str:
        """SHA-256 (16 hex digits) of the rows trained on, before any is dropped as leaked; of their commits,
        where all are pinned to some of the hub."""
        cfg = self.cfg
        commits = [self._commit(name) for name in cfg.mix.parts or cfg.task.eval]
        evaluated = [self._commit(name) for name in cfg.task.eval]
        hub = cfg.mix.hub and cfg.mix.hub.revision  # a commit of it is in the config, which is hashed too
        if cfg.mix.file is None and all((*commits, *evaluated)) and (not hub or _is_commit(hub)):
            return digest(commits)[:16]
        return digest(self.mixed[0])[:16]

    def _commit(self, task: str) -> Any:
        """The public data set of a task at its commit; None for rows from elsewhere, and for a revision that
        moves, such as a branch."""
        if self.cfg.data.source != "hub":
            return None
        hub, own = tasks.get(tasks.SETS.get(task, task)).facts.get("hub"), self.cfg.data.revisions.get(task)
        return [hub, own] if hub and _is_commit(own or hub["revision"]) else None

    @cached_property
    def mixed(self) -> tuple[list[Row], dict[str, Any]]:
        """(rows, record) of the mix, before any is held out or dropped."""
        return mixes.training_rows(self.cfg.mix, self.cfg.task.eval, self.reader)

    # ---- what is trained on

    def training_rows(self, path: Path) -> TrainingRows:
        """The rows to train on; `data.json` and `leakage.json` of the folder `path` say how they were made
        and which of them are evaluated too. Raises ConfigError with leakage=refuse."""
        cfg, (rows, record) = self.cfg, self.mixed
        for name in dict.fromkeys(row["task"] for row in rows if not is_instruction(row)):
            if reason := tasks.get(name).unavailable(cfg.data.source, cfg.protocol):
                raise ConfigError(
                    f"mix={cfg.mix.name} trains on {name} with data.source={cfg.data.source}, "
                    f"protocol={cfg.protocol}: {reason}."
                )
        if cfg.data.held_out:
            rows = [row for row in rows if not is_held_out(row)]
            if not rows:
                raise ConfigError(
                    "data.held_out=True (as in trials of train.lr_grid): no training row is left; expected "
                    "more rows."
                )
        evaluated = [row for task in cfg.task.eval for row in self.reader.reported(task)]
        # The built-in world is made of templates, where two facts differ in a word or two: nearness means
        # nothing there.
        near = cfg.data.source != "builtin" or cfg.mix.file is not None
        report = leakage.check(rows, evaluated, near=near)
        kept = leakage.apply(report, rows, cfg.leakage)
        files.write_json(path / "data.json", record | {"rows": len(kept)})
        files.write_json(path / "leakage.json", report.record(cfg.leakage))
        if not cfg.quiet:
            for line in self._notes(record, report):
                print(line, file=sys.stderr)
        skills = tuple(sorted({row["skill"] for row in (*kept, *evaluated) if row.get("skill")}))
        counts = {"leakage/rows": len(report.leaked), "leakage/dropped": len(rows) - len(kept)}
        return TrainingRows(kept, skills, {"train/rows": len(kept), **counts})

    def _notes(self, record: dict[str, Any], report: leakage.Report) -> Iterator[str]:
        """What a user must know about the training rows: tasks without any, files that differ from the
        published ones, leaked rows."""
        cfg = self.cfg
        if record["without_train_split"]:
            without = ", ".join(record["without_train_split"])
            yield f"no train split with data.source={cfg.data.source}, so not trained on: {without}"
        if empty := record.get("instructions", {}).get("empty"):
            yield f"mix={cfg.mix.name}: {empty:,} rows without an instruction or an output, left out"
        for difference in record.get("instructions", {}).get("differs", []):
            yield f"mix={cfg.mix.name}: {difference}"
        if report.leaked:
            done = {"drop": "dropped", "mark": "kept (leakage=mark)"}[cfg.leakage]
            yield (
                f"{len(report.leaked):,} of {report.train_rows:,} training rows are evaluated too, {done}; "
                "leakage.json lists them"
            )

    @property
    def protocols(self) -> dict[str, Any]:
        """How each task is put and read: protocol, prompt template, extraction, the tokens that the loss is
        taken on, task version."""
        found = {}
        for name in self.cfg.task.eval:
            task = tasks.get(name)
            form = task.form(self.cfg.protocol)
            about = {"loss": self.cfg.train.loss, "split": task.split, "version": task.facts["version"]}
            if form.extraction:
                about["max_new_tokens"] = task.tokens(self.cfg.data.source)
            found[tasks.title(name, self.cfg.data.title, form.protocol)] = form.names | about
        return found


def _is_commit(revision: str | None) -> bool:
    return re.fullmatch(r"[0-9a-f]{40}", revision or "") is not None
