"""The method attached to the base and trained."""

from __future__ import annotations

from moabench import methods
from moabench.benchmarks.bases.adapters import save_adapter
from moabench.benchmarks.machine.files import RunError
from moabench.benchmarks.machine.globals import seed_everything
from moabench.benchmarks.run.out_of_memory import OutOfMemory, explained
from moabench.benchmarks.training.train import LiveLog, train
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
    try:
        trained = train(
            state.model,
            state.tokenizer,
            state.training.rows,
            cfg,
            state.checkpoints,
            resume=state.resume,
            progress=not cfg.quiet,
            callbacks=[LiveLog(state.logger.log)],
            skills=state.training.skills,
            probe=state.probe,
        )
    except ConfigError as error:  # a loss that is not finite: the run stays, with its reason
        raise RunError(str(error)) from error
    except Exception as error:
        reason = explained(error, state.checkpoints)
        if isinstance(reason, OutOfMemory):
            reason.training = True
            raise reason from error
        raise
    state.tables["history"] += [{"step": row["step"], **row} for row in trained.history]
    state.tables["routing"] += trained.routing
    state.logger.log_history(state.tables["history"])
    state.metrics |= trained.metrics
    if cfg.keep != "none":
        save_adapter(cfg, state.path, prepared.inputs, state.model)
