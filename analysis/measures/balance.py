"""Expert load: how evenly and how often the experts of a mixture are used.

Pure functions of tensors; the last axis is the experts (E), leading axes (sites, tasks, ...) are kept.
Logarithms are natural. Shares come from counts summed over all tokens: sum first, divide last, since a mean
of per-batch ratios is wrong when batches differ in length. A share of nothing (no token, no assignment) is
NaN, and so is every measure of it.

Which share for which mixture: sparse mixtures (top-k, threshold, top-p) have assignments, so
`assignment_share`. A soft mixture selects every expert for every token; its assignment share is 1/E whatever
it does and must not be reported: use `importance`, for gates that do not sum to one (sigmoid) the importance
of `membership`.

Sampling floor: a perfectly uniform router with N independent assignments has a CV of about sqrt((E-1)/N), see
`cv_floor`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def assignment_share(assignments: Tensor) -> Tensor:
    """`f_e = sum_t m_te / sum_te m` [..., E], sums to 1. assignments: tokens sent to each expert. Switch,
    arXiv 2101.03961."""
    return _share(assignments)


def usage(assignments: Tensor, tokens: Tensor) -> Tensor:
    """`u_e = sum_t m_te / T` [..., E], each 0..1, sums to the mean number of active experts. tokens:
    [...]."""
    return assignments.double() / tokens.double().unsqueeze(-1)


def importance(weight_sums: Tensor) -> Tensor:
    """`f^w_e = sum_t w_te / sum_te w` [..., E], sums to 1. weight_sums: over tokens, of each expert. arXiv
    1701.06538."""
    return _share(weight_sums)


def membership(weights: Tensor) -> Tensor:
    """`w^_te = w_te / sum_e w_te` [T, E]: rows as shares, for unnormalised gates; a row without weight stays
    0."""
    return weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)


def contribution(norms: Tensor) -> Tensor:
    """`f^c_e = sum_t |w_te o_te| / sum_te |w o|` [..., E]. norms: summed L2 norms. Comparable across kinds of
    experts."""
    return _share(norms)


def activated_parameters(usage: Tensor, sizes: Tensor) -> Tensor:
    """`sum_e u_e n_e` [...]: mean parameters a token activates, n_e = size of expert e. HMoE, arXiv
    2408.10681."""
    return (usage * sizes.double()).sum(-1)


def cv(share: Tensor) -> Tensor:
    """Coefficient of variation `std(f) / mean(f)` (population std), 0 .. sqrt(E-1). Squared, the loss of
    arXiv 1701.06538."""
    return share.std(-1, correction=0) / share.mean(-1)


def cv_floor(experts: int, assignments: int) -> float:
    """CV that a uniform router shows by chance, `sqrt((E-1)/N)`; correlated tokens of a sequence raise it."""
    return math.sqrt((experts - 1) / assignments)


def floors(experts: int, assignments: int, draws: int = 1000, seed: int = 0) -> dict[str, float]:
    """Mean of every measure of `BALANCE` for a uniform router with N independent assignments, by simulation:
    what chance alone shows."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.stack(
        [
            torch.randint(experts, (assignments,), generator=generator).bincount(minlength=experts)
            for _ in range(draws)
        ]
    )
    return {name: value.mean().item() for name, value in measures(assignment_share(counts)).items()}


def max_vio(share: Tensor) -> Tensor:
    """`max_e f_e E - 1`, 0 .. E-1. Loss-free balancing, arXiv 2408.15664. Global over a set, or per batch and
    then averaged."""
    return share.amax(-1) * share.shape[-1] - 1


def max_share(share: Tensor) -> Tensor:
    """`max_e f_e`, 1/E .. 1."""
    return share.amax(-1)


def gini(share: Tensor) -> Tensor:
    """`sum_i (2i - E - 1) f_(i) / E`, f ascending, 0 .. (E-1)/E."""
    experts = share.shape[-1]
    rank = torch.arange(1, experts + 1, dtype=share.dtype, device=share.device)
    return (share.sort(-1).values * (2 * rank - experts - 1)).sum(-1) / experts


def entropy(share: Tensor) -> Tensor:
    """`H(f) = -sum_e f_e ln f_e`, 0 .. ln E."""
    return torch.special.entr(share).sum(-1)


def normalised_entropy(share: Tensor) -> Tensor:
    """`H(f) / ln E`, 0 .. 1; 1 for a single expert, which cannot be unbalanced."""
    return (
        entropy(share) / math.log(share.shape[-1]) if share.shape[-1] > 1 else torch.ones_like(share[..., 0])
    )


def effective_experts(share: Tensor) -> Tensor:
    """`exp H(f)`, 1 .. E: as many equally loaded experts have this entropy."""
    return entropy(share).exp()


def dead_share(assignments: Tensor) -> Tensor:
    """Share of experts with no assignment in the window of tokens that was counted, 0 .. 1."""
    return (assignments == 0).double().mean(-1)


def rare_share(share: Tensor) -> Tensor:
    """Share of experts with `f_e < 0.1 / E`, 0 .. 1."""
    rare = (share < 0.1 / share.shape[-1]).double().mean(-1)
    return rare.masked_fill(share.isnan().any(-1), math.nan)


def dropped_share(idle: Tensor, tokens: Tensor) -> Tensor:
    """Share of tokens that no expert serves (thresholds, capacity, null experts), 0 .. 1. idle, tokens:
    [...]."""
    return idle.double() / tokens.double()


def mean_active(assignments: Tensor, tokens: Tensor) -> Tensor:
    """`mean_t k_t = sum_e u_e`, 0 .. E: experts a token uses."""
    return usage(assignments, tokens).sum(-1)


BALANCE = {
    "cv": cv,
    "max_vio": max_vio,
    "max_share": max_share,
    "gini": gini,
    "entropy": normalised_entropy,
    "effective_experts": effective_experts,
    "rare_share": rare_share,
}
"""Measures of one share vector, by the name under which results report them."""


def measures(share: Tensor) -> dict[str, Tensor]:
    """Every measure of `BALANCE` of share [..., E]."""
    return {name: measure(share) for name, measure in BALANCE.items()}


def _share(sums: Tensor) -> Tensor:
    sums = sums.double()
    total = sums.sum(-1, keepdim=True)
    return torch.where(total > 0, sums / total, math.nan)
