"""What a probe measures at one routed place and after one decoder layer.

Which measures a place has follows from what it is: low-rank experts on one linear are measured in rank space,
anything else by running the place again with one expert alone, and at a block with one expert left out.
Values that are undefined are NaN, and get no row.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moabench.analysis.measures import balance, experts, representation, specialisation
from moabench.analysis.measures import routing as measure
from moabench.analysis.measures.catalog import measured
from moabench.benchmarks.data import batches
from moabench.methods import record, watch
from moabench.methods.effects import Watched, can_run, has_low_rank, low_rank_pairs

if TYPE_CHECKING:
    from moabench.methods import Routing
    from moabench.methods.tuner.sites import Site

PAIRS = 6
"""Pairs of random experts on one linear whose CKA is averaged, at least: two experts are drawn six times."""

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
    values = {"representation/erank": erank, "representation/erank_ratio": erank / erank_off}
    return values | measured(hidden=x, frozen=off, sequences=padded, real=real)


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
        values = measured(read=x, membership=share)
        values["representation/clustering"] = representation.clustering(
            values["representation/rc"], values["representation/rc_shuffled"]
        )
    if site.router.linear:
        weight = site.router.heads(site.tensors)[0][: len(site.experts)]
        values |= measured(read=x, router=weight)
        values["representation/router_erank"] = experts.effective_rank(experts.spectrum(weight, centre=False))
    return values


def _outputs(site: Site, found: Pass) -> tuple[Values, Matrices]:
    """Measures of the experts' outputs, and of what they contribute as routed."""
    if not has_low_rank(site) and not can_run(site):
        return {}, {}
    w, outputs = found.watched[site.name], _alone(site, found)
    if site.kind == "block":
        contributed = found.tokens(experts.norms(w.removed()))
    else:
        contributed = found.tokens(found.routing[site.name].weights) * experts.norms(outputs)
    share = balance.contribution(contributed.double().sum(0))
    matrices = {"output_cka": experts.cka(outputs), "output_cosine": experts.output_cosine(outputs)}
    cka = experts.off_diagonal(matrices["output_cka"])
    null = cka if cka.isnan() else _null_cka(site, found)
    values = {
        "experts/cka": cka,
        "experts/cka_null": null,
        "experts/cka_minus_null": cka - null,
        "experts/output_cosine": experts.off_diagonal(matrices["output_cosine"]),
        "experts/zero_share": experts.zero_share(outputs).mean(),
        "experts/output_erank": experts.effective_rank(experts.spectrum(outputs)).nanmean(),
        "load/contribution_effective_experts": balance.effective_experts(share),
        "load/contribution_max_vio": balance.max_vio(share),
    }
    return values, matrices


def _alone(site: Site, found: Pass) -> Tensor:
    """What each expert alone adds for the real tokens, [E, n, k]."""
    w = found.watched[site.name]
    if has_low_rank(site):
        p, b = w.low_rank()
        return experts.rank_coordinates(found.tokens(p.transpose(0, 1)).transpose(0, 1), b)
    return found.tokens(w.outputs().transpose(0, 1)).transpose(0, 1).float()


def _null_cka(site: Site, found: Pass) -> Tensor:
    """CKA of experts that have learnt nothing, on these inputs: mean over draws."""
    pairs = math.comb(len(site.experts), 2)
    # elsewhere than on a linear a draw costs a pass of the place for each expert
    draws = max(1, PAIRS // pairs) if has_low_rank(site) else 1
    drawn = []
    for seed in range(draws):
        with random_experts(site, seed):
            drawn.append(experts.off_diagonal(experts.cka(_alone(site, found))))
    return torch.stack(drawn).mean()


@contextmanager
def random_experts(site: Site, seed: int) -> Iterator[None]:
    """Inside, the tensors of the place's experts are drawn from N(0, s^2), s the root mean square of each;
    afterwards they are as before, to the bit. Equal seeds draw the same for one place, whatever the
    process."""
    generator = torch.Generator().manual_seed(zlib.crc32(site.name.encode()) + seed)
    tensors = [t for view in site.banks for t in view.tensors.values()]
    kept = [t.detach().clone() for t in tensors]
    try:
        with torch.no_grad():
            for t in tensors:
                noise = torch.randn(t.shape, generator=generator).to(t.device, t.dtype)
                t.copy_(noise * t.square().mean().sqrt())
        yield
    finally:
        with torch.no_grad():
            for t, before in zip(tensors, kept, strict=True):
                t.copy_(before)


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
