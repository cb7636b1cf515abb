"""One run: found finished, resumed or done from the start, in its folder.

A finished run is answered from its folder without importing torch. Data and model folders are checked before
anything heavy is imported, so that a mistake is answered at once and leaves nothing behind.
"""

from __future__ import annotations

import dataclasses
import gc
import logging
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moabench.benchmarks.bases.folder import check_folder
from moabench.benchmarks.config.run import RunConfig
from moabench.benchmarks.config.sections import LoggerConfig
from moabench.benchmarks.data import labels
from moabench.benchmarks.fairness import budget, tuning
from moabench.benchmarks.machine import environment, files, processes
from moabench.benchmarks.machine.files import RunError
from moabench.benchmarks.machine.globals import set_globals
from moabench.benchmarks.tasks.rows import Reader

from . import loggers, several, summary
from .folder import RunFolder, State
from .out_of_memory import OutOfMemory, explained, halved
from .prepared import Prepared


@dataclass(frozen=True)
class Outcome:
    """What `run` gives back."""

    folder: Path
    metrics: dict[str, Any]
    ran: bool
    """False: the run was finished before and its record was read."""


def run(cfg: RunConfig, again: bool = True) -> Outcome:
    """Do the run, or find it done. Raises ConfigError for bad input, RunError and others for runs that fail.

    again: one that failed before starts anew; otherwise RunError with its reason.
    """
    # Before PEFT imports it: it says there that a faster CPU kernel cannot be had, and later, in every step,
    # that 8-bit products are in half precision.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    check_folder(cfg.model)
    several.check(cfg)
    processes.join(cfg.device)
    reader = Reader(cfg.data)
    cfg = labels.fitted(cfg, reader)
    with processes.first_alone():  # who keeps the solution for the others
        cfg, solution = budget.apply(cfg)
    prepared = Prepared(cfg, reader)
    folder = RunFolder(cfg.runs_dir, prepared.name, prepared.hash)
    if processes.rank() > 0:
        return _follow(prepared, folder)
    ran = False
    if folder.state() == "failed" and not again:
        reason = folder.status().get("reason", "no reason known")
        raise RunError(
            f"{folder.path} failed before and is passed over ({reason}); retry=true starts it again."
        )
    if folder.state() != "finished":
        with folder.claim() as state:
            if ran := state != "finished":
                processes.told(state)
                _announce(cfg, folder, state)
                if solution is not None and not cfg.quiet:
                    print(solution.words, file=sys.stderr)
                _execute(prepared, folder, solution, resume=state == "interrupted")
    if not ran:
        processes.told("finished")
    if not cfg.quiet:
        summary.show(folder.path, found=not ran)
    return Outcome(folder.path, folder.metrics(), ran)


def _follow(prepared: Prepared, folder: RunFolder) -> Outcome:
    """What the processes beside the first one do: the same, but what they write is thrown away."""
    state = processes.told()
    if state == "finished":
        return Outcome(folder.path, folder.metrics(), ran=False)
    prepared.cfg = dataclasses.replace(prepared.cfg, quiet=True, logger=LoggerConfig(kind="none"))
    device = set_globals(**prepared.cfg.globals)
    _tune(prepared, folder.path)
    with tempfile.TemporaryDirectory() as scratch:
        logger = loggers.start(prepared.cfg, Path(scratch), folder.hash)
        metrics = _through(prepared, Path(scratch), folder.path, device, logger, state == "interrupted")
    return Outcome(folder.path, metrics, ran=True)


def _announce(cfg: RunConfig, folder: RunFolder, state: State) -> None:
    if not cfg.quiet:
        again = {
            "interrupted": "resumes",
            "failed": "starts again (it failed before)",
            "broken": "starts again (its folder was broken)",
        }
        doing = again.get(state, "starts")
        print(f"{folder.path} {doing}", file=sys.stderr, flush=True)
        if found := cfg.departures:
            print(
                f"differs from the published setting (in brackets): {', '.join(found)}; recipe=null says "
                "that it is meant",
                file=sys.stderr,
            )


