"""Expert load and routing, counted while a model runs: sums per site that stay on the device until somebody
reads them.

    meter = LoadCounts()
    with record(model) as rec:
        model(**batch)
    meter.update(rec.routing, batch["input_ids"].shape)
    readings.rows(meter, split="train", task="arc_easy@builtin"), readings.measures(meter)

Shapes: S sites stacked, T tokens, E experts. Padding counts nowhere. An update is a few passes over [S, T,
E], no host sync.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moabench.analysis.measures import balance, optimisation
from moabench.analysis.measures import routing as measure

if TYPE_CHECKING:
    from moabench.methods import Routing


@dataclass
class SiteCounts:
    """SiteCounts over tokens of S sites of one kind."""

    sites: tuple[str, ...]
    experts: list[tuple[str, ...]]
    """Expert names per site."""
    soft: bool
    unit: str
    """What was counted: token or sequence."""
    values: dict[str, Tensor]
    """int64: tokens [S], idle [S] (tokens without an expert), assignments [S, E]; float64: weights, members
    (weights as shares of their row), probs [S, E], entropy (nats), max_vio (of each batch), batches,
    logsumexp [S], entropy_bins [S, BINS] (tokens by their normalised entropy). No probs, entropy where a
    router has none, no logsumexp without logits. With `pairs`, also together [S, E, E] (co-activation) and,
    where k is fixed, margin_bins [S, BINS]."""


@dataclass
class LoadCounts:
    """Accumulates `{site: Routing}` of any number of forward passes. pairs: count co-activation and margins
    too, which costs more."""

    groups: dict[tuple, SiteCounts] = field(default_factory=dict)
    pairs: bool = False

    @torch.no_grad()
    def update(self, routing: Mapping[str, Routing], shape: tuple[int, int]) -> None:
        """Adds one forward pass over input ids of `shape` [B, L]. A router that decides once a sequence is
        counted once a sequence."""
        routing = {
            site: once_a_sequence(r, shape) if r.granularity == "sequence" else r
            for site, r in routing.items()
        }
        kinds: dict[tuple, list[str]] = {}
        for site, r in routing.items():
            there = tuple(t is not None and t.shape[-1] for t in (r.probs, r.logits, r.ids))
            kinds.setdefault(
                (r.weights.shape[-1], r.soft, there, r.granularity, str(r.weights.device)), []
            ).append(site)
        for kind, sites in kinds.items():
            self._add((*sites, kind[1]), _sums(tuple(sites), [routing[site] for site in sites], self.pairs))

    def merge(self, other: LoadCounts) -> None:
        """Adds what another meter counted."""
        for key, sums in other.groups.items():
            self._add(key, sums)

    def tensors(self) -> list[Tensor]:
        """Every sum, in an order that is the same in all processes of a run."""
        return [sums.values[name] for sums in self.groups.values() for name in sorted(sums.values)]

    def holding(self, tensors: Sequence[Tensor]) -> LoadCounts:
        """This meter with other sums, in the order of `tensors()`."""
        given = iter(tensors)
        return LoadCounts(
            {
                key: replace(s, values={name: next(given) for name in sorted(s.values)})
                for key, s in self.groups.items()
            },
            self.pairs,
        )

    def state(self) -> list[dict[str, Any]]:
        """Plain data that `torch.save` writes and `LoadCounts.from_state` reads."""
        return [vars(sums) | {"key": key} for key, sums in self.groups.items()]

    @classmethod
    def from_state(cls, state: list[dict[str, Any]]) -> LoadCounts:
        return cls(
            {
                tuple(entry["key"]): SiteCounts(**{k: v for k, v in entry.items() if k != "key"})
                for entry in state
            }
        )

    def _add(self, key: tuple, sums: SiteCounts) -> None:
        if key not in self.groups:
            self.groups[key] = SiteCounts(
                sums.sites, sums.experts, sums.soft, sums.unit, {k: v.clone() for k, v in sums.values.items()}
            )
            return
        values = self.groups[key].values
        for name in list(values):
            if name in sums.values:
                values[name].add_(sums.values[name].to(values[name].device))
            # one side comes from a checkpoint of a version that did not count this: half a count is none
            else:
                del values[name]


def fetch(tensors: Sequence[Tensor], reduce: bool = False) -> list[Tensor]:
    """The tensors on the host by one copy; with `reduce` summed over all processes first. Counts are exact to
    2^53."""
    if not tensors:
        return []
    flat = torch.cat([t.detach().reshape(-1).to(tensors[0].device, torch.float64) for t in tensors])
    if reduce and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(flat)
    parts = flat.cpu().split([t.numel() for t in tensors])
    return [part.to(t.dtype).view(t.shape) for part, t in zip(parts, tensors, strict=True)]


def sequence_counts(routing: Sequence[Routing], shape: tuple[int, int]) -> Tensor:
    """How often each sequence used each expert, [B, S, E] float32 on the host, of S sites with equally many
    experts.

    Assignments, for soft mixtures weights as shares; over real tokens, or 1 in all where a router decides
    once a sequence.
    """
    found = []
    for r in routing:
        used = (balance.membership(r.weights.float()) if r.soft else r.chosen.float()).view(*shape, -1)
        real = used.new_ones(shape) if r.mask is None else r.mask.view(shape).to(used.dtype)
        sums = torch.einsum("bl,ble->be", real, used)
        found.append(sums / real.sum(1, keepdim=True).clamp_min(1) if r.granularity == "sequence" else sums)
    return torch.stack([sums.to(found[0].device) for sums in found], 1).cpu()


def once_a_sequence(r: Routing, shape: tuple[int, int]) -> Routing:
    """A routing whose B*L rows repeat B decisions, with one row for each: that of the first real token."""
    if r.weights.shape[0] != shape[0] * shape[1]:
        return r
    first = torch.arange(shape[0], device=r.weights.device) * shape[1]
    if r.mask is None:
        return r.map(lambda t: t[first])
    mask = r.mask.view(shape)
    return replace(r.map(lambda t: t[first + mask.int().argmax(1)]), mask=mask.any(1))


def _sums(sites: tuple[str, ...], routings: list[Routing], pairs: bool) -> SiteCounts:
    """The sums of one forward pass."""
    first = routings[0]
    weights = torch.stack([r.weights for r in routings]).float()  # [S, T, E]
    experts = weights.shape[-1]
    real = _real(routings, weights)  # [S, T], 1 or 0
    tokens = real.sum(-1)
    floats = {
        "weights": _over_tokens(real, weights),
        "members": _over_tokens(real, balance.membership(weights)),
    }
    if first.probs is not None:
        probs = balance.membership(torch.stack([r.probs for r in routings]).float())
        entropy = balance.entropy(probs)
        floats |= {"probs": _over_tokens(real, probs), "entropy": (entropy * real).sum(-1)}
        floats["entropy_bins"] = measure.histogram(entropy / math.log(max(experts, 2)), real)
    if first.logits is not None:
        floats["logsumexp"] = (
            optimisation.logsumexp(torch.stack([r.logits for r in routings]).float()) * real
        ).sum(-1)
    if first.soft:
        assignments, idle = tokens.unsqueeze(-1).expand_as(floats["weights"]), torch.zeros_like(tokens)
        share = balance.importance(floats["members"])
    else:
        chosen = torch.stack([r.chosen for r in routings]).float()
        assignments, idle = _over_tokens(real, chosen), ((chosen.amax(-1) == 0) * real).sum(-1)
        share = balance.assignment_share(assignments)
        if pairs:
            floats["together"] = measure.together(chosen * real.unsqueeze(-1))
    if pairs and first.ids is not None and first.probs is not None and first.ids.shape[-1] < experts:
        floats["margin_bins"] = measure.histogram(measure.margin(probs, first.ids.shape[-1]), real)
    vio = balance.max_vio(share)
    floats |= {"max_vio": vio.nan_to_num(0.0), "batches": (~vio.isnan()).float()}
    counts = {"tokens": tokens, "idle": idle, "assignments": assignments}
    values = {k: v.round().long() for k, v in counts.items()} | {k: v.double() for k, v in floats.items()}
    names = [tuple(r.experts) or tuple(map(str, range(experts))) for r in routings]
    return SiteCounts(sites, names, first.soft, first.granularity, values)


def _real(routings: list[Routing], weights: Tensor) -> Tensor:
    """[S, T] with 1 on real tokens. Sites of one forward usually share their mask, which then is expanded,
    not copied."""
    masks = [r.mask for r in routings]
    if all(mask is masks[0] for mask in masks):
        one = weights.new_ones(()) if masks[0] is None else masks[0].reshape(-1).to(weights.dtype)
        return one.expand(weights.shape[:2])
    return torch.stack(
        [weights.new_ones(weights.shape[1]) if m is None else m.reshape(-1).to(weights.dtype) for m in masks]
    )


def _over_tokens(real: Tensor, values: Tensor) -> Tensor:
    """Sum over real tokens: [S, T], [S, T, E] -> [S, E]."""
    return torch.bmm(real.unsqueeze(1), values).squeeze(1)
