"""Collapse of representations: whether tuning shrinks hidden states, or pulls them towards the experts they
are sent to.

Pure functions; hidden states x [T, d] of real tokens. Sums are taken in fp64. What is undefined is NaN.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .base import reported
from .experts import cka, effective_rank, spectrum


@reported("representation/rc", None, "token-level routers", of="read membership")
def within_between(x: Tensor, membership: Tensor) -> Tensor:
    """`RC = tr(S_W S_B^+)`, >= 0, smaller = more collapsed: router inputs within experts against between
    them. X-MoE, arXiv 2204.09179, eq. 10; RC / K is NC1 of neural collapse, arXiv 2008.08186.

    membership [T, K]: shares of each token in each expert, one-hot for a top-1 choice; weighted class means
    and covariances. Exact by K x K inverses: with M = [sqrt(n_k / N) (mu_k - mu)], G = M^T M and z_tk = M^T
    (x_t - mu_k), `RC = tr(G^+ G^+ sum_tk w_tk z z^T / N)`. Invariant to scale and rotation. NaN where the
    class means do not differ. Under random labels it grows with N: read it beside `shuffled_within_between`
    at the same N.
    """
    x, w = x.double(), membership.double()
    sizes = w.sum(0)
    used = sizes > 0
    w, sizes = w[:, used], sizes[used]
    total = sizes.sum()
    means = (w.T @ x) / sizes.unsqueeze(-1)  # [K, d]
    centre = (sizes / total) @ means
    m = ((means - centre) * (sizes / total).sqrt().unsqueeze(-1)).T  # [d, K]
    gram = m.T @ m
    spread = (w.sum(1) @ (x - centre).square()).sum() / total
    if gram.trace() <= 1e-16 * spread or len(sizes) < 2:
        return x.new_tensor(math.nan)
    z = ((x - centre) @ m).unsqueeze(1) - ((means - centre) @ m)  # [T, K, K]
    inner = torch.einsum("tk,tki,tkj->ij", w, z, z) / total
    inverse = torch.linalg.pinv(gram, rtol=1e-10, hermitian=True)
    return (inverse @ inverse * inner.T).sum()


@reported("representation/rc_shuffled", None, "token-level routers", of="read membership")
def shuffled_within_between(x: Tensor, membership: Tensor, shuffles: int = 5, seed: int = 0) -> Tensor:
    """Mean `within_between` with the memberships shuffled over tokens: what routing unrelated to x gives at
    this N."""
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(len(x), generator=generator).to(x.device) for _ in range(shuffles)]
    return torch.stack([within_between(x, membership[order]) for order in orders]).mean()


@reported("representation/clustering", None, "token-level routers")
def clustering(rc: Tensor, shuffled: Tensor) -> Tensor:
    """`ln(RC_shuffled / RC)`: 0 where routing is unrelated to geometry, large where tokens are clustered by
    expert."""
    return (shuffled / rc).log()


@reported("representation/drift_cka", "low", of="hidden frozen")
def drift_cka(on: Tensor, off: Tensor) -> Tensor:
    """Debiased linear CKA of hidden states [T, d] with and without the adapter, 1 = the same up to rotation
    and scale. arXiv 1905.00414."""
    return cka(torch.stack([on, off]))[0, 1]


@reported("representation/drift_norm", "high", of="hidden frozen")
def drift_norm(on: Tensor, off: Tensor) -> Tensor:
    """`|X_on - X_off|_F / |X_off|_F`, >= 0: how far tuning moved the hidden states."""
    return (on.double() - off.double()).norm() / off.double().norm()


@reported("representation/erank", "low", "of hidden states after each probed layer")
@reported("representation/erank_ratio", "low", "with the adapter over without")
def erank(x: Tensor) -> Tensor:
    """Effective rank of centred hidden states, 1 .. min(T, d). Roy and Vetterli 2007."""
    return effective_rank(spectrum(x))


@reported("representation/token_similarity", "high", of="hidden")
def token_similarity(x: Tensor) -> Tensor:
    """Mean cosine over all pairs of different tokens, `(|sum_t x^_t|^2 - T) / (T (T - 1))`, -1 .. 1:
    anisotropy. arXiv 1909.00512."""
    unit = torch.nn.functional.normalize(x.double(), dim=-1)
    count = len(x)
    return (unit.sum(0).square().sum() - unit.square().sum()) / (count * (count - 1))


@reported("representation/over_smoothing", "high", of="sequences real")
def over_smoothing(x: Tensor, real: Tensor) -> Tensor:
    """Mean cosine of tokens to the mean of their sequence, -1 .. 1. x [B, L, d]; real [B, L] bool."""
    weight = real.double().unsqueeze(-1)
    means = (x.double() * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp_min(1)
    return torch.nn.functional.cosine_similarity(x.double(), means, dim=-1)[real].mean()


@reported("representation/span_share", None, "linear routers", of="read router")
def span_share(x: Tensor, w: Tensor) -> Tensor:
    """`|P_W X|_F^2 / |X|_F^2`, 0 .. 1: share of hidden states x [T, d] within the span of the router's rows w
    [E, d]; random: rank / d.

    X-MoE (arXiv 2204.09179, eq. 5) predicts that routing pulls hidden states there.
    """
    _, s, v = torch.linalg.svd(w.double(), full_matrices=False)
    basis = v[s > 1e-10 * s[0]]
    return (x.double() @ basis.T).square().sum() / x.double().square().sum()


@reported("representation/router_cosine", "high", "linear routers", of="router")
def row_cosine(w: Tensor) -> Tensor:
    """Mean `|cos|` between different rows of the router w [E, d], 0 .. 1."""
    unit = torch.nn.functional.normalize(w.double(), dim=-1)
    cosines = (unit @ unit.T).abs()
    count = len(w)
    return (
        (cosines.sum() - cosines.diagonal().sum()) / (count * (count - 1))
        if count > 1
        else cosines.new_tensor(math.nan)
    )
