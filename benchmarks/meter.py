"""Expert load, counted while a model runs: sums per site that stay on the device, turned into rows and measures at the end.

    meter = Meter()
    with record(model) as rec:
        model(**batch)
    meter.update(rec.routing, batch["input_ids"].shape)
    meter.rows(split="train", task="arc_easy@builtin"), meter.measures()

Shapes: S sites stacked, T tokens, E experts. Padding counts nowhere. An update is a few passes over [S, T, E], no host sync.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moabench.analysis import balance

if TYPE_CHECKING:
    from moabench.methods import Routing


@dataclass
class Sums:
    """Sums over tokens of S sites of one kind."""

    sites: tuple[str, ...]
    experts: list[tuple[str, ...]]
    """Expert names per site."""
    soft: bool
    unit: str
    """What was counted: token or sequence."""
    values: dict[str, Tensor]
    """int64: tokens [S], idle [S] (tokens without an expert), assignments [S, E]; float64: weights, members (weights as shares of
    their row), probs [S, E], entropy (nats), max_vio (of each batch), batches [S]. No probs, entropy where a router has none."""


@dataclass
class Meter:
    """Accumulates `{site: Routing}` of any number of forward passes."""

    groups: dict[tuple, Sums] = field(default_factory=dict)

    @torch.no_grad()
    def update(self, routing: Mapping[str, Routing], shape: tuple[int, int]) -> None:
        """Adds one forward pass over input ids of `shape` [B, L]. A router that decides once a sequence is counted once a sequence."""
        routing = {site: _once_a_sequence(r, shape) if r.granularity == "sequence" else r for site, r in routing.items()}
        kinds: dict[tuple, list[str]] = {}
        for site, r in routing.items():
            kinds.setdefault((r.weights.shape[-1], r.soft, r.probs is not None, r.granularity, str(r.weights.device)), []).append(site)
        for kind, sites in kinds.items():
            self._add((*sites, kind[1]), _sums(tuple(sites), [routing[site] for site in sites]))

    def merge(self, other: Meter) -> None:
        """Adds what another meter counted."""
        for key, sums in other.groups.items():
            self._add(key, sums)

    def rows(self, split: str, task: str) -> list[dict[str, Any]]:
        """One row per site and expert. `share` (f) is None for a soft mixture, where it would be 1/E whatever happens."""
        return [row for sums in self.groups.values() for row in _rows(sums, split, task)]

    def measures(self) -> dict[str, float]:
        """`<measure>` (mean over sites) and `<measure>_worst`, of the assignment share, or for soft mixtures of the soft load."""
        values: dict[str, list[Tensor]] = {}
        for sums in self.groups.values():
            for name, value in _measures(sums).items():
                values.setdefault(name, []).append(value)
        return {key: v for name, parts in values.items() for key, v in balance.over_sites(name, torch.cat(parts)).items()}

    def state(self) -> list[dict[str, Any]]:
        """Plain data that `torch.save` writes and `Meter.from_state` reads."""
        return [vars(sums) | {"key": key} for key, sums in self.groups.items()]

    @classmethod
    def from_state(cls, state: list[dict[str, Any]]) -> Meter:
        return cls({tuple(entry["key"]): Sums(**{k: v for k, v in entry.items() if k != "key"}) for entry in state})

    def _add(self, key: tuple, sums: Sums) -> None:
        if key not in self.groups:
            self.groups[key] = Sums(sums.sites, sums.experts, sums.soft, sums.unit, {k: v.clone() for k, v in sums.values.items()})
            return
        for name, value in self.groups[key].values.items():
            value.add_(sums.values[name].to(value.device))


def _once_a_sequence(r: Routing, shape: tuple[int, int]) -> Routing:
    """A routing whose B*L rows repeat B decisions, with one row for each: that of the first real token."""
    if r.weights.shape[0] != shape[0] * shape[1]:
        return r
    first = torch.arange(shape[0], device=r.weights.device) * shape[1]
    if r.mask is None:
        return r.map(lambda t: t[first])
    mask = r.mask.view(shape)
    return replace(r.map(lambda t: t[first + mask.int().argmax(1)]), mask=mask.any(1))


def _sums(sites: tuple[str, ...], routings: list[Routing]) -> Sums:
    """The sums of one forward pass."""
    first = routings[0]
    weights = torch.stack([r.weights for r in routings]).float()  # [S, T, E]
    real = _real(routings, weights)  # [S, T], 1 or 0
    tokens = real.sum(-1)
    floats = {"weights": _over_tokens(real, weights), "members": _over_tokens(real, balance.membership(weights))}
    if first.probs is not None:
        probs = balance.membership(torch.stack([r.probs for r in routings]).float())
        floats |= {"probs": _over_tokens(real, probs), "entropy": (balance.entropy(probs) * real).sum(-1)}
    if first.soft:
        assignments, idle = tokens.unsqueeze(-1).expand_as(floats["weights"]), torch.zeros_like(tokens)
        share = balance.importance(floats["members"])
    else:
        chosen = torch.stack([r.chosen for r in routings]).float()
        assignments, idle = _over_tokens(real, chosen), ((chosen.amax(-1) == 0) * real).sum(-1)
        share = balance.assignment_share(assignments)
    vio = balance.max_vio(share)
    floats |= {"max_vio": vio.nan_to_num(0.0), "batches": (~vio.isnan()).float()}
    counts = {"tokens": tokens, "idle": idle, "assignments": assignments}
    values = {k: v.round().long() for k, v in counts.items()} | {k: v.double() for k, v in floats.items()}
    experts = [tuple(r.experts) or tuple(map(str, range(r.weights.shape[-1]))) for r in routings]
    return Sums(sites, experts, first.soft, first.granularity, values)


def _real(routings: list[Routing], weights: Tensor) -> Tensor:
    """[S, T] with 1 on real tokens. Sites of one forward usually share their mask, which then is expanded, not copied."""
    masks = [r.mask for r in routings]
    if all(mask is masks[0] for mask in masks):
        one = weights.new_ones(()) if masks[0] is None else masks[0].reshape(-1).to(weights.dtype)
        return one.expand(weights.shape[:2])
    return torch.stack([weights.new_ones(weights.shape[1]) if m is None else m.reshape(-1).to(weights.dtype) for m in masks])


def _over_tokens(real: Tensor, values: Tensor) -> Tensor:
    """Sum over real tokens: [S, T], [S, T, E] -> [S, E]."""
    return torch.bmm(real.unsqueeze(1), values).squeeze(1)


def _measures(sums: Sums) -> dict[str, Tensor]:
    """Every load and routing measure [S] of one group."""
    v = {name: value.cpu() for name, value in sums.values.items()}
    share = balance.importance(v["members"]) if sums.soft else balance.assignment_share(v["assignments"])
    found = balance.measures(share)
    tokens = v["tokens"].double()
    found["max_vio_batch"] = v["max_vio"] / v["batches"]
    found["gate_mass"] = v["weights"].sum(-1) / tokens
    if not sums.soft:
        found["dead_share"] = balance.dead_share(v["assignments"]).masked_fill(v["tokens"] == 0, math.nan)
        found["mean_active"] = balance.mean_active(v["assignments"], v["tokens"])
        found["dropped_share"] = v["idle"] / tokens
    if "probs" in v:
        mean_entropy = v["entropy"] / tokens
        experts = v["probs"].shape[-1]
        found["router_entropy"] = mean_entropy / math.log(experts) if experts > 1 else torch.ones_like(mean_entropy)
        found["decisiveness"] = balance.decisiveness(v["probs"] / tokens.unsqueeze(-1), mean_entropy)
    return found


def _rows(sums: Sums, split: str, task: str) -> list[dict[str, Any]]:
    v = {name: value.cpu() for name, value in sums.values.items()}
    tokens = v["tokens"].unsqueeze(-1)
    per_expert = {
        "assignments": v["assignments"],
        "usage": balance.usage(v["assignments"], v["tokens"]),
        "share": balance.assignment_share(v["assignments"]),
        "soft_share": balance.importance(v["members"]),
        "importance": balance.importance(v["weights"]),
        "mean_weight": v["weights"] / tokens,
        "mean_prob": v["probs"] / tokens if "probs" in v else None,
    }
    measures = _measures(sums)
    per_site = {name: measures.get(name) for name in ("router_entropy", "decisiveness", "dropped_share")}
    columns = {name: _plain(value) for name, value in per_expert.items()} | {name: _plain(value) for name, value in per_site.items()}
    rows = []
    for s, site in enumerate(sums.sites):
        head = {"split": split, "task": task, "site": site, "unit": sums.unit, "soft": sums.soft, "tokens": int(v["tokens"][s])}
        shared = {name: columns[name] and columns[name][s] for name in per_site}
        for e, expert in enumerate(sums.experts[s]):
            own = {name: columns[name] and columns[name][s][e] for name in per_expert}
            if sums.soft:
                own |= {"share": None, "usage": None, "assignments": None}
            rows.append(head | {"expert": expert, "index": e} | own | shared)
    return rows


def _plain(value: Tensor | None) -> Any:
    return None if value is None else value.tolist()
