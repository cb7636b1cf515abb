"""RMSNorm and shrink in one pass over the input, for low-rank experts and routers that read a normed input.

    Y = X rstd * g,   rstd = (mean(X^2) + eps)^(-1/2)       S = Y A^T,   Z = Y H^T in full precision

Shapes: T tokens, d width, R rank rows, H router rows. Y is rounded as the model's own RMSNorm rounds it, and
S and Z are of the rounded Y, so the results are those of the norm followed by `lowrank.linear_shrink`. g is
frozen. Derivation: README.md.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import backend, lowrank


def norm_shrink(
    x: Tensor, weight: Tensor, eps: float, a: Tensor, heads: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`Y` [T, d], `S` [T, R] in the dtype of x [T, d], and `Z` [T, H] in fp32 (fp64 for fp64 x) or None;
    weight g [d], a [R, d], heads [H, d]. Raises ValueError where g asks for a gradient."""
    if weight.requires_grad and torch.is_grad_enabled():
        raise ValueError("norm_shrink: the norm's weight is frozen here; expected one without requires_grad.")
    a, weight = a.to(x.dtype), weight.to(x.dtype)
    y, s, z = _NormShrink.apply(x, weight, eps, a, heads, backend.triton_for(x))
    return y, s, z


class _NormShrink(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float, a: Tensor, heads: Tensor | None, triton: bool):
        if triton:
            y, rstd, s, z = _triton().norm_shrink(x, weight, eps, a, heads)
            z = None if heads is None else z
        else:
            y, rstd = _norm(x, weight, eps)
            s, z = lowrank.shrink_both(y, a, heads)
        ctx.set_materialize_grads(False)
        ctx.triton, ctx.split, ctx.head_dtype = triton, a.shape[0], None if heads is None else heads.dtype
        ctx.save_for_backward(x, weight, rstd, a if heads is None else torch.cat([a, heads.to(x.dtype)]))
        return y, s, z

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor | None, ds: Tensor | None, dz: Tensor | None):
        x, weight, rstd, rows = ctx.saved_tensors
        if dz is not None:
            ds = x.new_zeros(x.shape[0], ctx.split) if ds is None else ds
            ds = torch.cat([ds, dz.to(x.dtype)], -1)
        elif ds is not None:
            rows = rows[: ctx.split]
        da, dheads, dx = None, None, None
        if ds is not None:
            y = (x.to(rstd.dtype) * rstd).to(x.dtype) * weight
            drows = lowrank.steps(ctx.triton).outer(ds, y)
            da = drows[: ctx.split]
            dheads = None if dz is None else drows[ctx.split :].to(ctx.head_dtype)
        if ctx.needs_input_grad[0]:
            dy = torch.zeros_like(x) if dy is None else dy
            if ctx.triton:
                dx = _triton().norm_shrink_backward(dy, ds, rows, x, weight, rstd)
            else:
                dx = _norm_backward(dy if ds is None else torch.addmm(dy, ds, rows), x, weight, rstd)
        return dx, None, None, da, dheads, None


def _norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`Y` and rstd [T, 1]; the row is scaled in full precision, rounded, and then multiplied by g, as
    transformers' norms do."""
    wide = x.to(lowrank.full_precision(x.dtype))
    rstd = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (wide * rstd).to(x.dtype) * weight, rstd


def _norm_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> Tensor:
    """`dX = rstd (g dY - n mean(g dY n))` with n = X rstd."""
    grad, n = (dy * weight).to(rstd.dtype), x.to(rstd.dtype) * rstd
    return (rstd * (grad - n * (grad * n).mean(-1, keepdim=True))).to(x.dtype)


def _triton():
    from .triton import norm_shrink

    return norm_shrink
