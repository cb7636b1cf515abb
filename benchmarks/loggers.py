"""Weights & Biases as a view of a run. The run folder is the record; nothing here can fail a run that the folder can keep.

Offline by default: the files lie in the run folder, and `wandb sync` sends them later. Runs are grouped by method.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from moabench.benchmarks.config import RunConfig


def start(cfg: RunConfig, folder: Path, run_hash: str) -> Logger:
    """The logger that `cfg.logger` asks for; one that logs nothing, and says so, if W&B cannot start."""
    if cfg.logger.kind == "none":
        return Logger(None)
    try:
        return Logger(_wandb(cfg, folder, run_hash))
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        print(f"W&B cannot start ({reason}); this run is recorded in its folder only.", file=sys.stderr)
        return Logger(None)


class Logger:
    """Scalars by step while the run goes on, the metrics at its end. Without a W&B run it does nothing."""

    def __init__(self, run: Any):
        self.run = run
        self.last_step = -1
        if run is not None:
            run.define_metric("*", summary="none")  # else the last value of every scalar joins the metrics in the summary

    def log(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Log one step; a step that was logged before is left alone, so that a history can be logged again as a whole."""
        if self.run is not None and step > self.last_step:
            self.run.log({k: v for k, v in scalars.items() if _is_scalar(v)}, step=step)
            self.last_step = step

    def log_history(self, history: Iterable[Mapping[str, Any]]) -> None:
        """Log the rows of history.parquet that were not logged live."""
        for row in history:
            self.log(int(row["step"]), row)

    def finish(self, metrics: Mapping[str, Any] | None) -> None:
        """Put `metrics` into the summary, which then equals metrics.json, and close; None marks a run that ended early."""
        if self.run is None:
            return
        if metrics is not None:
            self.run.summary.update(dict(metrics))
        self.run.finish(exit_code=0 if metrics is not None else 1)
        self.run = None


def _wandb(cfg: RunConfig, folder: Path, run_hash: str) -> Any:
    import wandb

    method = cfg.parsed_method.name
    options = {
        "project": cfg.logger.project,
        "group": cfg.logger.group or method,
        "name": folder.name,
        "id": run_hash[:16],
        "tags": [cfg.task.name, cfg.model.name, cfg.data.source],
        "config": cfg.to_dict(),
        "dir": str(folder),
        "reinit": "finish_previous",
        # No host name, no machine statistics, no copy of the code: environment.json holds what is needed.
        "settings": wandb.Settings(
            silent=True, console="off", disable_git=True, disable_code=True, x_disable_meta=True, x_disable_stats=True, host="-"
        ),
    }
    if cfg.logger.mode == "offline":
        return wandb.init(mode="offline", **options)
    try:
        return wandb.init(mode="online", resume="allow", **options)
    except wandb.errors.Error as error:
        reason = " ".join(str(error).split())
        print(f"W&B online failed ({reason}); this run is logged offline, send it later with `wandb sync`.", file=sys.stderr)
        return wandb.init(mode="offline", **options)


def _is_scalar(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
