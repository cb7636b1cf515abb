"""What a meter counted, as measures of a run and as rows of routing.parquet; and what the counts by sequence
say of specialisation."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moabench.analysis.measures import balance, specialisation
from moabench.analysis.measures import routing as measure
from moabench.analysis.measures.catalog import measured, over_sites

from .load import LoadCounts, SiteCounts, fetch, sequence_counts

if TYPE_CHECKING:
    from moabench.methods import Routing


def measures(meter: LoadCounts) -> dict[str, float]:
    """`load/...` and `routing/...`: mean over sites, and `_worst`; of the assignment share, or for soft
    mixtures of the soft load."""
    values: dict[str, list[Tensor]] = {}
    for sums in _on_host(meter):
        for name, value in _measures(sums).items():
            values.setdefault(name, []).append(value)
    return {key: v for name, parts in values.items() for key, v in over_sites(name, torch.cat(parts)).items()}


def rows(meter: LoadCounts, split: str, task: str, skill: str | None = None) -> list[dict[str, Any]]:
    """One row per site and expert. `share` (f) is None for a soft mixture, where it would be 1/E whatever
    happens."""
    return [
        row for sums in _on_host(meter) for row in _rows(sums, {"split": split, "task": task, "skill": skill})
    ]


def coactivation(meter: LoadCounts, step: int) -> list[dict[str, Any]]:
    """Rows of matrices.parquet, for sparse mixtures whose meter counted pairs."""
    found = []
    for sums in _on_host(meter):
        for site, counts in zip(sums.sites, sums.values.get("together", ()), strict=False):
            found += matrix_rows(step, site, "coactivation", measure.coactivation(counts))
    return found


def matrix_rows(step: int, site: str, name: str, matrix: Tensor) -> list[dict[str, Any]]:
    """The entries of a matrix [E, E'] that are not NaN, as rows."""
    entries = ((i, j, value) for i, line in enumerate(matrix.tolist()) for j, value in enumerate(line))
    return [
        {"step": step, "site": site, "name": name, "i": i, "j": j, "value": v}
        for i, j, v in entries
        if not math.isnan(v)
    ]


def _on_host(meter: LoadCounts) -> Iterator[SiteCounts]:
    yield from meter.holding(fetch(meter.tensors())).groups.values()


def _measures(sums: SiteCounts) -> dict[str, Tensor]:
    """Every load and routing measure [S] of one group on the host."""
    v, tokens = sums.values, sums.values["tokens"].double()
    share = balance.importance(v["members"]) if sums.soft else balance.assignment_share(v["assignments"])
    found = measured(share=share)
    found["load/max_vio_batch"] = v["max_vio"] / v["batches"]
    found |= measured(weights=v["weights"], tokens=tokens)
    if not sums.soft:
        found |= measured(assignments=v["assignments"], idle=v["idle"], tokens=v["tokens"])
    if "probs" in v:
        mean_entropy, experts = v["entropy"] / tokens, v["probs"].shape[-1]
        found["load/router_entropy"] = (
            mean_entropy / math.log(experts) if experts > 1 else torch.ones_like(mean_entropy)
        )
        found |= measured(mean_probs=v["probs"] / tokens.unsqueeze(-1), mean_entropy=mean_entropy)
    for bins, q in (("entropy_bins", 0.1), ("entropy_bins", 0.9), ("margin_bins", 0.1)):
        if bins in v:
            found[f"routing/{bins.removesuffix('_bins')}_q{100 * q:.0f}"] = measure.quantile(v[bins], q)
    if "logsumexp" in v:
        found["routing/logsumexp"] = v["logsumexp"] / tokens
    if "together" in v:
        found |= measured(together=v["together"], tokens=tokens)
    return found


def _rows(sums: SiteCounts, head: dict[str, Any]) -> Iterator[dict[str, Any]]:
    v, tokens = sums.values, sums.values["tokens"].unsqueeze(-1)
    per_expert = {
        "assignments": None if sums.soft else v["assignments"],
        "usage": None if sums.soft else balance.usage(v["assignments"], v["tokens"]),
        "share": None if sums.soft else balance.assignment_share(v["assignments"]),
        "soft_share": balance.importance(v["members"]),
        "importance": balance.importance(v["weights"]),
        "mean_weight": v["weights"] / tokens,
        "mean_prob": v["probs"] / tokens if "probs" in v else None,
    }
    found = _measures(sums)
    per_site = {
        name: found.get(f"load/{name}") for name in ("router_entropy", "decisiveness", "dropped_share")
    }
    experts = {name: None if value is None else value.tolist() for name, value in per_expert.items()}
    shared = {name: None if value is None else value.tolist() for name, value in per_site.items()}
    for s, site in enumerate(sums.sites):
        counted = {"site": site, "unit": sums.unit, "soft": sums.soft, "tokens": int(v["tokens"][s])}
        ends = {name: value and value[s] for name, value in shared.items()}
        for e, expert in enumerate(sums.experts[s]):
            own = {name: value and value[s][e] for name, value in experts.items()}
            yield head | counted | {"expert": expert, "index": e} | own | ends


@dataclass
class Choices:
    """How often each evaluated sequence used each expert, with its task and skill."""

    counts: dict[int, list[Tensor]] = field(default_factory=dict)
    """By number of experts: [B, S, E] of each batch."""
    labels: dict[str, list[str | None]] = field(default_factory=lambda: {"task": [], "skill": []})

    def add(
        self,
        routing: dict[str, Routing],
        shape: tuple[int, int],
        tasks: Sequence[str],
        skills: Sequence[str | None],
    ) -> None:
        """One batch of sequences; tasks, skills [B]."""
        sizes: dict[int, list[Routing]] = {}
        for r in routing.values():
            sizes.setdefault(r.weights.shape[-1], []).append(r)
        for size, found in sizes.items():
            self.counts.setdefault(size, []).append(sequence_counts(found, shape))
        self.labels["task"] += tasks
        self.labels["skill"] += skills

    def measures(self) -> dict[str, float]:
        """`specialisation/task_mi` and `skill_mi` with `_null` and `_minus_null`, mean over sites and worst;
        absent without two labels."""
        found: dict[str, float] = {}
        for kind, labels in self.labels.items():
            names = sorted({label for label in labels if label is not None})
            if len(names) < 2:
                continue
            kept = torch.tensor([label is not None for label in labels])
            numbers = torch.tensor([names.index(label) for label in labels if label is not None])
            parts = [
                _information(torch.cat(counts)[kept], numbers, len(names))
                for size, counts in self.counts.items()
                if size > 1
            ]
            if parts:
                mi, null = (torch.cat(values) for values in zip(*parts, strict=True))
                for suffix, value in (("", mi), ("_null", null), ("_minus_null", mi - null)):
                    found |= over_sites(f"specialisation/{kind}_mi{suffix}", value)
        return found


def _information(counts: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Information share [S] of counts [N, S, E] with labels [N], and its value by chance."""
    table = specialisation.joint_table(specialisation.class_counts(counts, labels, classes))
    return specialisation.information_share(table), specialisation.shuffled_information(
        counts, labels, classes
    )
