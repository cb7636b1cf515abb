"""Every measure that runs report, collected from the files of this folder. `python -m
moabench.analysis.measures.catalog` prints the list."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from .base import DECLARED, HEADLINES, measured

__all__ = ["MEASURES", "headlines", "measured", "over_sites", "table"]

for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
    if module.name != Path(__file__).stem:
        importlib.import_module(f"{__package__}.{module.name}")

MEASURES = dict(sorted(DECLARED.items()))
"""By name in metrics.json and the tables."""


def over_sites(name: str, values: Tensor) -> dict[str, float]:
    """`name`: mean over sites [S], and `name_worst`, since a mean hides one collapsed layer. NaN is left out,
    as is what has no value."""
    values = values[~values.isnan()]
    if not len(values):
        return {}
    worst = {"high": torch.amax, "low": torch.amin, None: None}[MEASURES[name].worst]
    return {name: values.mean().item()} | ({f"{name}_worst": worst(values, 0).item()} if worst else {})


def headlines(metrics: Mapping[str, float], heterogeneous: bool) -> dict[str, float]:
    """The `headline/...` numbers of a run and their `_worst`, where their measures are defined.

    heterogeneous: experts of different kinds or at different places under one router, whose effects gates do
    not tell: their effective experts are those of the contribution.
    """
    found = {}
    for name, headline in HEADLINES.items():
        source = next((key for key in headline.measures if key in metrics), None)
        if name == "effective_experts" and heterogeneous:
            source = "load/contribution_effective_experts"
        for end in ("", "_worst"):
            if (value := metrics.get(f"{source}{end}")) is not None:
                found[f"headline/{name}{end}"] = value
    return found


def table() -> str:
    """The list in Markdown: name, function, definition (the first paragraph of its docstring), what is
    reported, worse end."""
    rows = ["| measure | function | definition | reported | worst |", "|---|---|---|---|---|"]
    for name, measure in MEASURES.items():
        f = measure.function
        definition = " ".join((f.__doc__ or "").split("\n\n")[0].split()).replace("|", "\\|")
        place = f"{f.__module__.rpartition('.')[2]}.{f.__name__}"
        rows.append(f"| `{name}` | `{place}` | {definition} | {measure.about} | {measure.worst or ''} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(table())
