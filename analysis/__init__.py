"""What runs mean: measures as pure functions, run folders as tidy tables, statistics, plots, reports.

`moabench.analysis.load("runs/")` reads every run folder of a folder. Names are imported when they are first
used (PEP 562), so that importing this package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import Any

PUBLIC = {
    "load": "reading",
    "Study": "reading",
    "problems": "comparing",
    "leaderboard": "tables",
    "figures": "plots",
    "report": "report",
}
"""Public name -> the module that defines it."""

__all__ = ["Study", "figures", "leaderboard", "load", "problems", "report"]


def __getattr__(name: str) -> Any:
    if name in PUBLIC:
        return getattr(importlib.import_module(f"{__name__}.{PUBLIC[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *PUBLIC])
