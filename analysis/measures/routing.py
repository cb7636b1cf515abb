"""Routing: how decided a router is, which experts act together, and how its choices change with time, seed
and depth.

Pure functions of tensors; T tokens, E experts, leading axes (sites) are kept. Logarithms are natural. Sums
over tokens (histograms, co-activation counts) add up over batches and ranks; what is made of them is the same
as from all tokens at once.
"""

from __future__ import annotations

import math
from itertools import combinations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from .balance import entropy, membership, normalised_entropy
from .base import reported
from .specialisation import mutual_information

BINS = 64
"""Bins of a histogram over 0 .. 1."""


@reported("load/router_entropy", None, "mean over tokens")
def router_entropy(probs: Tensor) -> Tensor:
    """`H_t = -sum_e p_te ln p_te / ln E` [..., T], 0 .. 1, of rows that sum to one. Low beside an even load:
    specialised."""
    return normalised_entropy(probs)


@reported("load/decisiveness", "low", of="mean_probs mean_entropy")
def decisiveness(mean_probs: Tensor, mean_entropy: Tensor) -> Tensor:
    """`I(expert; token) = H(mean_t p) - mean_t H(p_t)` in nats, 0 for a constant router of any kind, at most
    ln E.

    mean_probs [..., E]; mean_entropy [...]: mean over tokens of the entropy in nats.
    """
    return entropy(mean_probs) - mean_entropy


def histogram(values: Tensor, weights: Tensor) -> Tensor:
    """Weights [..., T] of values [..., T] in 0 .. 1, summed in `BINS` equal bins: [..., BINS]. A weight of 0
    leaves a value out."""
    rows = values.numel() // values.shape[-1]
    bins = (values.reshape(rows, -1) * BINS).long().clamp_(0, BINS - 1)
    bins += BINS * torch.arange(rows, device=values.device).unsqueeze(-1)
    flat = torch.zeros(rows * BINS, dtype=weights.dtype, device=values.device)
    flat.scatter_add_(
        0, bins.flatten(), weights.expand(values.shape).reshape(-1)
    )  # 1-D: deterministic on a GPU too
    return flat.view(*values.shape[:-1], BINS)


@reported("routing/entropy_q10", None, "10 % quantile of `router_entropy`")
@reported("routing/entropy_q90", None, "90 % quantile of `router_entropy`")
def quantile(counts: Tensor, q: float) -> Tensor:
    """The q-quantile [...] of a histogram [..., BINS], even within a bin, so it is exact to 1 / BINS; NaN
    where nothing was counted."""
    counts = counts.double()
    total = counts.sum(-1, keepdim=True)
    cumulative = counts.cumsum(-1)
    index = (cumulative < q * total).sum(-1, keepdim=True).clamp_(max=counts.shape[-1] - 1)
    inside = counts.gather(-1, index)
    below = cumulative.gather(-1, index) - inside
    found = (index + ((q * total - below) / inside).clamp(0, 1)) / counts.shape[-1]
    return torch.where(total > 0, found, math.nan).squeeze(-1)


@reported("routing/margin_q10", "low", "10 % quantile, of probabilities, where k is fixed and below E")
def margin(scores: Tensor, k: int) -> Tensor:
    """Score of the k-th expert minus that of the (k+1)-th, [..., T], >= 0: how fragile a top-k choice is.
    Needs k < E."""
    best = scores.topk(k + 1, -1).values
    return best[..., k - 1] - best[..., k]


def active_histogram(chosen: Tensor, real: Tensor) -> Tensor:
    """Real tokens by their number of experts, [..., E + 1]. chosen [..., T, E] bool, real [..., T]."""
    active = torch.nn.functional.one_hot(chosen.sum(-1).long(), chosen.shape[-1] + 1)
    return (active * real.unsqueeze(-1)).sum(-2)


def together(weights: Tensor) -> Tensor:
    """`N_ij = sum_t w_ti w_tj` [..., E, E] of weights [..., T, E]; for choices (0 or 1) the tokens that use
    both. Padding: rows of 0."""
    return weights.mT @ weights


def coactivation(counts: Tensor) -> Tensor:
    """`C_ij = N_ij / N_i` [..., E, E]: share of the tokens of expert i that also use j. OLMoE, arXiv
    2409.02060. NaN for unused i."""
    return counts.double() / counts.double().diagonal(dim1=-2, dim2=-1).unsqueeze(-1)


@reported("routing/coactivation", None, "sparse mixtures", of="together")
def coactivation_peak(counts: Tensor) -> Tensor:
    """`mean_i max_{j != i} C_ij`, 0 .. 1, over the experts that are used: how much experts come in pairs."""
    pairs = coactivation(counts) - torch.eye(counts.shape[-1], device=counts.device)  # the diagonal is 1
    return pairs.amax(-1).nanmean(-1)


