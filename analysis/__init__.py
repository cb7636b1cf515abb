"""What runs mean: measures as pure functions, run folders as tidy tables, statistics, plots, reports.

`moabench.analysis.load("runs/")` reads every run folder of a folder. Names are imported when they are first
used (PEP 562), so that importing this package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what editors and type checkers follow
    from moabench.benchmarks.run.reading import Study, load

    from .comparing import problems
    from .plots import figures
    from .report import report
    from .tables import leaderboard

_HOME = {
    "load": "moabench.benchmarks.run.reading",
    "Study": "moabench.benchmarks.run.reading",
    "problems": "moabench.analysis.comparing",
    "leaderboard": "moabench.analysis.tables",
    "figures": "moabench.analysis.plots",
    "report": "moabench.analysis.report",
}
"""Public name -> the module that defines it."""

__all__ = ["Study", "figures", "leaderboard", "load", "problems", "report"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
