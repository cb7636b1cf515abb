"""Optimisation: whether tasks pull shared parameters apart, which experts get a gradient, and how large
router scores grow.

Pure functions of tensors; G gradients (one a task) of P parameters, R rank rows, E experts. What is undefined
is NaN.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .base import reported


def gradient_cosine(gradients: Tensor) -> Tensor:
    """`cos(g_a, g_b)` [G, G], -1 .. 1, of task gradients [G, P]; below 0: a conflict. NaN for a zero one.
    PCGrad, arXiv 2001.06782."""
    products = gradients.double() @ gradients.double().T
    size = products.diagonal().sqrt()
    return products / (size * size.unsqueeze(-1))


def conflict_share(gradients: Tensor) -> Tensor:
    """Share of pairs of tasks with `cos(g_a, g_b) < 0`, 0 .. 1; pairs with a zero gradient are left out."""
    pairs = _pairs(gradient_cosine(gradients))
    pairs = pairs[~pairs.isnan()]
    return (pairs < 0).double().mean() if len(pairs) else gradients.new_tensor(math.nan)


def mean_cosine(gradients: Tensor) -> Tensor:
    """Mean `cos(g_a, g_b)` over pairs of tasks, -1 .. 1."""
    return _pairs(gradient_cosine(gradients)).nanmean()


def magnitude_similarity(gradients: Tensor) -> Tensor:
    """`2 |g_a| |g_b| / (|g_a|^2 + |g_b|^2)` [G, G], 0 .. 1; 1: of equal length. PCGrad, arXiv 2001.06782,
    definition 2."""
    size = gradients.double().norm(dim=-1)
    return 2 * size * size.unsqueeze(-1) / (size.square() + size.square().unsqueeze(-1))


def expert_gradients(gradient: Tensor, owner: Tensor) -> Tensor:
    """L2 norm [E] of the part of a gradient [R, ...] that belongs to each expert; owner [R]."""
    rows = gradient.double().flatten(1).square().sum(1)
    return torch.zeros(int(owner.max()) + 1, dtype=torch.float64).index_add_(0, owner, rows).sqrt()


def zero_gradient_share(norms: Tensor) -> Tensor:
    """Share of steps [E] with an exactly zero gradient, of norms [steps, E]."""
    return (norms == 0).double().mean(0)


@reported("routing/logsumexp", None, "mean over tokens")
def logsumexp(logits: Tensor) -> Tensor:
    """`ln sum_e exp z_te` [...]: scale of a router's scores [..., E]."""
    return logits.logsumexp(-1)


def z_loss(logits: Tensor) -> Tensor:
    """`mean_t (ln sum_e exp z_te)^2` of scores [..., T, E]. ST-MoE, arXiv 2202.08906, eq. 5."""
    return logsumexp(logits).square().mean(-1)


def _pairs(matrix: Tensor) -> Tensor:
    """Entries above the diagonal."""
    return matrix[tuple(torch.triu_indices(*matrix.shape, offset=1))]
