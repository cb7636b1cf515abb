"""`train.lr_grid=[5e-4,1e-3,2e-3]`: every method gets the learning rate that suits it, found with equal
effort and without the test split.

One learning rate for all methods favours some. With a grid a run trains once for each rate, on nine tenths of
its training rows, and is judged on the held-out tenth (mean accuracy over tasks); then it trains with the
best rate on all rows, and the reported split is evaluated that once. Equal accuracies: the lower rate. The
trials are runs of their own in the run's folder `trials/`, found again when the run resumes; a trial that
fails (a rate at which the loss is not finite) is recorded and passed over. With method=full the rates keep
the ratio of `lr_full` to `lr`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moabench.benchmarks.config.run import RunConfig
from moabench.benchmarks.config.sections import LoggerConfig, TaskConfig
from moabench.benchmarks.machine import files, processes
from moabench.benchmarks.machine.files import RunError
from moabench.benchmarks.tasks.rows import splits
from moabench.methods.spec import ConfigError

Judge = Callable[[RunConfig], float | None]
"""Does a run and gives its mean accuracy."""


@dataclass(frozen=True)
class Trial:
    """One rate. accuracy: mean over tasks on held-out rows, None where it failed, `reason` then says why."""

    lr: float
    accuracy: float | None
    reason: str | None = None


def tuned(cfg: RunConfig, folder: Path, judge: Judge) -> tuple[RunConfig, dict[str, Any]]:
    """(`cfg` with the best rate of its grid, metrics of the tuning); `folder/tuning.json` records all trials.
    judge: does one.

    Raises ConfigError where no evaluated task has training rows of its own, RunError where every trial fails.
    """
    names = tuple(name for name in cfg.task.eval if "train" in splits(name, cfg.data))
    if not names:
        raise ConfigError(
            f"train.lr_grid={list(cfg.train.lr_grid)}: none of {', '.join(cfg.task.eval)} has a train "
            "split to hold rows out of."
        )
    trials = [_trial(_at(cfg, lr, names, folder), lr, judge) for lr in cfg.train.lr_grid]
    worked = [trial for trial in trials if trial.accuracy is not None]
    record = {"tasks": names, "trials": [vars(trial) for trial in trials]}
    if not worked:
        _write(folder, record)
        raise RunError("; ".join(f"train.lr={trial.lr:g}: {trial.reason}" for trial in trials))
    best = min(worked, key=lambda trial: (-trial.accuracy, trial.lr))
    _write(folder, record | {"chosen": best.lr})
    return _with_rate(cfg, best.lr), {
        "tuning/lr": best.lr,
        "tuning/accuracy": best.accuracy,
        "tuning/trials": len(trials),
    }


def _write(folder: Path, record: dict[str, Any]) -> None:
    if processes.rank() == 0:
        files.write_json(folder / "tuning.json", record)


def _at(cfg: RunConfig, lr: float, tasks: tuple[str, ...], folder: Path) -> RunConfig:
    """The run of one trial: measures that selection does not need are left out."""
    data = replace(cfg.data, held_out=True)
    train = replace(_with_rate(cfg, lr).train, lr_grid=())
    task = TaskConfig(cfg.task.name, tasks)
    out = {"logger": LoggerConfig(kind="none"), "runs_dir": str(folder / "trials"), "forgetting": "none"}
    return replace(
        cfg, data=data, train=train, task=task, probe=replace(cfg.probe, times=0), quiet=True, **out
    )


def _with_rate(cfg: RunConfig, lr: float) -> RunConfig:
    """`cfg` at one rate of the grid, `lr_full` in proportion."""
    return replace(cfg, train=replace(cfg.train, lr=lr, lr_full=lr * cfg.train.lr_full / cfg.train.lr))


def _trial(cfg: RunConfig, lr: float, judge: Judge) -> Trial:
    try:
        return Trial(lr, judge(cfg))
    except (ConfigError, OSError):
        raise
    except RunError as error:
        return Trial(lr, None, str(error))
