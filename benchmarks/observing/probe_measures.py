"""What a probe measures at one routed place and after one decoder layer.

Which measures a place has follows from what it is: low-rank experts on one linear are measured in rank space,
anything else by running the place again with one expert alone, and at a block with one expert left out.
Values that are undefined are NaN, and get no row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moabench.analysis.measures import balance, experts, representation, specialisation
from moabench.analysis.measures import routing as measure
from moabench.benchmarks.data import batches
from moabench.methods import record, watch
from moabench.methods.effects import Watched, can_run, has_low_rank, low_rank_pairs

if TYPE_CHECKING:
    from moabench.methods import Routing
    from moabench.methods.tuner.sites import Site

Values = dict[str, Tensor]
"""Measures by their name."""
Matrices = dict[str, Tensor]
"""[E, E'] by the name in matrices.parquet."""


@dataclass(frozen=True)
class Pass:
    """One forward pass over a batch: the routing of every site, and how the watched places were called. real
    [T]: no padding."""

    routing: dict[str, Routing]
    watched: dict[str, Watched]
    real: Tensor

    @classmethod
    def of(cls, model: nn.Module, batch: dict[str, Any], names: set[str]) -> Pass:
        real = batch["attention_mask"].bool().flatten()
        if not names:
            batches.forward(model, batch, kept=1)
            return cls({}, {}, real)
        with record(model) as recorder, watch(model, names) as watched:
            batches.forward(model, batch, kept=1)
        return cls(recorder.routing, watched, real)

    def tokens(self, values: Tensor) -> Tensor:
        """The rows of real tokens: [T, ...] -> [n, ...]."""
        return values[self.real.to(values.device)]

    def membership(self, site: str) -> Tensor:
        """Shares [n, E] of the real tokens in the experts of one site."""
        return balance.membership(self.tokens(self.routing[site].weights))


def of_hidden_states(x: Tensor, off: Tensor, erank_off: Tensor, real: Tensor) -> Values:
    """Hidden states x [n, d] of the real tokens after a layer, `off` those of the frozen model; real [B, L]
    bool."""
    erank, real = representation.erank(x), real.to(x.device)
    padded = x.new_zeros(*real.shape, x.shape[-1])
    padded[real] = x
    return {
        "representation/erank": erank,
        "representation/erank_ratio": erank / erank_off,
        "representation/drift_cka": representation.drift_cka(x, off),
        "representation/drift_norm": representation.drift_norm(x, off),
        "representation/token_similarity": representation.token_similarity(x),
        "representation/over_smoothing": representation.over_smoothing(padded, real),
    }


def of_site(site: Site, whole: Pass, part: Pass, before: str | None, ids: Tensor) -> tuple[Values, Matrices]:
    """Every measure of one routed place. whole: the pass over all probe tokens; part: that which its experts'
    outputs are taken from; before: the same place one layer before; ids [n]: of the probe tokens."""
    values, matrices = _outputs(site, part)
    values |= _geometry(site, whole)
    share = whole.membership(site.name)
    if whole.routing[site.name].granularity == "token":
        values |= _token_ids(share, ids)
    if before is not None:
        values["routing/affinity"] = measure.affinity_information(whole.membership(before), share)
        matrices["affinity"] = measure.affinity(whole.membership(before), share)
    if has_low_rank(site):
        weights, more = _weights(site)
        values, matrices = values | weights, matrices | more
    return values, matrices


def choices(routing: Routing, found: Pass) -> Tensor:
    """What is kept of a routing to compare it with later ones: the choice, bool [n, E], where k is fixed,
    else shares [n, E]."""
    kept = routing.chosen if routing.ids is not None else balance.membership(routing.weights).half()
    return found.tokens(kept).cpu()


def changed(before: Tensor, after: Tensor) -> Tensor:
    """Routing fluctuation of two such choices."""
    return (
        measure.fluctuation(before, after)
        if before.dtype == torch.bool
        else measure.total_variation(before, after)
    )


def _token_ids(share: Tensor, ids: Tensor) -> Values:
    """What the token id says of the expert; by chance, with the ids shuffled."""
    numbers = ids.unique(return_inverse=True)[1]
    shuffled = numbers[torch.randperm(len(numbers), generator=torch.Generator().manual_seed(0))]
    counts, chance = (
        specialisation.token_counts(share, order, int(numbers.max()) + 1) for order in (numbers, shuffled)
    )
    return {
        "specialisation/token_id": specialisation.token_id_share(counts),
        "specialisation/token_id_null": specialisation.token_id_share(chance),
        "specialisation/vocabulary": specialisation.vocabulary_specialisation(counts),
    }


def _geometry(site: Site, found: Pass) -> Values:
    """How the router's input is arranged around its choices, and the router's own rows."""
    values, x = {}, found.tokens(found.watched[site.name].read.flatten(0, -2)).float()
    if found.routing[site.name].granularity == "token":
        share = found.membership(site.name)
        rc, shuffled = (
            representation.within_between(x, share),
            representation.shuffled_within_between(x, share),
        )
        values = {"representation/rc": rc, "representation/rc_shuffled": shuffled}
        values["representation/clustering"] = representation.clustering(rc, shuffled)
    if site.router.linear:
        weight = site.router.heads(site.tensors)[0][: len(site.experts)]
        values["representation/span_share"] = representation.span_share(x, weight)
        values["representation/router_cosine"] = representation.row_cosine(weight)
        values["representation/router_erank"] = experts.effective_rank(experts.spectrum(weight, centre=False))
    return values


def _outputs(site: Site, found: Pass) -> tuple[Values, Matrices]:
    """Measures of the experts' outputs, and of what they contribute as routed."""
    w = found.watched[site.name]
    if has_low_rank(site):
        p, b = w.low_rank()
        outputs = experts.rank_coordinates(found.tokens(p.transpose(0, 1)).transpose(0, 1), b)
    elif can_run(site):
        outputs = found.tokens(w.outputs().transpose(0, 1)).transpose(0, 1).float()
    else:
        return {}, {}
    if site.kind == "block":
        contributed = found.tokens(experts.norms(w.removed()))
    else:
        contributed = found.tokens(found.routing[site.name].weights) * experts.norms(outputs)
    share = balance.contribution(contributed.double().sum(0))
    matrices = {"output_cka": experts.cka(outputs), "output_cosine": experts.output_cosine(outputs)}
    values = {
        "experts/cka": experts.off_diagonal(matrices["output_cka"]),
        "experts/output_cosine": experts.off_diagonal(matrices["output_cosine"]),
        "experts/zero_share": experts.zero_share(outputs).mean(),
        "experts/output_erank": experts.effective_rank(experts.spectrum(outputs)).nanmean(),
        "load/contribution_effective_experts": balance.effective_experts(share),
        "load/contribution_max_vio": balance.max_vio(share),
    }
    return values, matrices


def _weights(site: Site) -> tuple[Values, Matrices]:
    """Measures of low-rank experts by their tensors alone."""
    pairs = low_rank_pairs(site)
    a, b = torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs], 1)
    owner = torch.arange(len(pairs), device=a.device).repeat_interleave(
        torch.tensor([len(a) for a, _ in pairs], device=a.device)
    )
    spectra, left, right = zip(*(experts.directions(*pair) for pair in pairs), strict=True)
    matrices = {
        "weight_cosine": experts.weight_cosine(a, b, owner),
        "overlap_in": experts.overlaps(right),
        "overlap_out": experts.overlaps(left),
    }
    values = {f"experts/{name}": experts.off_diagonal(matrix) for name, matrix in matrices.items()}
    return values | {
        "experts/update_erank": torch.stack([experts.effective_rank(s) for s in spectra]).nanmean()
    }, matrices
