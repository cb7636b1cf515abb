"""Collapse of experts: whether experts that are counted as several compute one thing.

Pure functions. `outputs` [E, n, k] are what E experts add for n tokens, all experts on the same tokens, those
not selected too, before weighting; k is the width d, or any isometric coordinates (`rank_coordinates`:
cosines, CKA, ranks and norms do not change). Low-rank experts of one linear are `a` [R, d_in], `b` [d_out, R]
and `owner` [R], the expert of each rank row, with the scale in `b`. Small sums are taken in fp64. What is
undefined (no output, one expert) is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .base import reported

ENERGY = 0.9
"""Share of an update's squared norm that its leading directions hold; the rest are unused rank rows."""
ZERO = 1e-8
"""Norm below which a token's output is none."""


# Outputs


def rank_coordinates(p: Tensor, b: Tensor) -> Tensor:
    """Outputs [E, n, min(R, d)] of low-rank experts, `O_e = P_e B^T`, in an orthonormal basis of the columns
    of B [d, R].

    p [E, n, R]: rank-side outputs, for LoRA x A^T where the expert owns the rank row and 0 elsewhere. With B
    = Q C, `O_e Q = P_e C^T`: O(n R^2) an expert, no n x d tensor.
    """
    return p.double() @ torch.linalg.qr(b.double()).R.T


def norms(outputs: Tensor) -> Tensor:
    """`|o_te|` [n, E], L2."""
    return outputs.norm(dim=-1).T


@reported("experts/output_cosine", "high", "mean off the diagonal")
def output_cosine(outputs: Tensor) -> Tensor:
    """`mean_t cos(o_ti, o_tj)` [E, E], -1 .. 1, over the tokens where both are no zero (norm >= 1e-8); NaN
    without such tokens."""
    size = norms(outputs)  # [n, E]
    there = (size >= ZERO).double()
    unit = outputs.double() / size.T.unsqueeze(-1).clamp_min(ZERO) * there.T.unsqueeze(-1)
    flat = unit.flatten(1)
    return (flat @ flat.T) / (there.T @ there)


@reported("experts/zero_share", "high", "mean over experts")
def zero_share(outputs: Tensor) -> Tensor:
    """Share of tokens [E] for which an expert's output is zero; 1 for LoRA at its start."""
    return (norms(outputs) < ZERO).double().mean(0)


@reported("experts/cka", "high", "debiased, mean off the diagonal")
@reported("experts/cka_null", None, "of random experts: the same inputs, kinds, ranks and scale")
@reported("experts/cka_minus_null", "high", "`experts/cka` less `experts/cka_null`: alike beyond inputs")
def cka(outputs: Tensor, debiased: bool = True) -> Tensor:
    """Linear CKA of every pair [E, E]: `HSIC(K_i, K_j) / sqrt(HSIC(K_i, K_i) HSIC(K_j, K_j))`, K_i = O_i
    O_i^T. arXiv 1905.00414.

    0 .. 1, invariant to rotation and scale of either. Plain: `|O_j^T O_i|_F^2 / (|O_i^T O_i|_F |O_j^T
    O_j|_F)` of centred outputs, biased upwards unless n is much larger than the width. Debiased: HSIC by its
    unbiased estimator (Song et al. 2012; as here in arXiv 2010.15327), which may fall a little below 0; needs
    n > 3.
    """
    x = outputs - outputs.mean(1, keepdim=True)
    n, inner = x.shape[1], _gram_products(x)
    x = x.double()
    if debiased:
        if n <= 3:
            return torch.full_like(inner, math.nan)
        diagonal = x.square().sum(-1)  # [E, n]
        rows = (x @ x.sum(1).unsqueeze(-1)).squeeze(-1) - diagonal  # row sums of K with an empty diagonal
        total = rows.sum(-1)
        inner = (
            inner
            - diagonal @ diagonal.T
            + total * total.unsqueeze(-1) / ((n - 1) * (n - 2))
            - 2 / (n - 2) * rows @ rows.T
        )
    own = inner.diagonal()
    own = torch.where(own > 0, own, math.nan)
    return inner / (own * own.unsqueeze(-1)).sqrt()


def _gram_products(x: Tensor) -> Tensor:
    """`tr(K_i K_j) = |X_i^T X_j|_F^2` [E, E] in fp64 of x [E, n, k], by the smaller of the two forms, its
    wide product in x's own dtype."""
    e, n, k = x.shape
    if e * k * k <= n * n:
        columns = x.transpose(0, 1).flatten(1)
        return (columns.T @ columns).double().view(e, k, e, k).square().sum((1, 3))
    grams = (x @ x.mT).double().flatten(1)
    return grams @ grams.T


def off_diagonal(matrix: Tensor) -> Tensor:
    """Mean [...] of the entries of [..., E, E] off the diagonal; NaN entries are left out."""
    itself = torch.eye(matrix.shape[-1], device=matrix.device).bool()
    return matrix.masked_fill(itself, math.nan).flatten(-2).nanmean(-1)


# Weights


