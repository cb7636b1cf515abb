"""The mixture inside a gated feed-forward block whose experts share its frozen weights (MixLoRA), as one
autograd node.

    h_e  = act(G + S^g_e B^g_e^T) * (U + S^u_e B^u_e^T)
    hbar = sum_e w_e h_e            z_e = w_e (h_e * m) A_e^T

so that the block's output is `W_d hbar + sum_e B^d_e z_e`: frozen gate, up and down run once whatever the
number of experts.

Shapes: T tokens, f inner width, E experts of r rank rows, R = E r, K selected experts a token. A sparse
router's K selections are K passes over the inner width with the rank rows of other experts zeroed, not E
passes and no gather: rank is cheap, passes are not. A soft router takes E passes of r rows. On a CPU a pass
goes through the tokens in blocks, so that what it makes of width f stays near the core. None of that is kept:
the backward makes it again, as the Triton kernels do (moabench.kernels.triton.mix_ffn).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from . import backend

BLOCK = 1024 * 1024
"""Bytes of one [tokens, f] tensor of a block: a few stay near the core, and a GEMM has tokens enough
(measured, see docs/kernels.md)."""

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
    """`hbar [T, f]` and `z [T, R]` from gate, up [T, f], s_gate, s_up [T, R], b_gate, b_up [f, R], a_down [R,
    f], weights [T, E].

    ids [T, K]: the selected experts, where every token has K; None for all. dropout acts on the input of
    a_down with one mask for all experts. act: one of ACTIVATIONS.
    """
    dtype = gate.dtype
    keep = None
    if dropout:
        keep = torch.empty_like(gate).bernoulli_(1 - dropout).div_(1 - dropout)
    cast = [
        t.to(dtype) for t in (up, s_gate, s_up, b_gate, b_up, a_down, weights)
    ]  # under autocast they may differ
    if backend.triton_for(gate) and (found := _triton(weights.shape[1], s_gate.shape[1] // weights.shape[1])):
        chosen = None if ids is None else torch.zeros_like(weights, dtype=torch.bool).scatter_(1, ids, True)
        return found(gate, *cast[:-1], weights.float(), chosen, keep, act)
    return _MixFFN.apply(gate, *cast, ids, keep, act)


def _triton(experts: int, r: int):
    """The Triton operation; None where backend=auto and it cannot hold that many rank rows. Where Triton was
    demanded it says so itself."""
    from .triton import mix_ffn as kernels

    return kernels.mix_ffn if kernels.fits(experts, r) or backend.demanded() == "triton" else None


class _MixFFN(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, s_gate, s_up, b_gate, b_up, a_down, weights, ids, keep, act):
        activation = ACTIVATIONS[act][0]
        hbar, z = torch.empty_like(gate), torch.zeros_like(s_gate)
        bt_gate, bt_up = b_gate.t().contiguous(), b_up.t().contiguous()
        for i, (rows, mask, w) in enumerate(_passes(weights, ids, s_gate.shape[1])):
            sg, su, code = _part(s_gate, rows, mask), _part(s_up, rows, mask), torch.empty_like(z[:, rows])
            for t in _blocks(gate, s_gate.shape[1]):
                h = activation(torch.addmm(gate[t], sg[t], bt_gate[rows])).mul_(
                    torch.addmm(up[t], su[t], bt_up[rows])
                )
                _add_weighted_(hbar[t], h, w[t], first=i == 0)
                code[t] = (h if keep is None else h.mul_(keep[t])) @ a_down[rows].t()
            z[:, rows].add_(_masked(code, mask) * w)
        ctx.act = act
        ctx.save_for_backward(gate, up, s_gate, s_up, b_gate, b_up, a_down, weights, ids, keep)
        return hbar, z

    @staticmethod
    @once_differentiable
    def backward(ctx, dhbar: Tensor, dz: Tensor):
        gate, up, s_gate, s_up, b_gate, b_up, a_down, weights, ids, keep = ctx.saved_tensors
        activation, derivative = ACTIVATIONS[ctx.act]
        bt_gate, bt_up = b_gate.t().contiguous(), b_up.t().contiguous()
        dgate, dup, dweights = torch.empty_like(gate), torch.empty_like(up), torch.zeros_like(weights)
        ds_gate, ds_up = torch.zeros_like(s_gate), torch.zeros_like(s_up)
        blocks = _blocks(gate, s_gate.shape[1])
        db_gate, db_up, da_down = (_parts(a_down, len(blocks)) for _ in range(3))
        for i, (rows, mask, w) in enumerate(_passes(weights, ids, s_gate.shape[1])):
            sg, su, dz_e = (_part(x, rows, mask) for x in (s_gate, s_up, dz))
            sg_w, su_w, dz_w = sg * w, su * w, dz_e * w
            dsg, dsu, dw = torch.empty_like(sg), torch.empty_like(su), torch.empty_like(w[:, 0])
            for n, t in enumerate(blocks):
                a, b = torch.addmm(gate[t], sg[t], bt_gate[rows]), torch.addmm(up[t], su[t], bt_up[rows])
                s = activation(a)
                h = s * b
                # Of the unweighted h: weights act on the rank side and where passes are summed.
                dh = _add(dhbar[t], dz_e[t], a_down[rows], None if keep is None else keep[t])
                dw[t] = torch.linalg.vecdot(h, dh)
                _part_of(da_down, n, rows).addmm_(dz_w[t].t(), h if keep is None else h.mul_(keep[t]))
                db = s.mul_(dh)
                da = derivative(dh.mul_(b), a)
                _add_weighted_(dgate[t], da, w[t], first=i == 0)
                _add_weighted_(dup[t], db, w[t], first=i == 0)
                dsg[t], dsu[t] = da @ b_gate[:, rows], db @ b_up[:, rows]
                _part_of(db_gate, n, rows).addmm_(sg_w[t].t(), da)
                _part_of(db_up, n, rows).addmm_(su_w[t].t(), db)
            ds_gate[:, rows].add_(_masked(dsg, mask) * w)
            ds_up[:, rows].add_(_masked(dsu, mask) * w)
            _add_column_(dweights, ids, i, dw)
        return (
            dgate,
            dup,
            ds_gate,
            ds_up,
            db_gate.sum(0).t(),
            db_up.sum(0).t(),
            da_down.sum(0),
            dweights,
            None,
            None,
            None,
        )


def _blocks(x: Tensor, total: int) -> list[slice]:
    """The tokens of x [T, f] in blocks; one block under torch.compile, which fuses what a block does, and on
    other devices than CPUs.

    A block has at least R tokens, so that the parts of a gradient [R, f] are no larger than x, and enough for
    efficient GEMMs.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return [slice(None)]
    size = max(64, total, BLOCK // (x.shape[1] * x.element_size()))
    return [slice(start, start + size) for start in range(0, x.shape[0], size)]


def _parts(a_down: Tensor, blocks: int) -> Tensor:
    """Zeros for a gradient [R, f] that is summed over blocks: a part for each where adding one after the
    other would round each time."""
    return a_down.new_zeros(1 if a_down.dtype in (torch.float32, torch.float64) else blocks, *a_down.shape)


def _part_of(parts: Tensor, block: int, rows: slice) -> Tensor:
    return parts[block % len(parts), rows]


def _passes(weights: Tensor, ids: Tensor | None, total: int):
    """(rank rows, mask [T, rows] or None, weight [T, 1]) of each pass over the inner width."""
    experts = weights.shape[1]
    r = total // experts
    if ids is None or ids.shape[1] >= experts:
        for e in range(experts):
            yield slice(e * r, (e + 1) * r), None, weights[:, e : e + 1]
        return
    for k in range(ids.shape[1]):
        one_hot = torch.zeros_like(weights).scatter_(
            1, ids[:, k : k + 1], 1.0
        )  # F.one_hot looks at the values on the host
        yield slice(None), one_hot.repeat_interleave(r, dim=1), weights.gather(1, ids[:, k : k + 1])


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x * mask


def _part(x: Tensor, rows: slice, mask: Tensor | None) -> Tensor:
    return _masked(x[:, rows], mask)


def _add(y: Tensor, s: Tensor, b: Tensor, keep: Tensor | None) -> Tensor:
    """`y + keep * (s b)`."""
    return torch.addmm(y, s, b) if keep is None else torch.addcmul(y, s @ b, keep)


def _add_weighted_(out: Tensor, x: Tensor, w: Tensor, first: bool) -> None:
    """`out += w x`; the first pass writes `out`."""
    if first:
        torch.mul(x, w, out=out)
    else:
        out.addcmul_(x, w)


def _add_column_(dweights: Tensor, ids: Tensor | None, i: int, values: Tensor) -> None:
    """Add the weight gradient of pass i to its experts."""
    if ids is None or ids.shape[1] >= dweights.shape[1]:
        dweights[:, i].add_(values)
    else:
        dweights.scatter_add_(1, ids[:, i : i + 1], values.unsqueeze(1).to(dweights.dtype))
