"""Accuracy against what it costs: trainable parameters, time of a training step, peak memory, with the Pareto
front."""

from __future__ import annotations

import math
from collections.abc import Sequence

import matplotlib as mpl
from matplotlib.axes import Axes

from moabench.analysis.comparing import Entry, Problem
from moabench.analysis.statistics import Interval, t_interval

from .style import STYLE, Plot, legend_below, log_ticks, look, numbers, panels

COSTS = {
    "trainable parameters": lambda entry: entry.mean("params/trainable"),
    "milliseconds a training step": lambda entry: (
        1e3 * entry.mean("train/seconds") / entry.mean("train/steps")
    ),
    "peak memory, MB": lambda entry: entry.mean("memory/peak_bytes") / 1e6,
}

CAPTION = (
    "Mean accuracy over tasks and seeds against cost. Bars: 95 % interval over seeds (Student's; none with "
    "one seed). Line: the Pareto front, entries that none at hand beats in both; where intervals overlap, "
    "its order is not shown. Dotted: the frozen base. Time and memory are those of the machines that the "
    "runs were made on."
)


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Positions of the (cost, accuracy) that no other point beats in one without losing in the other, by
    cost; NaN never is."""
    known = [i for i, (cost, value) in enumerate(points) if not (math.isnan(cost) or math.isnan(value))]
    found, best = [], -math.inf
    for i in sorted(known, key=lambda i: (points[i][0], -points[i][1])):
        if points[i][1] > best:
            found.append(i)
            best = points[i][1]
    return found


def cost(problem: Problem) -> list[Plot]:
    """One plot of three panels, if an entry has been trained."""
    entries = [
        e
        for e in problem.finished
        if not math.isnan(e.mean("train/steps")) and e.finished["accuracy"].notna().all()
    ]
    if not entries:
        return []
    figure, axes = panels(len(COSTS), width=3.2, height=2.9, legend=math.ceil(len(entries) / 4))
    values = [t_interval(entry.finished["accuracy"]) for entry in entries]
    base = next((e.mean("accuracy") for e in problem.finished if e.seedless), None)
    with mpl.rc_context(STYLE):
        for axis, (title, of) in zip(axes, COSTS.items(), strict=True):
            _panel(axis, entries, [of(entry) for entry in entries], values, numbers(problem))
            axis.set_xlabel(title)
            if base is not None:
                axis.axhline(100 * base, color="0.4", linestyle=":", linewidth=1)
        axes[0].set_ylabel("accuracy, %")
        legend_below(figure, axes[0])
    return [Plot("cost", "Accuracy against cost", CAPTION, figure)]


def _panel(
    axis: Axes,
    entries: Sequence[Entry],
    costs: Sequence[float],
    values: Sequence[Interval],
    looks: dict[str, int],
) -> None:
    for entry, x, (y, low, high) in zip(entries, costs, values, strict=True):
        bars = None if math.isnan(low) else [[100 * (y - low)], [100 * (high - y)]]
        style = look(looks[entry.label]) | {"linestyle": "none"}
        axis.errorbar(
            x, 100 * y, yerr=bars, capsize=2, elinewidth=0.8, markersize=6, label=entry.label, **style
        )
    points = list(zip(costs, (value.value for value in values), strict=True))
    best = [points[i] for i in front(points)]
    axis.step(
        [x for x, _ in best], [100 * y for _, y in best], where="post", color="0.55", linewidth=1, zorder=0
    )
    known = [x for x in costs if x > 0]
    if known and max(known) > 5 * min(known):
        axis.set_xscale("log")
        axis.set_xlim(min(known) / 1.4, max(known) * 1.4)
        log_ticks(axis.xaxis)
    else:
        axis.margins(x=0.15)
