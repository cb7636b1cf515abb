"""The mixture inside a gated feed-forward block whose experts share its frozen weights (MixLoRA), as one autograd node.

    h_e  = act(G + S^g_e B^g_e^T) * (U + S^u_e B^u_e^T)
    hbar = sum_e w_e h_e            z_e = w_e (h_e * m) A_e^T

so that the block's output is `W_d hbar + sum_e B^d_e z_e`: frozen gate, up and down run once whatever the number of experts.

Shapes: T tokens, f inner width, E experts of r rank rows, R = E r, K selected experts a token. A sparse router's K selections are K
passes over [T, f] with the rank rows of other experts zeroed, not E passes and no gather: rank is cheap, passes are not. A soft router
takes E passes of r rows. The inner activations of each pass are kept for the backward (recomputing them is slower on a CPU; the Triton
kernels, moabench.kernels.triton.mix_ffn, recompute them).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from . import backend

ACTIVATIONS = {
    "silu": (F.silu, torch.ops.aten.silu_backward),
    "relu": (F.relu, lambda grad, a: torch.ops.aten.threshold_backward(grad, a, 0)),
    "gelu": (F.gelu, torch.ops.aten.gelu_backward),
    "gelu_tanh": (
        lambda a: F.gelu(a, approximate="tanh"),
        lambda grad, a: torch.ops.aten.gelu_backward(grad, a, approximate="tanh"),
    ),
}


def mix_ffn(
    gate: Tensor,
    up: Tensor,
    s_gate: Tensor,
    s_up: Tensor,
    b_gate: Tensor,
    b_up: Tensor,
    a_down: Tensor,
    weights: Tensor,
    ids: Tensor | None,
    act: str = "silu",
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """`hbar [T, f]` and `z [T, R]` from gate, up [T, f], s_gate, s_up [T, R], b_gate, b_up [f, R], a_down [R, f], weights [T, E].

    ids [T, K]: the selected experts, where every token has K; None for all. dropout acts on the input of a_down with one mask for all
    experts. act: one of ACTIVATIONS.
    """
    dtype = gate.dtype
    keep = None
    if dropout:
        keep = torch.empty_like(gate).bernoulli_(1 - dropout).div_(1 - dropout)
    cast = [t.to(dtype) for t in (up, s_gate, s_up, b_gate, b_up, a_down, weights)]  # under autocast they may differ
    if backend.triton_for(gate) and (found := _triton(weights.shape[1], s_gate.shape[1] // weights.shape[1])):
        chosen = None if ids is None else torch.zeros_like(weights, dtype=torch.bool).scatter_(1, ids, True)
        return found(gate, *cast[:-1], weights.float(), chosen, keep, act)
    return _MixFFN.apply(gate, *cast, ids, keep, act)


def _triton(experts: int, r: int):
    """The Triton operation; None where backend=auto and it cannot hold that many rank rows. Where Triton was demanded it says so itself."""
    from .triton import mix_ffn as kernels

    return kernels.mix_ffn if kernels.fits(experts, r) or backend.demanded() == "triton" else None


class _MixFFN(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, s_gate, s_up, b_gate, b_up, a_down, weights, ids, keep, act):
        activation = ACTIVATIONS[act][0]
        hbar, z = torch.zeros_like(gate), torch.zeros_like(s_gate)
        kept = []
        for rows, mask, w in _passes(weights, ids, s_gate.shape[1]):
            a = torch.addmm(gate, _part(s_gate, rows, mask), b_gate[:, rows].t())
            b = torch.addmm(up, _part(s_up, rows, mask), b_up[:, rows].t())
            h = activation(a).mul_(b)
            hbar.addcmul_(h, w)
            z[:, rows].add_(_masked((h if keep is None else h * keep) @ a_down[rows].t(), mask) * w)
            kept += [a, b]
        ctx.act = act
        ctx.save_for_backward(s_gate, s_up, b_gate, b_up, a_down, weights, ids, keep, *kept)
        return hbar, z

    @staticmethod
    @once_differentiable
    def backward(ctx, dhbar: Tensor, dz: Tensor):
        s_gate, s_up, b_gate, b_up, a_down, weights, ids, keep, *kept = ctx.saved_tensors
        activation, derivative = ACTIVATIONS[ctx.act]
        dgate, dup = torch.zeros_like(dhbar), torch.zeros_like(dhbar)
        ds_gate, ds_up = torch.zeros_like(s_gate), torch.zeros_like(s_up)
        db_gate, db_up, da_down = torch.zeros_like(b_gate), torch.zeros_like(b_up), torch.zeros_like(a_down)
        dweights = torch.zeros_like(weights)
        for i, (rows, mask, w) in enumerate(_passes(weights, ids, s_gate.shape[1])):
            a, b = kept[2 * i : 2 * i + 2]
            s = activation(a)
            h = s * b
            dz_e = _part(dz, rows, mask)
            through = dz_e @ a_down[rows]  # gradient of the expert's unweighted inner activation, by way of z
            if keep is not None:
                through.mul_(keep)
            dh = through.add_(dhbar)
            _add_column(dweights, ids, i, torch.linalg.vecdot(h, dh))
            dh.mul_(w)
            da_down[rows].addmm_((dz_e * w).t(), h if keep is None else h * keep)
            db = dh * s
            da = derivative(dh.mul_(b), a)
            dgate.add_(da)
            dup.add_(db)
            for d, b_mat, ds, db_mat, s_mat in ((da, b_gate, ds_gate, db_gate, s_gate), (db, b_up, ds_up, db_up, s_up)):
                ds[:, rows].add_(_masked(d @ b_mat[:, rows], mask))
                db_mat[:, rows].addmm_(d.t(), _part(s_mat, rows, mask))
        return dgate, dup, ds_gate, ds_up, db_gate, db_up, da_down, dweights, None, None, None


def _passes(weights: Tensor, ids: Tensor | None, total: int):
    """(rank rows, mask [T, rows] or None, weight [T, 1]) of each pass over the inner width."""
    experts = weights.shape[1]
    r = total // experts
    if ids is None or ids.shape[1] >= experts:
        for e in range(experts):
            yield slice(e * r, (e + 1) * r), None, weights[:, e : e + 1]
        return
    for k in range(ids.shape[1]):
        one_hot = torch.zeros_like(weights).scatter_(1, ids[:, k : k + 1], 1.0)  # F.one_hot looks at the values on the host
        yield slice(None), one_hot.repeat_interleave(r, dim=1), weights.gather(1, ids[:, k : k + 1])


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x * mask


def _part(x: Tensor, rows: slice, mask: Tensor | None) -> Tensor:
    return _masked(x[:, rows], mask)


def _add_column(dweights: Tensor, ids: Tensor | None, i: int, values: Tensor) -> None:
    """Add the weight gradient of pass i to its experts."""
    if ids is None or ids.shape[1] >= dweights.shape[1]:
        dweights[:, i].add_(values)
    else:
        dweights.scatter_add_(1, ids[:, i : i + 1], values.unsqueeze(1).to(dweights.dtype))