def _execute(prepared: Prepared, folder: RunFolder, solution: budget.Solution | None, resume: bool) -> None:
    """Everything between claiming the folder and its being finished."""
    cfg, path = prepared.cfg, folder.path
    if not resume:
        files.remove_folder(path / "checkpoints")
    files.write_yaml(path / "config.yaml", cfg.to_dict())
    if cfg.recipe:
        files.write_json(path / "recipe.json", {"follows": cfg.recipe.follows, "differs": cfg.departures})
    device = set_globals(**cfg.globals)
    from .fits import check as check_memory

    check_memory(prepared, device)
    if not cfg.quiet:
        from moabench.kernels import backend

        print(f"device {device}, kernels {backend.describe(device)}", file=sys.stderr)
    described = environment.describe(cfg.seed, folder.hash, prepared.inputs, device)
    earlier = files.cached(path / "environment.json") if resume else None
    files.write_json(path / "environment.json", environment.after(earlier, described))
    if described["code"]["dirty"]:
        files.write_text(path / "code.diff", environment.code_diff())
    found = _tune(prepared, path)
    logger = loggers.start(prepared.cfg, path, folder.hash)
    metrics = None
    try:
        metrics = _fitting(prepared, path, device, logger, resume) | found
        if solution is not None and cfg.budget.match == "params":  # what is reached is params/trainable
            metrics["budget/target"] = solution.target
        files.write_json(path / "metrics.json", metrics)
        if cfg.keep != "all":
            files.remove_folder(path / "checkpoints")
    except Exception as error:
        raise explained(error, path) from error
    finally:
        logger.finish(metrics)


def _tune(prepared: Prepared, path: Path) -> dict[str, Any]:
    """The best rate of the grid, if there is one, put into the config; metrics of the tuning. config.yaml
    keeps the grid; the choice is in tuning.json."""
    if not prepared.cfg.train.lr_grid or not prepared.trains:
        return {}
    prepared.cfg, found = tuning.tuned(prepared.cfg, path, lambda cfg: summary.accuracy(run(cfg).metrics))
    set_globals(**prepared.cfg.globals)  # as if there had been no trials
    return found


def _fitting(
    prepared: Prepared, path: Path, device: str, logger: loggers.Logger, resume: bool
) -> dict[str, Any]:
    """As `_through`; with train.halve again, from the last checkpoint, with smaller passes while memory does
    not do."""
    import torch

    while True:
        cfg = prepared.cfg
        try:
            return _through(prepared, path, path, device, logger, resume)
        except Exception as error:
            reason = explained(error, path)
            can = cfg.train.halve and isinstance(reason, OutOfMemory)
            smaller = halved(cfg, getattr(reason, "training", False)) if can else None
            if smaller is None:
                raise
            del reason
        # Outside of the handler: its traceback holds the frames, and these hold what filled the memory.
        gc.collect()
        if device.startswith("cuda"):
            torch.cuda.empty_cache()
        keys = ("batch_size", "accumulation", "eval_batch_size")
        was, now = ([getattr(c.train, key) for key in keys] for c in (cfg, smaller))
        changed = [
            f"train.{key}={new} (was {old})"
            for key, old, new in zip(keys, was, now, strict=True)
            if old != new
        ]
        print(f"out of memory; goes on with {', '.join(changed)}", file=sys.stderr)
        set_globals(**cfg.globals)
        prepared.cfg, resume = smaller, True


def _through(
    prepared: Prepared, path: Path, checkpoints: Path, device: str, logger: loggers.Logger, resume: bool
) -> dict[str, Any]:
    """The stages of the run; its metrics."""
    from . import stages

    return stages.through(stages.State(prepared, path, checkpoints, device, logger, resume))
