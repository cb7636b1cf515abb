"""The method attached to the base and trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from moabench import methods
from moabench.benchmarks.bases.adapters import save_adapter
from moabench.benchmarks.data import labels
from moabench.benchmarks.machine import processes
from moabench.benchmarks.machine.files import RunError
from moabench.benchmarks.machine.globals import seed_everything
from moabench.benchmarks.run.out_of_memory import OutOfMemory, explained
from moabench.benchmarks.training import rounds
from moabench.benchmarks.training.train import LiveLog, TrainResult, train
from moabench.methods.spec import ConfigError

from .state import State


def run(state: State) -> None:
    """Trains the state's model in place; adds history, routing and metrics; writes the adapter."""
    prepared, cfg = state.prepared, state.prepared.cfg
    seed_everything(cfg.seed)  # the adapter's initialisation depends on nothing that happened before
    state.model = methods.attach(state.model, cfg.method)
    state.metrics |= {f"params/{part}": n for part, n in methods.param_count(state.model).items()}
    if not prepared.trains:
        return
    trained = _in_stages(state) if prepared.method.stages else _trained(state, state.checkpoints)
    state.tables["history"] += [{"step": row["step"], **row} for row in trained.history]
    state.tables["routing"] += trained.routing
    state.logger.log_history(state.tables["history"])
    state.metrics |= trained.metrics
    if cfg.keep != "none":
        save_adapter(cfg, state.path, prepared.inputs, state.model)


def _in_stages(state: State) -> TrainResult:
    """The method's trainings one after the other; those that are done already are read."""
    method = state.prepared.method
    key = labels.key_of(method)
    names = labels.names(state.training.rows, key) if key else state.training.skills
    results, before = [], 0
    trainings = rounds.planned(method, state.training.rows, names, key)
    for i, training in enumerate(trainings):
        folder = state.checkpoints / "checkpoints" / f"stage-{i}"
        last = i == len(trainings) - 1
        result = None if last or not state.resume else rounds.kept(folder, state.model)
        if result is None:
            with rounds.only(state.model, training.round):
                result = _trained(state, folder, training, names, key or "skill", before, probed=last)
            if not last and processes.rank() == 0:
                rounds.keep(folder, state.model, result)
        results.append((training.round.name, result))
        before += int(result.metrics["train/steps"])
    return rounds.joined(results)


def _trained(
    state: State,
    folder: Path,
    training: rounds.Training | None = None,
    names: Sequence[str] | None = None,
    key: str = "skill",
    before: int = 0,
    probed: bool = True,
) -> TrainResult:
    """One training; its checkpoints lie under `folder`. before: steps of the trainings before it. A probe
    measures in the last one."""
    cfg = state.prepared.cfg
    try:
        return train(
            state.model,
            state.tokenizer,
            state.training.rows if training is None else training.rows,
            cfg,
            folder,
            resume=state.resume,
            progress=not cfg.quiet,
            callbacks=[LiveLog(lambda step, row: state.logger.log(step + before, row))],
            skills=state.training.skills if names is None else names,
            probe=state.probe if probed else None,
            key=key,
            length=1.0 if training is None else training.length,
            share=1.0 if training is None else training.round.share,
        )
    except ConfigError as error:  # a loss that is not finite: the run stays, with its reason
        raise RunError(str(error)) from error
    except Exception as error:
        reason = explained(error, state.checkpoints)
        if isinstance(reason, OutOfMemory):
            reason.training = True
            raise reason from error
        raise
