"""Shrink and expand: the only two operations of a low-rank mixture that touch wide tensors.

    Y_i, S, Z = linear_shrink(X, [(W_i, b_i)], A, H)      Y_i = X W_i^T + b_i,  S = X A^T,  Z = X H^T in full
                                                          precision
    Y        += sum_j S_j B_j^T                           expand_add_

Each is one autograd node with a hand-written backward, around a rank-side mixture that stays ordinary
autograd. The frozen linears and the routers (H) that read the same X belong to the same node as its shrink,
so dX is accumulated in place by GEMMs and nothing of output width is saved. Both backends run the same nodes;
they differ in the four steps at the end of this file.

Shapes: T tokens, d input width, b output width, R rank rows, H router rows. Frozen weights get no gradient.
Derivation: docs/kernels.md.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from . import backend

Frozen = tuple[Tensor, Tensor | None]  # weight [b, d], bias [b]


def full_precision(dtype: torch.dtype) -> torch.dtype:
    """Routers compute in fp32, or in fp64 where the model does."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def linear_shrink(
    x: Tensor, frozen: Sequence[Frozen], a: Tensor, heads: Tensor | None = None
) -> tuple[list[Tensor], Tensor, Tensor | None]:
    """Frozen outputs `[Y_i [T, b_i]]`, `S [T, R]` and router scores `Z [T, H]` of x [T, d] under a [R, d] and
    heads [H, d].

    a is taken in the dtype of x; Z is computed and returned in fp32 (fp64 for fp64 x), its backward in the
    dtype of x like every other gradient. Under autocast the same comes from plain ops, and so do the Y_i
    where a frozen weight asks for a gradient.
    """
    a = a.to(x.dtype)
    tensors = [t for pair in frozen for t in pair]
    if any(t is not None and t.requires_grad for t in tensors) and torch.is_grad_enabled():
        return [F.linear(x, w, b) for w, b in frozen], *linear_shrink(x, [], a, heads)[1:]
    triton = backend.triton_for(x)
    if backend.autocasting(x):
        with torch.autocast(x.device.type, enabled=False):
            z = (
                None
                if heads is None
                else F.linear(x.to(full_precision(x.dtype)), heads.to(full_precision(x.dtype)))
            )
        return [F.linear(x, w, b) for w, b in frozen], F.linear(x, a), z
    if not torch.is_grad_enabled():
        return _forward(x, a, heads, tensors, triton)
    *ys, s, z = _LinearShrink.apply(x, a, heads, triton, *tensors)
    return ys, s, z


def shrink(x: Tensor, a: Tensor) -> Tensor:
    """`S = X A^T` [T, R], with A taken in the dtype of x."""
    return linear_shrink(x, [], a)[1]


def weigh(s: Tensor, w: Tensor, spread: Tensor) -> Tensor:
    """`S * (w P)` [T, G, R] of s [T, G, R], w [T, G, E] and P = spread [E, R], the factor of each rank row in
    its owner's row. The factors are made again in the backward: [T, G, E] is kept instead of [T, G, R]."""
    return _Weigh.apply(s, w, spread.to(s.dtype))


def expand_add_(y: Tensor, terms: Sequence[tuple[Tensor, Tensor] | tuple[Tensor, Tensor, slice]]) -> Tensor:
    """y [T, b] plus, in place, `S_j B_j^T` for each term (S_j [T, R_j], B_j [b_j, R_j], columns of y: all
    unless given)."""
    columns = tuple([term[2] if len(term) == 3 else slice(None) for term in terms])
    pairs = [t.to(y.dtype) for term in terms for t in term[:2]]
    triton = backend.triton_for(y)
    if not torch.is_grad_enabled():
        return _expand_add_(y, columns, pairs, triton)
    return _ExpandAdd.apply(y, columns, triton, *pairs)


def _forward(
    x: Tensor, a: Tensor, heads: Tensor | None, tensors: Sequence[Tensor | None], triton: bool
) -> tuple[list[Tensor], Tensor, Tensor | None]:
    ys = [F.linear(x, w, b) for w, b in zip(tensors[::2], tensors[1::2], strict=True)]
    return ys, *steps(triton).shrink_both(x, a, heads)