def weight_products(a: Tensor, b: Tensor, owner: Tensor) -> Tensor:
    """`<dW_i, dW_j>_F = sum((B_i^T B_j) * (A_i A_j^T))` [E, E], dW_e = B_e A_e: O(R^2 (d_in + d_out)), no
    data."""
    rows = (b.double().T @ b.double()) * (a.double() @ a.double().T)  # [R, R]
    member = torch.nn.functional.one_hot(owner).double()
    return member.T @ rows @ member


@reported("experts/weight_cosine", "high", "mean off the diagonal; low-rank experts on one linear")
def weight_cosine(a: Tensor, b: Tensor, owner: Tensor) -> Tensor:
    """Cosine of updates [E, E], -1 .. 1; NaN for an update of zero."""
    products = weight_products(a, b, owner)
    size = products.diagonal().clamp_min(0).sqrt()
    return products / (size * size.unsqueeze(-1))


def directions(a: Tensor, b: Tensor, energy: float = ENERGY) -> tuple[Tensor, Tensor, Tensor]:
    """Singular values [r] of dW = b a (a [r, d_in], b [d_out, r]), and its leading left [d_out, m] and right
    [d_in, m] directions.

    Through the r x r core of two QRs. The m leading directions hold `energy` of the squared norm.
    """
    left, right = torch.linalg.qr(b.double()), torch.linalg.qr(a.double().T)
    u, s, v = torch.linalg.svd(left.R @ right.R.T)
    held = s.square().cumsum(0) / s.square().sum()
    m = int((held < energy).sum()) + 1 if s[0] > 0 else 0
    return s, left.Q @ u[:, :m], right.Q @ v.T[:, :m]


@reported("experts/overlap_in", "high", "of leading input directions; the same experts")
@reported("experts/overlap_out", "high", "of leading output directions; the same experts")
def overlap(u: Tensor, v: Tensor) -> Tensor:
    """`|U^T V|_F^2 / min(r_u, r_v)`, 0 .. 1, of two orthonormal bases [d, r]. LoRA, arXiv 2106.09685, sec.
    7.2. NaN for an empty one."""
    least = min(u.shape[1], v.shape[1])
    return (u.T @ v).square().sum() / least if least else u.new_tensor(math.nan)


def overlaps(bases: Sequence[Tensor]) -> Tensor:
    """`overlap` of every pair [E, E]."""
    return torch.stack([torch.stack([overlap(u, v) for v in bases]) for u in bases])


def overlap_by_chance(r_u: int, r_v: int, d: int) -> float:
    """Expected overlap of random subspaces of R^d, `max(r_u, r_v) / d`."""
    return max(r_u, r_v) / d


def grassmann_distance(u: Tensor, v: Tensor) -> Tensor:
    """`sqrt(sum theta^2) / (sqrt(min r) pi / 2)`, 0 .. 1, theta the principal angles, arccos of the singular
    values of U^T V."""
    angles = torch.linalg.svdvals(u.T @ v).clamp(max=1.0).arccos()
    return angles.square().sum().sqrt() / (math.sqrt(min(u.shape[1], v.shape[1])) * math.pi / 2)


# Ranks


def spectrum(x: Tensor, centre: bool = True) -> Tensor:
    """Singular values [..., min(n, k)], largest first, of x [..., n, k], by default of its deviations from
    the mean row."""
    x = x.double()
    x = x - x.mean(-2, keepdim=True) if centre else x
    gram = x.mT @ x if x.shape[-1] <= x.shape[-2] else x @ x.mT
    squares = torch.linalg.eigvalsh(gram)
    noise = squares.amax(-1, keepdim=True) * gram.shape[-1] * torch.finfo(gram.dtype).eps
    return torch.where(squares > noise, squares, 0.0).sqrt().flip(-1)


@reported("experts/output_erank", "low", "of each expert's centred outputs, mean over experts")
@reported("experts/update_erank", "low", "of each expert's update, mean over experts; the same experts")
@reported("representation/router_erank", "low", "of the weight of a linear router")
def effective_rank(s: Tensor) -> Tensor:
    """`exp(-sum s^ ln s^)` [...], 1 .. rank, s^ = singular values [..., r] over their sum. Roy and Vetterli
    2007. NaN for a zero matrix."""
    share = s / s.sum(-1, keepdim=True)
    return torch.special.entr(share).sum(-1).exp()


def stable_rank(s: Tensor) -> Tensor:
    """`|M|_F^2 / |M|_2^2` [...], 1 .. rank, of singular values [..., r]."""
    return s.square().sum(-1) / s.square().amax(-1)


def participation_ratio(s: Tensor) -> Tensor:
    """`(sum s^2)^2 / sum s^4` [...], 1 .. rank, of singular values [..., r]."""
    return s.square().sum(-1).square() / s.pow(4).sum(-1)


# Ablation


def redundant(without: Tensor, whole: float, base: float, share: float = 0.01) -> Tensor:
    """Number of experts whose removal costs less than `share` of the adapter's gain.

    without [E]: loss with expert e removed; whole: with all; base: without the adapter. NaN where the adapter
    gained nothing.
    """
    gain = base - whole
    return ((without - whole) < share * gain).sum().double() if gain > 0 else without.new_tensor(math.nan)
