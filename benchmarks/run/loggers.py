"""Weights & Biases as a view of a run. The run folder is the record; nothing here can fail a run that the
folder can keep, or make it wait for longer than `SECONDS`.

Offline by default: the files lie in the run folder, and `python -m moabench.analysis push` sends them later.
A run that resumes begins its files anew, with what its checkpoint knows of the steps before: the server takes
one file for one run, and two halves with one id for two versions of it.
Runs that may be compared (all but method and seed are equal) are one group, with the method as their job
type. Scalars are logged by step; what has a value for each expert and site would be hundreds of charts and is
one table a run.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from moabench.benchmarks.config.hashing import NOT_IN_HASH, digest, plain
from moabench.benchmarks.config.run import RunConfig
from moabench.benchmarks.machine import files

SECONDS = 60.0
"""For which W&B may keep a run waiting, once: after that the run goes on without it."""


def start(cfg: RunConfig, folder: Path, run_hash: str) -> Logger:
    """The logger that `cfg.logger` asks for, with the steps before a resume; one that logs nothing, and says
    so, if W&B cannot start."""
    if cfg.logger.kind == "none":
        return Logger(None)
    if cfg.logger.mode == "offline":
        files.remove_folder(folder / "wandb")
    logger = Logger(None, folder)
    logger.run = logger.done("start", lambda: _wandb(cfg, folder, run_hash))
    logger.log_history(_before(folder))
    return logger


def _before(folder: Path) -> list[dict[str, Any]]:
    """The logged rows that the newest whole checkpoint of a run knows of."""
    found = [*folder.glob("checkpoints/checkpoint-*/trainer_state.json")]
    for file in sorted(found, key=lambda file: int(file.parent.name.rpartition("-")[2]), reverse=True):
        with contextlib.suppress(files.Unreadable):
            rows = (files.read_json(file) or {}).get("log_history", [])
            return [row for row in rows if "loss/task" in row]
    return []


class Logger:
    """Scalars by step while the run goes on, the metrics at its end. Without a W&B run it does nothing."""

    def __init__(self, run: Any, folder: Path | None = None):
        self.run = run
        self.folder = folder
        self.last_step = -1

    def done(self, what: str, call: Callable[[], Any]) -> Any:
        """What `call` returns. Where W&B fails, or takes too long, it is said, nothing more is logged, and
        None is returned."""
        try:
            return _within(SECONDS, call)
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            print(f"W&B cannot {what} ({reason}); this run is recorded in its folder only.", file=sys.stderr)
            self.run = None
            return None

    def log(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Log one step; a step that was logged before is left alone, so that a history can be logged again as
        a whole."""
        if self.run is not None and step > self.last_step:
            kept, run = {k: v for k, v in scalars.items() if _is_scalar(v)}, self.run
            self.done("log", lambda: run.log(kept, step=step))
            self.last_step = step

    def log_history(self, history: Iterable[Mapping[str, Any]]) -> None:
        """Log the rows of history.parquet that were not logged live."""
        for row in history:
            self.log(int(row["step"]), row)

    def finish(self, metrics: Mapping[str, Any] | None) -> None:
        """Put `metrics` into the summary, which then equals metrics.json, and close; None marks a run that
        ended early."""
        if self.run is not None:
            run = self.run
            self.done("finish", lambda: self._finish(run, metrics))
            self.run = None

    def _finish(self, run: Any, metrics: Mapping[str, Any] | None) -> None:
        if metrics is not None:
            self._log_tables(run)
            run.summary.update(dict(metrics))
        run.finish(exit_code=0 if metrics is not None else 1)

    def _log_tables(self, run: Any) -> None:
        """Expert load on the evaluated questions and the last matrices over experts, a table each, where the
        run has any."""
        import wandb

        for name, table in tables(self.folder).items():
            run.log({f"tables/{name}": wandb.Table(dataframe=table)}, step=max(self.last_step, 0))


def _within(seconds: float, call: Callable[[], Any]) -> Any:
    """What `call` returns, or TimeoutError: in a thread that is left behind where it does not come back."""
    found: dict[str, Any] = {}

    def work() -> None:
        try:
            found["value"] = call()
        except BaseException as error:
            found["error"] = error

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError(f"no answer within {seconds:.0f} seconds")
    if "error" in found:
        raise found["error"]
    return found["value"]


def tables(folder: Path) -> dict[str, Any]:
    """`routing` (evaluated questions, all skills together) and `matrices` (last step) of a run folder as
    DataFrames, without empty ones."""
    import pandas as pd

    found = {
        name: pd.read_parquet(file)
        for name in ("routing", "matrices")
        if (file := folder / f"{name}.parquet").is_file()
    }
    if "split" in (routing := found.get("routing", pd.DataFrame())):
        found["routing"] = routing[
            (routing["split"] != "train") & (routing["skill"].isna() if "skill" in routing else True)
        ]
    if "step" in (matrices := found.get("matrices", pd.DataFrame())):
        found["matrices"] = matrices[matrices["step"] == matrices["step"].max()]
    return {name: table.dropna(axis=1, how="all") for name, table in found.items() if len(table)}


def study(cfg: RunConfig) -> str:
    """Name of the runs that may be compared with this one: task, model, and a digest of everything but
    method, seed and settings of the machine."""
    shared = {
        key: value
        for key, value in plain(cfg, hashed=True).items()
        if key not in ("method", "seed", *(k for k, v in NOT_IN_HASH.items() if v is None))
    }
    return f"{cfg.task.name}-{cfg.model.name}-{digest(shared)[:8]}"


def _wandb(cfg: RunConfig, folder: Path, run_hash: str) -> Any:
    import wandb

    options = {
        "project": cfg.logger.project,
        "group": cfg.logger.group or cfg.experiment.name or study(cfg),
        "job_type": cfg.parsed_method.name,
        "name": folder.name,
        "id": run_hash[:16],
        "tags": [cfg.task.name, cfg.model.name, cfg.data.source],
        "config": cfg.to_dict(),
        "dir": str(folder),
        "reinit": "finish_previous",
        # No host name, no machine statistics, no copy of the code: environment.json holds what is needed.
        "settings": wandb.Settings(
            silent=True,
            console="off",
            disable_git=True,
            disable_code=True,
            x_disable_meta=True,
            x_disable_stats=True,
            host="-",
        ),
    }
    if cfg.logger.mode == "offline":
        return _scalars(wandb.init(mode="offline", **options))
    try:
        return _scalars(wandb.init(mode="online", resume="allow", **options))
    except wandb.errors.Error as error:
        reason = " ".join(str(error).split())
        print(
            f"W&B online failed ({reason}); this run is logged offline, send it later with `wandb sync`.",
            file=sys.stderr,
        )
        return _scalars(wandb.init(mode="offline", **options))


def _scalars(run: Any) -> Any:
    """`run`, without the last value of every scalar among the metrics of its summary."""
    run.define_metric("*", summary="none")
    return run


def _is_scalar(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
