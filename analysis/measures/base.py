"""How a measure is declared: `@reported` above its function. That is the only place that says it.

    @reported("load/gini", "high", of="share")
    def gini(share): ...

A reader (benchmarks/observing) has some quantities of a run at hand and takes from `measured` all that is
declared of them, so that a further measure of the same quantities is one function and no other edit. What is
no plain function of quantities (a quantile of a histogram, a change since an earlier probe) is declared
without `of`, and the reader computes it by name. `catalog` collects what is declared. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

End = Literal["high", "low"]
Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Measure:
    """function: the equation, whose docstring has definition, range and source. worst: the worse end over
    sites, None where neither is. about: what of it is reported, where that is not the function's value at
    each site. of: names of the quantities that it is a function of, in the order of its arguments."""

    function: Callable[..., Any]
    worst: End | None
    about: str
    of: tuple[str, ...]


DECLARED: dict[str, Measure] = {}
"""By name, in the order of declaration; whole once `catalog` is imported."""


def reported(
    name: str, worst: End | None = None, about: str = "", of: str = ""
) -> Callable[[Function], Function]:
    """Declares the function below as the measure `name`, `<family>/<name>` in metrics.json and the tables.
    Several of these may stand above one function. of: names of quantities, with blanks between."""

    def declare(function: Function) -> Function:
        if name in DECLARED:
            raise ValueError(f"{name}: declared twice, by {DECLARED[name].function} and {function}.")
        DECLARED[name] = Measure(function, worst, about, tuple(of.split()))
        return function

    return declare


def measured(**quantities: Any) -> dict[str, Any]:
    """Every measure of which all quantities are given, by name, in the order of declaration."""
    return {
        name: measure.function(*(quantities[q] for q in measure.of))
        for name, measure in DECLARED.items()
        if measure.of and quantities.keys() >= set(measure.of)
    }


@dataclass(frozen=True)
class Headline:
    """One of the few numbers that stand for a mixture, `headline/<name>` in metrics.json. measures: it is the
    first of these that a run has. title: of its column in tables. words: what the summary of a run says of
    specialisation and collapse."""

    measures: tuple[str, ...]
    title: str
    words: str = ""


HEADLINES = {
    "max_vio": Headline(("load/max_vio",), "global MaxVio"),
    "effective_experts": Headline(("load/effective_experts",), "eff. experts"),
    "mi_minus_null": Headline(
        ("specialisation/skill_mi_minus_null", "specialisation/task_mi_minus_null"),
        "MI - null",
        "information on task or skill {:.3f} above chance",
    ),
    "expert_cka": Headline(("experts/cka",), "expert CKA", "CKA of experts {:.3f}"),
    "expert_cka_minus_null": Headline(
        ("experts/cka_minus_null",), "CKA - null", "{:+.3f} against random experts"
    ),
    "erank_ratio": Headline(
        ("representation/erank_ratio",), "erank ratio", "rank of hidden states {:.3f} of the base's"
    ),
}
