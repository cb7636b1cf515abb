"""A picture of a report: the time of every rival, as a ratio, a panel a setting."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

from .measure import Report, Row

TIMES = ("time", "step", "step as a CUDA graph", "decode of 16 tokens")


def panels(report: Report) -> list[tuple[str, list[Row]]]:
    """Title and rows of each panel."""
    rows = [r for r in report.rows if r.quantity in TIMES and r.ratio_to]

    def key(row: Row) -> tuple:
        return row.level, row.quantity, row.width, row.dtype, row.tokens

    return [
        (f"{level}, {quantity}: {width} wide, {dtype}, {tokens} tokens", list(found))
        for (level, quantity, width, dtype, tokens), found in groupby(sorted(rows, key=key), key)
    ]


def draw(report: Report, path: Path) -> None:
    """Horizontal bars of the ratios, floors of train steps as marks, written to `path`."""
    from matplotlib.figure import Figure

    found = panels(report)
    heights = [1 + 0.2 * len(rows) for _, rows in found]
    figure = Figure(figsize=(9, sum(heights)), layout="constrained")
    axes = figure.subplots(len(found), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for (title, rows), axis in zip(found, axes, strict=True):
        axis.barh([f"{r.case}: {r.rival}" for r in rows], [r.ratio for r in rows], color="#4477aa")
        if rows[0].quantity == "step":
            floors = {
                (r.case, r.rival): r.median
                for r in report.find(quantity="floor of the step", width=rows[0].width, dtype=rows[0].dtype)
            }
            axis.plot(
                [floors[r.case, r.rival] for r in rows],
                range(len(rows)),
                "k|",
                markersize=9,
                label="floor by FLOPs",
            )
            axis.legend(loc="lower right")
        axis.axvline(1, color="#bbbbbb", linewidth=1, zorder=0)
        axis.set(title=title, xlim=(0, None), xlabel=f"ratio to {rows[0].ratio_to}")
        axis.invert_yaxis()
    figure.savefig(path, dpi=120)
