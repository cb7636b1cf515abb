"""Scorers: how answers are judged beside accuracy, which lm-eval takes of every question. One file each,
found by its `SCORER`; a task names those of its runs under `metadata: scorers`, those over seeds stand in
every study.

Imports nothing heavy: tables ask here what a column is.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from moabench.methods.spec import ConfigError, nearest


@dataclass(frozen=True)
class Scorer:
    """A score of many answers.

    over: `run`, a task's answers in one run, a row each as in samples.parquet, of which `score` makes a
    number; `seeds`, the answers [S][Q] of S runs that differ in their seed, None where a run has none.
    chance: `score` of guessing among the choices, from the rows; None where nothing can be said. low, high:
    its range.
    """

    name: str
    title: str
    over: Literal["run", "seeds"]
    score: Callable[[Sequence[Any]], float]
    chance: Callable[[Sequence[Any]], float] | None = None
    low: float = 0.0
    high: float = 1.0
    higher_is_better: bool = True


@cache
def all() -> dict[str, Scorer]:
    """Every scorer by name."""
    modules = [importlib.import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__)]
    return {module.SCORER.name: module.SCORER for module in modules}


def get(name: str, key: str = "scorers") -> Scorer:
    """The scorer called `name`. Raises ConfigError with the nearest name."""
    if name not in all():
        raise ConfigError(f"{key}={name!r}: no such scorer.{nearest(name, all())}")
    return all()[name]


def over(what: Literal["run", "seeds"]) -> list[Scorer]:
    """Those over runs, or over seeds, by name."""
    return [scorer for _, scorer in sorted(all().items()) if scorer.over == what]
