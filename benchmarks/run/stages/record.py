"""The tables of a run, and the metrics that compare it with its base."""

from __future__ import annotations

from moabench.analysis.measures.catalog import headlines
from moabench.benchmarks.evaluation import forgetting
from moabench.benchmarks.machine import files

from .state import State


def run(state: State) -> None:
    """Writes everything but metrics.json, which says that all of it is there."""
    prepared, base, found = state.prepared, state.base, state.found
    prepared.weights.check()
    state.metrics |= found.metrics
    state.metrics |= {
        f"base/{key.removeprefix('eval/')}": value
        for key, value in base.metrics.items()
        if key.startswith("eval/")
    }
    if prepared.held_out:
        state.metrics |= forgetting.change(base.metrics, found.metrics)
    if (probe := state.probe) is not None:
        probe.finish()
        state.metrics |= probe.metrics()
        files.write_json(state.path / "probe.json", probe.record())
        state.tables["probes"] = probe.rows
        state.tables["matrices"] = [*probe.matrices, *state.tables["matrices"]]
    state.metrics |= headlines(state.metrics, prepared.method.heterogeneous)
    state.tables["samples"] = found.samples
    for name, rows in state.tables.items():
        files.write_parquet(state.path / f"{name}.parquet", rows)
    files.write_json(state.path / "protocol.json", prepared.protocols)
