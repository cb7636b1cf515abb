"""The frozen base: loaded, and evaluated as it is, once for each model, data, tasks and way of evaluating."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moabench.benchmarks.bases.loading import load_model
from moabench.benchmarks.config.hashing import digest, plain
from moabench.benchmarks.machine import files, processes
from moabench.benchmarks.observing.probe import Probe

from .evaluate import measured
from .state import Measured, State


def run(state: State) -> None:
    """Gives the state its training rows, model, tokenizer, base and probe."""
    prepared, cfg = state.prepared, state.prepared.cfg
    if prepared.trains:
        state.training = prepared.training_rows(state.path)
        state.metrics |= state.training.metrics
    state.model, state.tokenizer = load_model(cfg.model, cfg.seed, "cpu" if cfg.shard else state.device)
    prepared.weights.check()
    if cfg.shard:
        processes.shard(state.model, state.device)
    state.base = _frozen(state)
    if prepared.trains and cfg.probe.times:  # it sees the frozen model
        state.probe = Probe(cfg, state.model, state.tokenizer, state.training.skills, prepared.reader)


def _frozen(state: State) -> Measured:
    """Measured, or read where it was measured before."""
    prepared, cfg = state.prepared, state.prepared.cfg
    shared: dict[str, Any] = {
        "model": plain(cfg.model, hashed=True),
        "weights": prepared.inputs["model"],
        "data": {key: value for key, value in plain(cfg.data, hashed=True).items() if key != "train_limit"},
        "rows": prepared.inputs["evaluation"],
        "tasks": cfg.task.eval,
        "protocol": cfg.protocol,
        "held_out": prepared.held_out,
        "seed": cfg.seed if cfg.model.kind == "random" else None,
        "device": state.device,
        "batch": cfg.train.eval_batch_size,
    }
    file = Path(cfg.runs_dir).expanduser() / ".base" / f"{cfg.model.name}-{digest(shared)[:16]}.json"
    known = files.cached(file)
    if known is None:
        known = vars(measured(state))
        prepared.weights.check()
        files.write_json(file, known)
    return Measured(**known)
