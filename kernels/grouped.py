"""The low-rank update of selected experts only: rows are sorted by expert, and every expert meets its own
rows.

    y_t += sum_k w_tk B_e A_e x_t,   e = ids_tk          instead of all E experts with zeros in w (lowrank.py)

pays where E is large against K: `prefers_sorted` says where. For G linears that share one input:

    shrunk = grouped.shrink(x, a, weights, ids, scale)         w_tk A_e x_t for every selection, one autograd
                                                               node
    grouped.expand_add_(y_g, shrunk, g, b_g)                   a node for each linear, in place

Nothing waits for the host: a stable sort of the ids on the device, T K rows whatever the load, sums in a
fixed order. All experts have rank r, every token K experts. Both nodes have a hand-written backward, and both
backends run the same nodes; they differ in the three steps at the end of this file.

Shapes: T tokens, G sites (linears), E experts, K selected, N = T K rows of one site, a input width, b output
width, R = E r.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from . import backend

BREAK_EVEN = {
    ("cpu", torch.float32): 80.0,
    ("cpu", torch.bfloat16): 1000.0,
    ("cuda", torch.bfloat16): 215.0,
    ("cuda", torch.float16): 215.0,
}
"""c of `prefers_sorted` by device and dtype: CPUs as measured on one with AMX (docs/kernels.md), GPUs from a
model of bytes and FLOPs, not yet measured. `python -m moabench.benchmarks.speed.sorting` measures it on a
machine."""


def prefers_sorted(
    experts: int, k: int, r: int, device: str | torch.device, dtype: torch.dtype, *widths: int
) -> bool:
    """Whether sorting beats computing all experts: `(E - K) r > c K`. Dense wastes (E - K) r columns of each
    GEMM, sorting moves K wide rows a token; both grow with the width, so c does not.

    False where there is no kernel for it: a device and dtype without c, and plain torch on CPUs for rows (r
    or one of the matrices' `widths`) that are not whole 16 bytes, on other devices at all.
    """
    device = torch.device(device)
    c = BREAK_EVEN.get((device.type, dtype))
    if c is None or (experts - k) * r <= c * k:
        return False
    if backend.triton_for(torch.empty(0, device=device, dtype=dtype)):
        return True
    return device.type == "cpu" and not any(n * dtype.itemsize % 16 for n in (r, *widths))


@dataclass(frozen=True)
class Order:
    """Selections sorted by expert within each site. tokens [G, N]: the token of each sorted row; slots [G,
    N]: its selection t K + k; rows [G, T, K]: the sorted row of each selection; ends [G, E] int32: where each
    expert's rows end."""

    tokens: Tensor
    slots: Tensor
    rows: Tensor
    ends: Tensor


@dataclass(frozen=True)
class Shrunk:
    """What `shrink` made: rows [G][N, r] in the order of `order`."""

    rows: tuple[Tensor, ...]
    order: Order


def sort(ids: Tensor, experts: int) -> Order:
    """The order of ids [T, G, K] int64, all below `experts`. Equal ids keep the order of their tokens."""
    tokens, sites, k = ids.shape
    keys = ids.movedim(1, 0).reshape(sites, tokens * k).contiguous()
    found, slots = keys.sort(dim=1, stable=True)
    rows = torch.empty_like(slots).scatter_(
        1, slots, torch.arange(tokens * k, device=ids.device).expand_as(slots)
    )
    numbers = torch.arange(experts, device=ids.device, dtype=found.dtype).repeat(sites, 1)
    ends = torch.searchsorted(found, numbers, right=True, out_int32=True)
    return Order(slots // k, slots, rows.view(sites, tokens, k), ends)


def grouped_lowrank(
    x: Tensor, a: Tensor, b: Tensor, ids: Tensor, weights: Tensor, scale: float, y: Tensor
) -> Tensor:
    """y [T, b] plus, in place, the update of one linear: x [T, a], a [R, a], b [b, R], ids [T, K] int64
    (distinct in a row), weights [T, E], from which those of the ids are taken."""
    return expand_add_(y, shrink(x, a, weights.unsqueeze(1), ids.unsqueeze(1), scale), 0, b)


def shrink(x: Tensor, a: Tensor, weights: Tensor, ids: Tensor, scale: float) -> Shrunk:
    """`scale w A_e x` of every selection, of x [T, a], a [G R, a] site by site, weights [T, G, E] and ids [T,
    G, K] int64, distinct in a row. a is taken in the dtype of x."""
    order, triton = sort(ids, weights.shape[-1]), backend.triton_for(x)
    s = _Shrink.apply(
        x, a.to(x.dtype), weights, ids, scale, triton, order.tokens, order.slots, order.rows, order.ends
    )
    return Shrunk(s.unbind(0), order)


def expand_add_(y: Tensor, shrunk: Shrunk, site: int, b: Tensor, columns: slice = slice(None)) -> Tensor:
    """y [T, b] plus, in place, what the experts of one site give: b [b, R]; columns of y: all unless
    given."""
    order = shrunk.order
    s, triton = shrunk.rows[site].to(y.dtype), backend.triton_for(y)
    return _ExpandAdd.apply(
        y, columns, s, b.to(y.dtype), triton, order.tokens[site], order.rows[site], order.ends[site]
    )


class _Shrink(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, a, weights, ids, scale, triton, tokens, slots, rows, ends):
        sites, experts = ends.shape
        a, tokens, all_ends = (
            a.view(sites * experts, -1, x.shape[1]),
            tokens.flatten(),
            _joint(ends, tokens.shape[1]).flatten(),
        )
        picked = weights.gather(2, ids).movedim(1, 0).reshape(sites, -1).gather(1, slots)
        factor = (picked * scale).to(x.dtype).view(-1, 1)
        s = steps(triton).product(x, tokens, all_ends, a)
        ctx.scale, ctx.triton, ctx.weights = scale, triton, (weights.shape, weights.dtype)
        ctx.save_for_backward(x, a, s, factor, ids, tokens, rows, all_ends)
        return (s * factor).view(sites, -1, s.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, a, s, factor, ids, tokens, rows, ends = ctx.saved_tensors
        step, (shape, dtype) = steps(ctx.triton), ctx.weights
        dx, da, dweights, grad = None, None, None, grad.reshape(s.shape)
        ds = grad * factor
        if ctx.needs_input_grad[0]:
            by_token = _joint(rows, rows[0].numel()).movedim(0, 1).flatten(1)  # [T, G K]
            dx = torch.zeros_like(x)
            step.add_product_(dx, ds, tokens, by_token, ends, a)
        if ctx.needs_input_grad[1]:
            da = step.outer(ds, x, tokens, ends).flatten(0, 1)
        if ctx.needs_input_grad[2]:
            sorted_ = torch.linalg.vecdot(grad.to(dtype), s.to(dtype)) * ctx.scale
            picked = sorted_.view(rows.shape[0], -1).gather(1, rows.flatten(1)).view(rows.shape)  # [G, T, K]
            dweights = sorted_.new_zeros(shape).scatter_(2, ids, picked.movedim(0, 1))
        return dx, da, dweights, *(None,) * 7


class _ExpandAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, columns, s, b, triton, tokens, rows, ends):
        ctx.mark_dirty(y)
        ctx.columns, ctx.triton = columns, triton
        ctx.save_for_backward(s, b, tokens, ends)
        steps(triton).add_product_(y[:, columns], s, tokens, rows, ends, _by_expert(b, ends))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        s, b, tokens, ends = ctx.saved_tensors
        step, part, ds, db = steps(ctx.triton), dy[:, ctx.columns], None, None
        if ctx.needs_input_grad[2]:
            ds = step.product(part, tokens, ends, _by_expert(b, ends))
        if ctx.needs_input_grad[3]:
            db = step.outer(s, part, tokens, ends).flatten(0, 1).t()
        return dy, None, ds, db, None, None, None, None


def _joint(indices: Tensor, n: int) -> Tensor:
    """Indices [G, ...] into n rows of each site as indices into all G n rows."""
    starts = (
        torch.arange(0, indices.shape[0] * n, n, device=indices.device, dtype=indices.dtype)
        if n
        else indices.new_zeros(len(indices))
    )
    return indices + starts.view(-1, *(1,) * (indices.dim() - 1))


def _by_expert(b: Tensor, ends: Tensor) -> Tensor:
    """b [b, R] as [E, r, b]."""
    return b.unflatten(1, (ends.shape[0], -1)).permute(1, 2, 0)


def steps(triton: bool) -> ModuleType:
    """Where the steps below come from."""
    if not triton:
        return sys.modules[__name__]
    from .triton import grouped

    return grouped


# The steps, in plain torch for CPUs: on GPUs F.grouped_mm may wait for the host, and index_add_ has no fixed
# order


def product(x: Tensor, tokens: Tensor, ends: Tensor, w: Tensor) -> Tensor:
    """`w_e x_t` [N, r] for each sorted row, of x [T, d], tokens [N], ends [E] and w [E, r, d] of any
    strides."""
    return grouped_mm(x.index_select(0, tokens), w.mT, ends)


def add_product_(y: Tensor, s: Tensor, tokens: Tensor, rows: Tensor, ends: Tensor, w: Tensor) -> None:
    """y [T, d] plus, in place, `w_e^T s` of each row of s [N, r] at its token; rows [T, K]: those of each
    token."""
    y.index_add_(0, tokens, grouped_mm(s, w, ends))


def outer(s: Tensor, x: Tensor, tokens: Tensor, ends: Tensor) -> Tensor:
    """`sum s x_t^T` [E, r, d] over each expert's rows of s [N, r] and x [T, d]; 0 for an expert without
    any."""
    return grouped_mm(s.t(), x.index_select(0, tokens), ends)


@torch.library.custom_op("moabench::grouped_mm", mutates_args=())
def grouped_mm(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    """`F.grouped_mm`, which torch cannot trace in fp32: rows [N, m] times [E, m, n] -> [N, n], or [m, N]
    times [N, n] -> [E, m, n]."""
    return F.grouped_mm(left, right, offs=ends)


@grouped_mm.register_fake
def _(left, right, ends):
    shape = (
        (ends.shape[0], left.shape[0], right.shape[1])
        if right.dim() == 2
        else (left.shape[0], right.shape[2])
    )
    return left.new_empty(shape)
