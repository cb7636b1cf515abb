"""The forms that mixtures have in other code, written from their equations: what ours is compared with.

All take the same decision (`methods.Routing`) and the same tensors as ours, and differ in how they run it:

`loop`      every expert on every token, weighted at output width, summed
`gather`    each expert takes its tokens by `where`, and adds its result back by index (MixLoRA, MoLA, MoA's
            sparse form)
`grouped`   tokens sorted by expert, grouped GEMMs, un-permuted, weighted, summed over k (as transformers runs
            experts)

Shapes: T tokens, d in, o out, E experts of r rank rows, R = E r (a shared A has r rows), K selected experts,
f inner width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from moabench.methods import Routing

Form = Callable[[Tensor, Tensor, Tensor, "Routing", float], Tensor]


def expert(a: Tensor, b: Tensor, e: int, experts: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`A_e [r, d]` and `B_e [o, r]` of a [R, d] (or one shared [r, d]) and b [o, R], in dtype."""
    r = b.shape[1] // experts
    rows = slice(e * r, (e + 1) * r)
    return (a if a.shape[0] == r else a[rows]).to(dtype), b[:, rows].to(dtype)


def loop(x: Tensor, a: Tensor, b: Tensor, routing: Routing, scale: float = 1.0) -> Tensor:
    """`sum_e w_e s B_e A_e x` [T, o], expert by expert."""
    y, weights = x.new_zeros(x.shape[0], b.shape[0]), routing.weights.to(x.dtype)
    for e in range(weights.shape[1]):
        a_e, b_e = expert(a, b, e, weights.shape[1], x.dtype)
        y = y + weights[:, e : e + 1] * (scale * F.linear(F.linear(x, a_e), b_e))
    return y


def gather(x: Tensor, a: Tensor, b: Tensor, routing: Routing, scale: float = 1.0) -> Tensor:
    """The same for the selected experts only, gathered by `where`: the host waits once an expert."""
    y, weights = x.new_zeros(x.shape[0], b.shape[0]), routing.weights.to(x.dtype)
    for e in range(weights.shape[1]):
        a_e, b_e = expert(a, b, e, weights.shape[1], x.dtype)
        rows = torch.where(routing.selected[:, e])[0]
        out = scale * F.linear(F.linear(x[rows], a_e), b_e)
        y = y.index_add(0, rows, weights[rows, e : e + 1] * out)
    return y


def grouped(x: Tensor, a: Tensor, b: Tensor, routing: Routing, scale: float = 1.0) -> Tensor:
    """The same for exactly K experts a token, through two grouped GEMMs over tokens sorted by expert."""
    ids, experts, r = routing.ids, routing.weights.shape[1], b.shape[1] // routing.weights.shape[1]
    order = ids.flatten().argsort(stable=True)
    ends = (
        (ids.flatten().unsqueeze(-1) == torch.arange(experts, device=x.device))
        .sum(0)
        .cumsum(0)
        .to(torch.int32)
    )
    s = F.grouped_mm(x[order // ids.shape[1]], a.to(x.dtype).view(experts, r, -1).transpose(1, 2), offs=ends)
    out = F.grouped_mm(s, b.to(x.dtype).t().reshape(experts, r, -1), offs=ends)
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=x.device))
    weights = routing.weights.gather(1, ids).to(x.dtype)
    return (scale * out[back].view(*ids.shape, -1) * weights.unsqueeze(-1)).sum(1)


def grouped_unfit(dtype: torch.dtype, *widths: int) -> str | None:
    """Why grouped GEMMs cannot run on tensors with rows of these widths, or None."""
    wrong = [n for n in widths if n * dtype.itemsize % 16]
    return (
        f"grouped GEMMs want rows of whole 16 bytes; {wrong[0]} columns have {wrong[0] * dtype.itemsize}"
        if wrong
        else None
    )


FORMS: dict[str, Form] = {"loop": loop, "gather": gather, "grouped": grouped}


def ffn_published(
    x: Tensor, p: dict[str, Tensor], frozen: dict[str, Tensor], routing: Routing, scale: float
) -> Tensor:
    """MixLoRA as published: frozen gate and up once, frozen down once an expert, tokens gathered by
    `where`."""
    gate, up = F.linear(x, frozen["gate"]), F.linear(x, frozen["up"])
    return _ffn_experts(x, p, frozen, routing, scale, lambda rows: (gate[rows], up[rows]))


def ffn_vanilla(
    x: Tensor, p: dict[str, Tensor], frozen: dict[str, Tensor], routing: Routing, scale: float
) -> Tensor:
    """The plain mixture: every expert runs the whole frozen block on its tokens."""
    return _ffn_experts(
        x,
        p,
        frozen,
        routing,
        scale,
        lambda rows: (F.linear(x[rows], frozen["gate"]), F.linear(x[rows], frozen["up"])),
    )


def _ffn_experts(
    x: Tensor, p: dict[str, Tensor], frozen: dict[str, Tensor], routing: Routing, scale: float, inner
) -> Tensor:
    """`sum_e w_e (W_d + s B_d A_d) (silu((W_g + s B_g A_g) x) * ((W_u + s B_u A_u) x))` over each token's
    experts; `inner(rows)` gives the frozen gate and up outputs of some tokens. p has gate_A, gate_B, ... of
    all experts, concatenated."""
    y, weights = torch.zeros_like(x), routing.weights.to(x.dtype)
    for e in range(weights.shape[1]):
        rows = torch.where(routing.selected[:, e])[0]
        low = {
            n: expert(p[f"{n}_A"], p[f"{n}_B"], e, weights.shape[1], x.dtype) for n in ("gate", "up", "down")
        }
        part = x[rows]
        gate, up = inner(rows)
        gate = gate + scale * F.linear(F.linear(part, low["gate"][0]), low["gate"][1])
        h = F.silu(gate) * (up + scale * F.linear(F.linear(part, low["up"][0]), low["up"][1]))
        out = F.linear(h, frozen["down"]) + scale * F.linear(F.linear(h, low["down"][0]), low["down"][1])
        y = y.index_add(0, rows, weights[rows, e : e + 1] * out)
    return y


FFN_FORMS = {"published": ffn_published, "vanilla": ffn_vanilla}
