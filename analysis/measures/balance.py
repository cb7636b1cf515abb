"""Expert load: how evenly and how often the experts of a mixture are used.

Pure functions of tensors; the last axis is the experts (E), leading axes (sites, tasks, ...) are kept.
Logarithms are natural. Shares come from counts summed over all tokens: sum first, divide last, since a mean
of per-batch ratios is wrong when batches differ in length. A share of nothing (no token, no assignment) is
NaN, and so is every measure of it.

Which share for which mixture: sparse mixtures (top-k, threshold, top-p) have assignments, so
`assignment_share`. A soft mixture selects every expert for every token; its assignment share is 1/E whatever
it does and must not be reported: use `importance`, for gates that do not sum to one (sigmoid) the importance
of `membership`.

Sampling floor: a perfectly uniform router with N assignments, k distinct experts a token, has a CV of about
sqrt((E-k)/N), see `cv_floor` and, for the other measures, `floors`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .base import measured, reported


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


@reported("load/cv", "high", of="share")
def cv(share: Tensor) -> Tensor:
    """Coefficient of variation `std(f) / mean(f)` (population std), 0 .. sqrt(E-1). Squared, the loss of
    arXiv 1701.06538."""
    return share.std(-1, correction=0) / share.mean(-1)


def cv_floor(experts: int, assignments: int, k: int = 1) -> float:
    """CV that a uniform router shows by chance, `sqrt((E - k) / N)`, N assignments of k distinct experts a
    token.

    The choices of a token exclude each other, so the counts vary less than those of N independent draws: by
    sqrt((E - k) / (E - 1)). Correlated tokens of a sequence raise it.
    """
    return math.sqrt((experts - k) / assignments)


def floors(experts: int, assignments: int, k: int = 1, draws: int = 1000, seed: int = 0) -> dict[str, float]:
    """Mean of every measure of one load share for a uniform router that sends each token to k distinct
    experts, N assignments in all, by simulation: what chance alone shows.

    assignments: N, k for each token. For a measure of a batch (`max_vio_batch`) that of one batch.
    """
    generator, tokens = torch.Generator().manual_seed(seed), assignments // k

    def drawn() -> Tensor:
        if k == 1:
            return torch.randint(experts, (tokens,), generator=generator)
        return torch.rand(tokens, experts, generator=generator).topk(k).indices.flatten()

    counts = torch.stack([drawn().bincount(minlength=experts) for _ in range(draws)])
    return {name: value.mean().item() for name, value in measures(assignment_share(counts)).items()}


@reported("load/max_vio", "high", "global: of the load summed over all tokens counted", of="share")
@reported("load/max_vio_batch", "high", "batch: of the load of each forward pass, averaged")
@reported("load/contribution_max_vio", "high", "of the `contribution` load")
def max_vio(share: Tensor) -> Tensor:
    """`max_e f_e E - 1`, 0 .. E-1. Loss-free balancing, arXiv 2408.15664. Global over a set, or per batch and
    then averaged, which is higher: fewer tokens are further from even by chance alone."""
    return share.amax(-1) * share.shape[-1] - 1


@reported("load/max_share", "high", of="share")
def max_share(share: Tensor) -> Tensor:
    """`max_e f_e`, 1/E .. 1."""
    return share.amax(-1)


@reported("load/gini", "high", of="share")
def gini(share: Tensor) -> Tensor:
    """`sum_i (2i - E - 1) f_(i) / E`, f ascending, 0 .. (E-1)/E."""
    experts = share.shape[-1]
    rank = torch.arange(1, experts + 1, dtype=share.dtype, device=share.device)
    return (share.sort(-1).values * (2 * rank - experts - 1)).sum(-1) / experts


def entropy(share: Tensor) -> Tensor:
    """`H(f) = -sum_e f_e ln f_e`, 0 .. ln E."""
    return torch.special.entr(share).sum(-1)


@reported("load/entropy", "low", of="share")
def normalised_entropy(share: Tensor) -> Tensor:
    """`H(f) / ln E`, 0 .. 1; 1 for a single expert, which cannot be unbalanced."""
    return (
        entropy(share) / math.log(share.shape[-1]) if share.shape[-1] > 1 else torch.ones_like(share[..., 0])
    )


@reported("load/effective_experts", "low", of="share")
@reported("load/contribution_effective_experts", "low", "of the `contribution` load")
def effective_experts(share: Tensor) -> Tensor:
    """`exp H(f)`, 1 .. E: as many equally loaded experts have this entropy."""
    return entropy(share).exp()


@reported("load/rare_share", "high", of="share")
def rare_share(share: Tensor) -> Tensor:
    """Share of experts with `f_e < 0.1 / E`, 0 .. 1."""
    rare = (share < 0.1 / share.shape[-1]).double().mean(-1)
    return rare.masked_fill(share.isnan().any(-1), math.nan)


@reported("load/gate_mass", of="weights tokens")
def gate_mass(weight_sums: Tensor, tokens: Tensor) -> Tensor:
    """`mean_t sum_e w_te`, >= 0: sum of the weights of a token. weight_sums [..., E], tokens [...]."""
    return weight_sums.sum(-1) / tokens


@reported("load/dead_share", "high", of="assignments tokens")
def dead_share(assignments: Tensor, tokens: Tensor) -> Tensor:
    """Share of experts with no assignment in the window of tokens that was counted, 0 .. 1."""
    return (assignments == 0).double().mean(-1).masked_fill(tokens == 0, math.nan)


@reported("load/mean_active", of="assignments tokens")
def mean_active(assignments: Tensor, tokens: Tensor) -> Tensor:
    """`mean_t k_t = sum_e u_e`, 0 .. E: experts a token uses."""
    return usage(assignments, tokens).sum(-1)


@reported("load/dropped_share", "high", of="idle tokens")
def dropped_share(idle: Tensor, tokens: Tensor) -> Tensor:
    """Share of tokens that no expert serves (thresholds, capacity, null experts), 0 .. 1. idle, tokens:
    [...]."""
    return idle.double() / tokens.double()


def measures(share: Tensor) -> dict[str, Tensor]:
    """Every measure of one load share [..., E], by its name without the family."""
    return {name.removeprefix("load/"): value for name, value in measured(share=share).items()}


def _share(sums: Tensor) -> Tensor:
    sums = sums.double()
    total = sums.sum(-1, keepdim=True)
    return torch.where(total > 0, sums / total, math.nan)
