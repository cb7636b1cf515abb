"""Every measure that runs report, by its name in metrics.json and the tables. `python -m
moabench.analysis.measures.catalog` prints the list."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from . import balance, experts, optimisation, representation, routing, specialisation


@dataclass(frozen=True)
class Measure:
    """function: the equation, whose docstring has definition, range and source. worst: the worse end over
    sites, None where neither is. about: what of it is reported, where that is not the function's value at
    each site."""

    function: Callable
    worst: Literal["high", "low"] | None = None
    about: str = ""


MEASURES = {
    # evaluated questions and training: benchmarks/readings.py
    **{
        f"load/{name}": Measure(f, "low" if name in ("entropy", "effective_experts") else "high")
        for name, f in balance.BALANCE.items()
    },
    "load/max_vio_batch": Measure(balance.max_vio, "high", "of each batch, averaged"),
    "load/gate_mass": Measure(balance.mean_active, None, "mean sum of the weights of a token"),
    "load/dead_share": Measure(balance.dead_share, "high"),
    "load/mean_active": Measure(balance.mean_active),
    "load/dropped_share": Measure(balance.dropped_share, "high"),
    "load/router_entropy": Measure(routing.router_entropy, None, "mean over tokens"),
    "load/decisiveness": Measure(routing.decisiveness, "low"),
    "routing/entropy_q10": Measure(routing.quantile, None, "10 % quantile of `router_entropy`"),
    "routing/entropy_q90": Measure(routing.quantile, None, "90 % quantile of `router_entropy`"),
    "routing/logsumexp": Measure(optimisation.logsumexp, None, "mean over tokens"),
    # evaluated questions only
    "routing/margin_q10": Measure(routing.margin, "low", "10 % quantile, of probabilities, where k is "
        "fixed and below E"),
    "routing/coactivation": Measure(routing.coactivation_peak, None, "sparse mixtures"),
    "routing/coactivation_excess": Measure(routing.coactivation_excess, "high", "sparse mixtures"),
    **{
        f"specialisation/{label}_mi{suffix}": Measure(function, worst, f"with the {label} of each "
            f"sequence{about}")
        for label in ("task", "skill")
        for suffix, function, worst, about in (
            ("", specialisation.information_share, None, ""),
            ("_null", specialisation.shuffled_information, None, ""),
            ("_minus_null", specialisation.information_share, "low", ", minus the null"),
        )
    },
    # probes: benchmarks/probe.py
    "load/contribution_effective_experts": Measure(balance.contribution, "low", "its `effective_experts`"),
    "load/contribution_max_vio": Measure(balance.contribution, "high", "its `max_vio`"),
    "routing/fluctuation": Measure(routing.fluctuation, None, "since the probe before; `total_variation` "
        "unless k is fixed"),
    "routing/saturation": Measure(routing.agreement, None, "of each probe with the last; 1 - "
        "`total_variation` unless k is fixed"),
    "routing/affinity": Measure(routing.affinity_information, None, "with the same place one layer before"),
    "specialisation/token_id": Measure(specialisation.token_id_share, None, "last probe"),
    "specialisation/token_id_null": Measure(specialisation.token_id_share, None, "with the ids shuffled"),
    "specialisation/vocabulary": Measure(specialisation.vocabulary_specialisation, None, "last probe"),
    "experts/cka": Measure(experts.cka, "high", "debiased, mean off the diagonal"),
    "experts/output_cosine": Measure(experts.output_cosine, "high", "mean off the diagonal"),
    "experts/zero_share": Measure(experts.zero_share, "high", "mean over experts"),
    "experts/output_erank": Measure(experts.effective_rank, "low", "of each expert's centred outputs, mean "
        "over experts"),
    "experts/weight_cosine": Measure(experts.weight_cosine, "high", "mean off the diagonal; low-rank experts "
        "on one linear"),
    "experts/overlap_in": Measure(experts.overlap, "high", "of leading input directions; the same experts"),
    "experts/overlap_out": Measure(experts.overlap, "high", "of leading output directions; the same experts"),
    "experts/update_erank": Measure(experts.effective_rank, "low", "of each expert's update, mean over "
        "experts; the same experts"),
    "representation/rc": Measure(representation.within_between, None, "token-level routers"),
    "representation/rc_shuffled": Measure(representation.shuffled_within_between),
    "representation/clustering": Measure(representation.clustering),
    "representation/span_share": Measure(representation.span_share, None, "linear routers"),
    "representation/router_cosine": Measure(representation.row_cosine, "high", "linear routers"),
    "representation/router_erank": Measure(experts.effective_rank, "low", "of the weight of a linear router"),
    "representation/erank": Measure(representation.erank, "low", "of hidden states after each probed layer"),
    "representation/erank_ratio": Measure(representation.erank, "low", "with the adapter over without"),
    "representation/drift_cka": Measure(representation.drift_cka, "low"),
    "representation/drift_norm": Measure(representation.drift_norm, "high"),
    "representation/token_similarity": Measure(representation.token_similarity, "high"),
    "representation/over_smoothing": Measure(representation.over_smoothing, "high"),
}  # fmt: skip


def over_sites(name: str, values: Tensor) -> dict[str, float]:
    """`name`: mean over sites [S], and `name_worst`, since a mean hides one collapsed layer. NaN is left out,
    as is what has no value."""
    values = values[~values.isnan()]
    if not len(values):
        return {}
    worst = {"high": torch.amax, "low": torch.amin, None: None}[MEASURES[name].worst]
    return {name: values.mean().item()} | ({f"{name}_worst": worst(values, 0).item()} if worst else {})


def headlines(metrics: Mapping[str, float], heterogeneous: bool) -> dict[str, float]:
    """The five `headline/...` numbers of a run and their `_worst`, where their measures are defined.

    heterogeneous: experts of different kinds or at different places under one router, whose effects gates do
    not tell.
    """
    sources = {
        "max_vio": "load/max_vio",
        "effective_experts": "load/contribution_effective_experts"
        if heterogeneous
        else "load/effective_experts",
        "mi_minus_null": next(
            (
                key
                for label in ("skill", "task")
                if (key := f"specialisation/{label}_mi_minus_null") in metrics
            ),
            "",
        ),
        "expert_cka": "experts/cka",
        "erank_ratio": "representation/erank_ratio",
    }
    found = {
        f"headline/{name}{end}": metrics.get(f"{key}{end}")
        for name, key in sources.items()
        for end in ("", "_worst")
    }
    return {key: value for key, value in found.items() if value is not None}


def table() -> str:
    """The list in Markdown: name, function, definition (the first sentence of its docstring), what is
    reported, worse end."""
    rows = ["| measure | function | definition | reported | worst |", "|---|---|---|---|---|"]
    for name, measure in MEASURES.items():
        f = measure.function
        definition = " ".join(f.__doc__.split("\n\n")[0].split()).replace("|", "\\|")
        place = f"{f.__module__.rpartition('.')[2]}.{f.__name__}"
        rows.append(f"| `{name}` | `{place}` | {definition} | {measure.about} | {measure.worst or ''} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(table())
