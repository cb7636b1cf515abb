"""The trained model on the reported questions, and on text that it should not forget."""

from __future__ import annotations

from moabench.benchmarks.evaluation import forgetting
from moabench.benchmarks.evaluation.evaluate import evaluate

from .state import Measured, State


def run(state: State) -> None:
    """Gives the state what was found, of the base where nothing was trained."""
    if not state.prepared.trains:
        state.found = state.base
        return
    state.found = measured(state, state.training.skills)
    state.tables["routing"] += state.found.routing
    step = state.metrics.get("train/steps", 0)
    state.tables["matrices"] += [row | {"step": step} for row in state.found.matrices]


def measured(state: State, skills: tuple[str, ...] = ()) -> Measured:
    """The model as it is now."""
    cfg, held_out = state.prepared.cfg, state.prepared.held_out
    shown, reader = not cfg.quiet, state.prepared.reader
    result = evaluate(state.model, state.tokenizer, cfg.task.eval, cfg, shown, skills, reader)
    metrics = dict(result.metrics)
    if held_out:
        size = cfg.train.eval_batch_size
        loss = forgetting.text_loss(state.model, state.tokenizer, held_out, size, progress=shown)
        metrics |= {f"forgetting/{key}": value for key, value in loss.items()}
    return Measured(metrics, result.samples, list(result.routing), list(result.matrices))