@reported("routing/coactivation_excess", "high", "sparse mixtures", of="together tokens")
def coactivation_excess(counts: Tensor, tokens: Tensor) -> Tensor:
    """`mean_i max_{j != i} (C_ij - u_j)`, u_j = N_jj / T the usage of j, -1 .. 1: 0 where experts are used
    independently."""
    usage = counts.double().diagonal(dim1=-2, dim2=-1) / tokens.double().unsqueeze(-1)
    itself = torch.eye(counts.shape[-1], device=counts.device).bool()
    highest = (coactivation(counts) - usage.unsqueeze(-2)).masked_fill(itself, -math.inf).amax(-1)
    return highest.masked_fill(highest.isinf(), math.nan).nanmean(-1)


def coactivation_cosine(counts: Tensor) -> Tensor:
    """`N_ij / sqrt(N_ii N_jj)` [..., E, E]: cosine of the experts' weight columns, the form for soft
    mixtures."""
    norms = counts.double().diagonal(dim1=-2, dim2=-1).sqrt()
    return counts.double() / (norms.unsqueeze(-1) * norms.unsqueeze(-2))


@reported("routing/saturation", None, "of each probe with the last; 1 - `total_variation` unless k is fixed")
def agreement(before: Tensor, after: Tensor) -> Tensor:
    """`mean_t |S_t cap S'_t| / |S_t|` [...], 0 .. 1, of two choices [..., T, E] bool on the same tokens; of
    top-k with fixed k.

    With `after` the end of training, router saturation (OLMoE, arXiv 2409.02060); by chance k / E.
    """
    return ((before & after).sum(-1) / before.sum(-1)).double().mean(-1)


@reported("routing/fluctuation", None, "since the probe before; `total_variation` unless k is fixed")
def fluctuation(before: Tensor, after: Tensor) -> Tensor:
    """`RF = 1 - mean_t |S_t cap S'_t| / k` [...], 0 .. 1; for k = 1 the share of tokens whose expert changed.
    X-MoE, arXiv 2204.09179."""
    return 1 - agreement(before, after)


def total_variation(before: Tensor, after: Tensor) -> Tensor:
    """`0.5 mean_t sum_e |w^_te - w^'_te|` [...], 0 .. 1, w^ = `membership`: routing fluctuation of soft or
    variable choices."""
    return 0.5 * (membership(before.double()) - membership(after.double())).abs().sum(-1).mean(-1)


def consistency(loads: Tensor, tables: Tensor | None = None) -> float:
    """Mean Pearson correlation of load vectors [runs, E] over pairs of runs, -1 .. 1. X-MoE, arXiv
    2204.09179.

    Experts drawn at random have no identity across seeds: with tables [runs, E, classes] (each expert's share
    of each class) the experts of two runs are matched first (`match`). Matching raises the value; compare
    with that of tables whose classes are shuffled.
    """
    found = []
    for one, other in combinations(range(len(loads)), 2):
        order = match(tables[one], tables[other]) if tables is not None else slice(None)
        found.append(torch.corrcoef(torch.stack([loads[one], loads[other][order]]).double())[0, 1])
    return torch.stack(found).mean().item()


def match(one: Tensor, other: Tensor) -> Tensor:
    """For each expert of `one` [E, classes] its partner in `other` [E] int64, by least total squared distance
    (Hungarian method)."""
    return torch.as_tensor(
        linear_sum_assignment(torch.cdist(one.double(), other.double()).square().numpy())[1]
    )


def affinity(before: Tensor, after: Tensor) -> Tensor:
    """`P(e at layer l+1 | e' at layer l)` [E', E], rows sum to 1, of weights [T, E'] and [T, E]. ExFlow,
    arXiv 2401.08383."""
    joint = joint_membership(before, after)
    return joint / joint.sum(-1, keepdim=True)


@reported("routing/affinity", None, "with the same place one layer before")
def affinity_information(before: Tensor, after: Tensor) -> Tensor:
    """`I(e_l; e_{l+1}) / ln E`, 0 .. 1 for as many experts in both layers: how much one layer's choice tells
    of the next's."""
    return mutual_information(joint_membership(before, after)) / math.log(
        min(before.shape[-1], after.shape[-1])
    )


def joint_membership(before: Tensor, after: Tensor) -> Tensor:
    """`P(e', e) = mean_t w^_te' w^_te` [E', E]; tokens without an expert in either layer are left out."""
    joint = membership(before.double()).mT @ membership(after.double())
    return joint / joint.sum()
