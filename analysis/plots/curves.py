"""What changes while training goes on: losses, expert load and router entropy (history), collapse of experts
(probes)."""

from __future__ import annotations

import math

import matplotlib as mpl
import pandas as pd

from moabench.analysis.comparing import Problem
from moabench.analysis.statistics import LEVEL

from .style import STYLE, Plot, band, legend_below, log_ticks, numbers, panels, routed

LOAD = {
    "load/entropy": "evenness of the load, H(f) / ln E",
    "load/max_vio": "MaxVio of the tokens since the last step",
    "load/router_entropy": "router entropy, / ln E",
}
COLLAPSE = {
    "experts/cka_minus_null": "CKA of experts, less that of random ones",
    "experts/output_cosine": "cosine between experts' outputs",
    "experts/overlap_out": "overlap of experts' output spaces",
    "representation/erank_ratio": "effective rank of hidden states, on / off",
    "routing/fluctuation": "tokens that changed expert",
    "experts/output_erank": "effective rank of experts' outputs",
}
BAND = (
    f"Lines: mean over seeds; bands: {100 * LEVEL:.0f} % interval over seeds (Student's), cut where the "
    "panel ends, which is as tall as the seeds need."
)


def learning(problem: Problem) -> list[Plot]:
    """Training loss of the task."""
    return _curves(
        problem, problem.study.history, {"loss/task": "training loss, nats a token"}, "learning",
        "Learning curves",
        "Loss on the answers of the training rows, mean of the steps since the last logged "
            f"one. {BAND}", "log",
    )  # fmt: skip


def load(problem: Problem) -> list[Plot]:
    """Evenness of the load, its worst expert, and how decided the router is."""
    return _curves(
        problem, problem.study.history, LOAD, "load", "Load and router entropy over training",
        "Mean over sites, of the tokens trained on since the last logged step. Router entropy: 1 is "
            f"undecided, 0 sure of one expert; gates that do not sum to one are normalised. {BAND}",
    )  # fmt: skip


def collapse(problem: Problem) -> list[Plot]:
    """How alike experts are, and what becomes of the hidden states, on a fixed set of tokens."""
    probes = problem.study.probes
    if "measure" not in probes:
        return []
    wide = probes.pivot_table(
        index=["run", "step"], columns="measure", values="value", aggfunc="mean"
    ).reset_index()
    return _curves(
        problem, wide, COLLAPSE, "collapse", "Collapse over training",
        "Mean over probed sites, on the same tokens for every entry and seed. CKA above 0, high cosine and "
            f"overlap: experts are alike. Definitions: docs/measures.md. {BAND}",
    )  # fmt: skip


def _curves(
    problem: Problem,
    table: pd.DataFrame,
    columns: dict,
    name: str,
    title: str,
    caption: str,
    scale: str = "linear",
) -> list[Plot]:
    """A panel a column that the table has; entries without values in any of them are left out."""
    there = {
        column: label for column, label in columns.items() if column in table and table[column].notna().any()
    }
    if not there:
        return []
    table = table[table[list(there)].notna().any(axis=1)]
    entries = [e for e in routed(problem.finished, table) if not e.seedless]
    looks = numbers(problem)
    if not entries:
        return []
    figure, axes = panels(
        len(there), width=4.8 if len(there) == 1 else 3.2, height=2.5, legend=math.ceil(len(entries) / 4)
    )
    with mpl.rc_context(STYLE):
        for axis, (column, label) in zip(axes, there.items(), strict=True):
            for entry in entries:
                rows = table[table["run"].isin(entry.finished["run"])].dropna(subset=[column])
                if len(rows):
                    band(axis, rows, column, looks[entry.label], entry.label)
            axis.set_title(label)
            axis.set_xlabel("step")
            axis.set_yscale(scale)
            if scale == "log":
                log_ticks(axis.yaxis)
        _legend(figure, axes)
    return [Plot(name, title, caption, figure)]


def _legend(figure, axes) -> None:
    """From the panel that has most entries."""
    legend_below(figure, max(axes, key=lambda axis: len(axis.get_legend_handles_labels()[1])))