class _LinearShrink(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, a: Tensor, heads: Tensor | None, triton: bool, *tensors: Tensor | None):
        ys, s, z = _forward(x, a, heads, tensors, triton)
        ctx.set_materialize_grads(False)
        rows = a if heads is None else torch.cat([a, heads.to(x.dtype)])
        ctx.save_for_backward(x if any(ctx.needs_input_grad[1:3]) else None, rows, *tensors[::2])
        ctx.split, ctx.head_dtype, ctx.triton = a.shape[0], None if heads is None else heads.dtype, triton
        return (*ys, s, z)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor | None):
        x, rows, *weights = ctx.saved_tensors
        *dys, ds, dz = grads
        if dz is not None:
            dz = dz.to(rows.dtype)
            ds = torch.cat([dz.new_zeros(dz.shape[0], ctx.split) if ds is None else ds, dz], -1)
        elif ds is not None:
            rows = rows[: ctx.split]
        step = steps(ctx.triton)
        dx, da, dheads = None, None, None
        if ds is not None and x is not None:
            drows = step.outer(ds, x)
            da = drows[: ctx.split]
            dheads = drows[ctx.split :].to(ctx.head_dtype) if dz is not None else None
        if ctx.needs_input_grad[0]:
            for dy, w in zip(dys, weights, strict=True):
                if dy is not None:
                    dx = dy @ w if dx is None else dx.addmm_(dy, w)
            if ds is not None:
                dx = ds @ rows if dx is None else step.add_(dx, ds, rows.t())
        return dx, da, dheads, None, *(None,) * (2 * len(weights))


class _Weigh(torch.autograd.Function):
    @staticmethod
    def forward(ctx, s: Tensor, w: Tensor, spread: Tensor):
        ctx.save_for_backward(s, w, spread)
        return s * _factors(s, w, spread)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        s, w, spread = ctx.saved_tensors
        ds = grad * _factors(s, w, spread) if ctx.needs_input_grad[0] else None
        dw = (
            ((grad * s).flatten(0, -2) @ spread.t()).view(w.shape).to(w.dtype)
            if ctx.needs_input_grad[1]
            else None
        )
        return ds, dw, None


def _factors(s: Tensor, w: Tensor, spread: Tensor) -> Tensor:
    return (w.to(s.dtype).flatten(0, -2) @ spread).view(s.shape)  # 2-D: a 3-D product may become T tiny ones


class _ExpandAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y: Tensor, columns: tuple[slice, ...], triton: bool, *pairs: Tensor):
        ctx.mark_dirty(y)
        ctx.columns, ctx.triton = columns, triton
        ctx.save_for_backward(*pairs)
        return _expand_add_(y, columns, pairs, triton)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        pairs, grads = ctx.saved_tensors, []
        step = steps(ctx.triton)
        for i, columns in enumerate(ctx.columns):
            s, b = pairs[2 * i : 2 * i + 2]
            part = dy[:, columns]
            grads.append(step.product(part, b) if ctx.needs_input_grad[3 + 2 * i] else None)
            grads.append(step.outer(s, part).t() if ctx.needs_input_grad[4 + 2 * i] else None)
        return dy, None, None, *grads


def _expand_add_(y: Tensor, columns: Sequence[slice], pairs: Sequence[Tensor], triton: bool) -> Tensor:
    for i, part in enumerate(columns):
        steps(triton).add_(y if part == slice(None) else y[:, part], pairs[2 * i], pairs[2 * i + 1])
    return y


# The steps in plain torch


def steps(triton: bool) -> ModuleType:
    """The module whose `shrink_both`, `add_`, `product` and `outer` run: this one, or its Triton
    counterpart."""
    if not triton:
        return sys.modules[__name__]
    from .triton import lowrank

    return lowrank


def shrink_both(x: Tensor, a: Tensor, heads: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """`S = X A^T` and `Z = X H^T`, Z in full precision."""
    if heads is None:
        return F.linear(x, a), None
    full = full_precision(x.dtype)
    if x.dtype != full:
        return F.linear(x, a), _in_full(x, heads.to(full))
    s, z = F.linear(x, torch.cat([a, heads.to(full)])).split_with_sizes([a.shape[0], heads.shape[0]], -1)
    return s, z


def _in_full(x: Tensor, heads: Tensor) -> Tensor:
    """`X H^T` in the dtype of heads; on a CPU in blocks of tokens, whose wider copy then stays in cache."""
    block = 256
    if x.device.type != "cpu" or x.shape[0] <= block or torch.compiler.is_compiling():
        return F.linear(x.to(heads.dtype), heads)
    z, columns = x.new_empty(x.shape[0], heads.shape[0], dtype=heads.dtype), heads.t().contiguous()
    for part, out in zip(x.split(block), z.split(block), strict=True):
        torch.mm(part.to(heads.dtype), columns, out=out)
    return z


def add_(y: Tensor, s: Tensor, b: Tensor) -> Tensor:
    """`y += s b^T` in place."""
    return y.addmm_(s, b.t())


def product(y: Tensor, b: Tensor) -> Tensor:
    """`y b`."""
    return y @ b


def outer(s: Tensor, y: Tensor) -> Tensor:
    """`s^T y`, the sum over tokens; on a CPU faster than the transpose of `y^T s`."""
    return s.t() @ y
