"""How plots look: colours, markers and dashes of entries, panels, bands over seeds."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from moabench.analysis.comparing import Entry, Problem
from moabench.analysis.statistics import t_interval

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F6000")
MARKERS = "osD^vPX*<>"
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)), (0, (7, 2)), (0, (3, 1)))
PANELS_A_ROW = 3

STYLE = {
    "font.size": 9, "axes.titlesize": 9, "axes.labelsize": 9, "legend.fontsize": 8, "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "savefig.dpi": 150, "figure.dpi": 100, "pdf.fonttype": 42, "svg.fonttype": "path",
}  # fmt: skip


@dataclass(frozen=True)
class Plot:
    """A figure with the name of its file and what a reader must know to read it."""

    name: str
    title: str
    caption: str
    figure: Figure

    def _repr_png_(self) -> bytes:
        """What a notebook shows."""
        file = io.BytesIO()
        self.figure.savefig(file, format="png", dpi=110)
        return file.getvalue()


def panels(
    count: int,
    width: float = 3.3,
    height: float | Sequence[float] = 2.6,
    across: int = PANELS_A_ROW,
    legend: int = 0,
) -> tuple[Figure, list[Axes]]:
    """A figure with `count` panels, `across` in a row, each `width` x `height` inches (of each panel: a row
    is as tall as its tallest); room below for `legend` rows of a legend."""
    heights = [height] * count if isinstance(height, int | float) else list(height)
    columns, tall = min(count, across), [max(heights[i : i + across]) for i in range(0, count, across)]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(width * columns, sum(tall) + 0.22 * legend), layout="constrained")
        axes = figure.subplots(len(tall), columns, squeeze=False, height_ratios=tall).ravel().tolist()
    for spare in axes[count:]:
        spare.remove()
    return figure, axes[:count]


def numbers(problem: Problem) -> dict[str, int]:
    """Label -> number of its look, the same in every plot of the problem."""
    return {label: i for i, label in enumerate(sorted(e.label for e in problem.finished if not e.seedless))}


def log_ticks(axis: Any) -> None:
    """Ticks of a logarithmic axis at 1, 2, 5 in plain digits (200k, 1M)."""
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: _digits(value)))
    axis.set_minor_formatter(NullFormatter())


def _digits(value: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def look(number: int) -> dict[str, Any]:
    """Colour, marker and dash of the n-th entry."""
    return {
        "color": COLOURS[number % len(COLOURS)],
        "marker": MARKERS[number % len(MARKERS)],
        "linestyle": DASHES[number % len(DASHES)],
    }


def band(axis: Axes, rows: pd.DataFrame, column: str, number: int, label: str) -> None:
    """Mean over runs of a column by step, with its interval over runs as a band. The panel is as tall as the
    runs need: with two or three of them the interval may be much wider, and is cut there."""
    table = rows.pivot_table(index="step", columns="run", values=column, aggfunc="mean").dropna()
    style = look(number)
    every = max(1, len(table) // 8)
    axis.plot(
        table.index,
        table.mean(axis=1),
        label=label,
        markevery=(number % every, every),
        markersize=4,
        linewidth=1.4,
        **style,
    )
    if table.shape[1] > 1:
        ends = [t_interval(values)[1:] for values in table.to_numpy()]
        seen = axis.dataLim.frozen()
        axis.fill_between(
            table.index, *zip(*ends, strict=True), color=style["color"], alpha=0.15, linewidth=0
        )
        axis.dataLim.set(seen)  # the band does not stretch the panel, the runs do
        axis.update_datalim(
            [(table.index[0], value) for value in (table.min(axis=None), table.max(axis=None))]
        )


def legend_below(figure: Figure, axis: Axes, columns: int = 4) -> None:
    """One legend for the whole figure, below its panels."""
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(columns, len(labels)), frameon=False)


def heat(
    axis: Axes,
    values: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    limits: tuple[float, float],
    write: bool,
) -> Any:
    """A heat map with a cell's value in it where `write`; NaN is left white."""
    image = axis.imshow(
        np.ma.masked_invalid(values), cmap="cividis", vmin=limits[0], vmax=limits[1], aspect="auto"
    )
    turned = max(map(len, columns), default=0) > 3
    axis.set_xticks(
        range(len(columns)), columns, rotation=40 if turned else 0, ha="right" if turned else "center"
    )
    axis.set_yticks(range(len(rows)), rows)
    axis.grid(False)
    axis.spines[:].set_visible(False)
    if write:
        middle = (limits[0] + limits[1]) / 2
        for (i, j), value in np.ndenumerate(values):
            if not math.isnan(value):
                axis.text(
                    j,
                    i,
                    f"{value:.1f}" if value >= 0.995 else f"{value:.2f}"[1:],
                    ha="center",
                    va="center",
                    fontsize=6.5,
                    color="white" if value < middle else "black",
                )
    return image


def short_site(site: str) -> str:
    """`model.layers.3.q` as `3 q`."""
    found = re.search(r"layers\.(\d+)(?:\.(.+))?$", site)
    return " ".join(part for part in found.groups() if part) if found else site


def file_name(label: str) -> str:
    """A label as part of a file name."""
    return re.sub(r"[^\w.-]+", "_", label).strip("_")


def routed(entries: Sequence[Entry], tables: pd.DataFrame) -> list[Entry]:
    """The entries that have a row in a table."""
    runs = set(tables["run"])
    return [entry for entry in entries if runs & set(entry.finished["run"])]


def first_run(entry: Entry, table: pd.DataFrame) -> tuple[pd.DataFrame, int]:
    """The rows of the entry's first run that has some, and its seed: experts of different seeds have no order
    in common."""
    for run, seed in zip(entry.finished["run"], entry.finished["seed"], strict=True):
        if len(rows := table[table["run"] == run]):
            return rows, int(seed)
    return table.iloc[:0], -1
