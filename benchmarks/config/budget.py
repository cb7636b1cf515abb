"""`budget=` as written: what every method of a study may cost. Solved in benchmarks/fairness/budget.py."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from moabench.methods import catalog
from moabench.methods.sizes import of_rank, sized
from moabench.methods.spec import ConfigError, Positive, nearest

MOST = 10**11
"""Parameters of the largest budget; more than any base here has."""

UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}


@dataclass(frozen=True)
class BudgetConfig:
    """What every method of a study may cost."""

    size: str | int | float = "none"
    """none; `<method>` or `<method>_r<rank>`; `<x>%` of the base's parameters; or a number of parameters with
    k, M or B."""
    match: Literal["params", "flops", "time"] = "params"
    """Trainable parameters; or FLOPs or seconds of training."""
    tolerance: Positive = 0.02
    """How far the parameters may be from the budget's, as a share of it."""
    reference_length: Positive | None = None
    """Steps or epochs of the reference, with match=flops and time; filled in when the length of training is
    solved for."""

    def __post_init__(self) -> None:
        goal = Goal.read(self.size)
        if self.match != "params" and goal.kind not in ("none", "method"):
            raise ConfigError(f"size={self.size!r}: expected a method, as lora_r16, with match={self.match}.")


@dataclass(frozen=True)
class Goal:
    """A budget as written: a method as data, a share of the base, or a number of parameters."""

    kind: Literal["none", "method", "share", "count"]
    value: float = 0.0
    method: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, size: Any) -> Goal:
        """Raises ConfigError."""
        text = str(size).strip()
        if text == "none":
            return cls("none")
        if found := re.fullmatch(r"(\d+(?:\.\d+)?)%", text):
            if 0 < float(found[1]) <= 100:
                return cls("share", float(found[1]) / 100)
        elif found := re.fullmatch(r"(\d+(?:\.\d+)?)([kmb]?)", text, re.IGNORECASE):
            if 1 <= (count := float(found[1]) * UNITS[found[2].lower()]) <= MOST:
                return cls("count", count)
        elif (found := re.fullmatch(r"([a-z]\w*?)(?:_r([1-9]\d{0,5}))?", text)) and found[1] in sized():
            return cls("method", method=of_rank(catalog.raw(found[1]), found[2] and int(found[2])))
        expected = (
            "none, a method (lora_r16, moa_soft), a share of the base (0.5%) or a number of parameters (2M) "
            "up to 100B"
        )
        near = nearest(text, ["none", *(name + rank for name in sized() for rank in ("", "_r16"))])
        raise ConfigError(f"size={text[:100]!r}: expected {expected}.{near if 'mean' in near else ''}")
