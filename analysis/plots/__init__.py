"""Plots of a problem: `figures(problem)` gives every one that its runs have data for, `save` writes them as
files.

Each is a function of tables that returns a matplotlib `Figure`; nothing here touches pyplot's state, so a
notebook may show them, a report embed them, and a server draw them. Colours are those of Okabe and Ito, told
apart by the colour-blind, with a marker and a dash of their own for print in grey; heat maps use cividis,
whose lightness grows evenly.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from moabench.analysis.comparing import Problem
from moabench.benchmarks.machine.files import write

from . import curves, pareto, routing
from .style import Plot, routed

__all__ = ["Plot", "figures", "save", "token_plots"]


def figures(problem: Problem) -> list[Plot]:
    """Every plot of the problem; those without data are left out."""
    makers = (
        pareto.cost,
        curves.learning,
        curves.load,
        curves.collapse,
        routing.load_maps,
        routing.coactivation,
        routing.specialisation,
    )
    return [plot for make in makers for plot in make(problem)]


def token_plots(problem: Problem, text: str) -> list[Plot]:
    """Experts by token of a text, from the first run of each entry that routes; loads their models."""
    from . import tokens

    entries = routed(problem.finished, problem.study.routing)
    return [tokens.of_run(entry.finished["path"].iloc[0], text, entry.label) for entry in entries]


def save(plots: Iterable[Plot], folder: Path, form: str = "pdf") -> list[Path]:
    """Write each plot to `<folder>/<name>.<form>`; returns the files."""
    written = []
    for plot in plots:
        file = folder / f"{plot.name}.{form}"
        write(file, lambda path, figure=plot.figure: figure.savefig(path, format=form))
        written.append(file)
    return written
