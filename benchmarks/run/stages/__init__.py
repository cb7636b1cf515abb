"""The stages of a run, one file each: every run goes through them in this order."""

from __future__ import annotations

from . import base, evaluate, record, train
from .state import State

__all__ = ["State", "through"]


def through(state: State) -> dict:
    """All stages; the metrics of the run."""
    for stage in (base, train, evaluate, record):
        stage.run(state)
    return state.metrics
