"""Shrink and expand: the only two operations of a low-rank mixture that touch wide tensors. Plain torch.

    Y_i, S = linear_shrink(X, [(W_i, b_i)], A)      Y_i = X W_i^T + b_i,  S = X A^T
    Y     += sum_j S_j B_j^T                        expand_add_

Each is one autograd node with a hand-written backward, around a rank-side mixture that stays ordinary autograd. The frozen linears that
read the same X belong to the same node as its shrink, so dX is accumulated in place by GEMMs and nothing of output width is saved.

Shapes: T tokens, d input width, b output width, R rank rows. Frozen weights get no gradient. Derivation: kernels/README.md.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

Frozen = tuple[Tensor, Tensor | None]  # weight [b, d], bias [b]


class _LinearShrink(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, a: Tensor, *frozen: Tensor | None):
        weights, biases = frozen[::2], frozen[1::2]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x if a.requires_grad else None, a, *weights)
        return (*(F.linear(x, w, b) for w, b in zip(weights, biases, strict=True)), F.linear(x, a))

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor | None):
        x, a, *weights = ctx.saved_tensors
        *dys, ds = grads
        da = ds.t() @ x if ds is not None and ctx.needs_input_grad[1] else None
        dx = None
        if ctx.needs_input_grad[0]:
            for dy, w in [*zip(dys, weights, strict=True), (ds, a)]:
                if dy is not None:
                    dx = dy @ w if dx is None else dx.addmm_(dy, w)
        return dx, da, *(None,) * (2 * len(weights))


class _ExpandAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y: Tensor, columns: tuple[slice, ...], *pairs: Tensor):
        ctx.mark_dirty(y)
        ctx.columns = columns
        ctx.save_for_backward(*pairs)
        return _expand_add_(y, columns, pairs)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        pairs, grads = ctx.saved_tensors, []
        for i, columns in enumerate(ctx.columns):
            s, b = pairs[2 * i : 2 * i + 2]
            part = dy[:, columns]
            grads.append(part @ b if ctx.needs_input_grad[2 + 2 * i] else None)
            grads.append(part.t() @ s if ctx.needs_input_grad[3 + 2 * i] else None)
        return dy, None, *grads


def _expand_add_(y: Tensor, columns: Sequence[slice], pairs: Sequence[Tensor]) -> Tensor:
    for i, part in enumerate(columns):
        (y if part == slice(None) else y[:, part]).addmm_(pairs[2 * i], pairs[2 * i + 1].t())
    return y


def linear_shrink(x: Tensor, frozen: Sequence[Frozen], a: Tensor) -> tuple[list[Tensor], Tensor]:
    """Frozen outputs `[Y_i [T, b_i]]` and `S [T, R]` of x [T, d] under frozen weights and a [R, d].

    a is taken in the dtype of x. Under autocast, or where a frozen weight asks for a gradient, the same result comes from plain ops.
    """
    if not torch.is_grad_enabled():
        return [F.linear(x, w, b) for w, b in frozen], F.linear(x, a.to(x.dtype))
    if torch.is_autocast_enabled(x.device.type) or any(w.requires_grad or (b is not None and b.requires_grad) for w, b in frozen):
        return [F.linear(x, w, b) for w, b in frozen], F.linear(x, a.to(x.dtype))
    *ys, s = _LinearShrink.apply(x, a.to(x.dtype), *(t for pair in frozen for t in pair))
    return ys, s


def shrink(x: Tensor, a: Tensor) -> Tensor:
    """`S = X A^T` [T, R], with A taken in the dtype of x."""
    return F.linear(x, a.to(x.dtype))


def expand_add_(y: Tensor, terms: Sequence[tuple[Tensor, Tensor] | tuple[Tensor, Tensor, slice]]) -> Tensor:
    """y [T, b] plus, in place, `S_j B_j^T` for each term (S_j [T, R_j], B_j [b_j, R_j], columns of y: all unless given)."""
    columns = tuple([term[2] if len(term) == 3 else slice(None) for term in terms])
    pairs = [t.to(y.dtype) for term in terms for t in term[:2]]
    if not torch.is_grad_enabled():
        return _expand_add_(y, columns, pairs)
    return _ExpandAdd.apply(y, columns, *pairs)
