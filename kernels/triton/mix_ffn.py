"""Triton kernels of the mixture inside a gated feed-forward block: forward over tokens, backward over tokens
and over inner columns.

Every kernel walks tiles [BM tokens, BF inner columns] of the frozen gate and up outputs, reads them once, and
runs the experts one after the other on the tile in registers; a tile none of whose tokens selects an expert
skips it. The backward recomputes the inner activations, so nothing of width f is saved but what the frozen
block has anyway.

Shapes: T tokens, F inner width, E experts of r rank rows, R = E r. Sums are fp32; sums over parts of F or T
are taken in fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import Tile, Variant, dot, parts_of, pointer, precision


@triton.jit
def _activation(a, ACT: tl.constexpr):
    """The activation and its derivative at a, fp32."""
    if ACT == "silu":
        s = tl.sigmoid(a)
        return a * s, s * (1 + a * (1 - s))
    elif ACT == "relu":
        return tl.maximum(a, 0.0), (a > 0).to(tl.float32)
    elif ACT == "gelu":
        phi = 0.5 * (1 + tl.erf(a * 0.7071067811865476))
        return a * phi, phi + a * 0.3989422804014327 * tl.exp(-0.5 * a * a)
    else:  # gelu_tanh; tanh(x) = 2 sigmoid(2x) - 1
        t = 2 * tl.sigmoid(2 * 0.7978845608028654 * (a + 0.044715 * a * a * a)) - 1
        slope = 0.7978845608028654 * (1 + 3 * 0.044715 * a * a)
        return 0.5 * a * (1 + t), 0.5 * (1 + t) + 0.5 * a * (1 - t * t) * slope


@triton.jit
def _inner(g, u, sg, su, bg, bu, at_s, at_b, mask_s, mask_b, PRECISION: tl.constexpr):
    """Inner inputs a, b [BM, BF] (fp32) of one expert, and its S and B tiles."""
    s_gate, s_up = tl.load(sg + at_s, mask=mask_s, other=0.0), tl.load(su + at_s, mask=mask_s, other=0.0)
    b_gate, b_up = tl.load(bg + at_b, mask=mask_b, other=0.0), tl.load(bu + at_b, mask=mask_b, other=0.0)
    return (
        dot(s_gate, tl.trans(b_gate), g, PRECISION),
        dot(s_up, tl.trans(b_up), u, PRECISION),
        s_gate,
        s_up,
        b_gate,
        b_up,
    )


@triton.jit
def _weight(w, chosen, tokens, e, T, E, SPARSE: tl.constexpr):
    """Weights [BM] of expert e, and whether any token of the tile has it."""
    inside = tokens < T
    at = tokens.to(tl.int64) * E + e
    weight = tl.load(w + at, mask=inside, other=0.0).to(tl.float32)
    has = inside
    if SPARSE:
        has = tl.load(chosen + at, mask=inside, other=0) != 0
        weight = tl.where(has, weight, 0.0)
    return weight, has


@triton.jit
def forward_kernel(
    g, u, sg, su, bg, bu, ad, w, chosen, keep, hbar, z, T, F, E, r, split,
    EP: tl.constexpr, RP: tl.constexpr, BM: tl.constexpr, BF: tl.constexpr,
    ACT: tl.constexpr, SPARSE: tl.constexpr, DROP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """hbar of BM tokens over one part of F (`split` columns each), and that part's share of z [parts, T, R]
    (fp32)."""
    tokens, part = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1)
    rank, experts = tl.arange(0, RP), tl.arange(0, EP)
    live, R = tokens[:, None] < T, E * r
    rows = tokens[:, None].to(tl.int64)
    total = tl.zeros((BM, EP, RP), tl.float32)
    for start in range(part * split, min(F, part * split + split), BF):
        f = start + tl.arange(0, BF)
        mask = live & (f < F)[None, :]
        at = rows * F + f[None, :]
        gate, up = (
            tl.load(g + at, mask=mask, other=0.0).to(tl.float32),
            tl.load(u + at, mask=mask, other=0.0).to(tl.float32),
        )
        if DROP:
            kept = tl.load(keep + at, mask=mask, other=0.0).to(tl.float32)
        acc = tl.zeros((BM, BF), tl.float32)
        for e in range(0, E):
            weight, has = _weight(w, chosen, tokens, e, T, E, SPARSE)
            if tl.max(has.to(tl.int32)) > 0:
                column = e * r + rank[None, :]
                at_b, mask_b = f[:, None].to(tl.int64) * R + column, (f < F)[:, None] & (rank < r)[None, :]
                a, b, _, _, _, _ = _inner(
                    gate,
                    up,
                    sg,
                    su,
                    bg,
                    bu,
                    rows * R + column,
                    at_b,
                    live & (rank < r)[None, :],
                    mask_b,
                    PRECISION,
                )
                h = _activation(a, ACT)[0] * b * weight[:, None]
                acc += h
                if DROP:
                    h = h * kept
                down = tl.load(ad + (e * r + rank[None, :]) * F + f[:, None], mask=mask_b, other=0.0)
                mine = dot(h.to(down.dtype), down, tl.zeros((BM, RP), tl.float32), PRECISION)
                total += tl.where((experts == e)[None, :, None], mine[:, None, :], 0.0)
        tl.store(hbar + at, acc.to(hbar.dtype.element_ty), mask=mask)
    at_z = (
        (part.to(tl.int64) * T + tokens[:, None, None]) * R + experts[None, :, None] * r + rank[None, None, :]
    )
    mask_z = (tokens < T)[:, None, None] & (experts < E)[None, :, None] & (rank < r)[None, None, :]
    tl.store(z + at_z, total, mask=mask_z)


@triton.jit
def _gradients(
    a, b, dhbar, dz, down, weight, kept, ACT: tl.constexpr, DROP: tl.constexpr, PRECISION: tl.constexpr
):
    """Of one expert on one tile: its activation h, the gradient of its unweighted h, and those of a and b."""
    value, slope = _activation(a, ACT)
    through = dot(dz, tl.trans(down), tl.zeros(a.shape, tl.float32), PRECISION)
    if DROP:
        through = through * kept
    dh = through + dhbar
    weighted = dh * weight[:, None]
    return value * b, dh, weighted * b * slope, weighted * value


@triton.jit
def backward_tokens_kernel(
    dhbar, dz, g, u, sg, su, bg, bu, ad, w, chosen, keep, dg, du, dsg, dsu, dw, T, F, E, r, split,
    EP: tl.constexpr, RP: tl.constexpr, BM: tl.constexpr, BF: tl.constexpr,
    ACT: tl.constexpr, SPARSE: tl.constexpr, DROP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dG, dU of BM tokens over one part of F, and that part's share of dS_gate, dS_up [parts, T, R] and dw
    [parts, T, E] (fp32)."""
    tokens, part = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1)
    rank, experts = tl.arange(0, RP), tl.arange(0, EP)
    live, R = tokens[:, None] < T, E * r
    rows = tokens[:, None].to(tl.int64)
    total_gate, total_up = tl.zeros((BM, EP, RP), tl.float32), tl.zeros((BM, EP, RP), tl.float32)
    total_w = tl.zeros((BM, EP), tl.float32)
    for start in range(part * split, min(F, part * split + split), BF):
        f = start + tl.arange(0, BF)
        mask = live & (f < F)[None, :]
        at = rows * F + f[None, :]
        gate, up = (
            tl.load(g + at, mask=mask, other=0.0).to(tl.float32),
            tl.load(u + at, mask=mask, other=0.0).to(tl.float32),
        )
        dh_in = tl.load(dhbar + at, mask=mask, other=0.0).to(tl.float32)
        kept = dh_in
        if DROP:
            kept = tl.load(keep + at, mask=mask, other=0.0).to(tl.float32)
        dgate, dup = tl.zeros((BM, BF), tl.float32), tl.zeros((BM, BF), tl.float32)
        for e in range(0, E):
            weight, has = _weight(w, chosen, tokens, e, T, E, SPARSE)
            if tl.max(has.to(tl.int32)) > 0:
                column = e * r + rank[None, :]
                at_s, mask_s = rows * R + column, live & (rank < r)[None, :]
                at_b, mask_b = f[:, None].to(tl.int64) * R + column, (f < F)[:, None] & (rank < r)[None, :]
                a, b, _, _, b_gate, b_up = _inner(
                    gate, up, sg, su, bg, bu, at_s, at_b, mask_s, mask_b, PRECISION
                )
                down = tl.load(ad + column * F + f[:, None], mask=mask_b, other=0.0)
                h, dh, da, db = _gradients(
                    a,
                    b,
                    dh_in,
                    tl.load(dz + at_s, mask=mask_s, other=0.0),
                    down,
                    weight,
                    kept,
                    ACT,
                    DROP,
                    PRECISION,
                )
                dgate += da
                dup += db
                mine = (experts == e)[None, :]
                if SPARSE:
                    mine = mine & has[:, None]
                total_w += tl.where(mine, tl.sum(tl.where(mask, h * dh, 0.0), 1)[:, None], 0.0)
                one = (experts == e)[None, :, None]
                zero = tl.zeros((BM, RP), tl.float32)
                total_gate += tl.where(
                    one, dot(da.to(b_gate.dtype), b_gate, zero, PRECISION)[:, None, :], 0.0
                )
                total_up += tl.where(one, dot(db.to(b_up.dtype), b_up, zero, PRECISION)[:, None, :], 0.0)
        tl.store(dg + at, dgate.to(dg.dtype.element_ty), mask=mask)
        tl.store(du + at, dup.to(du.dtype.element_ty), mask=mask)
    at_s = (
        (part.to(tl.int64) * T + tokens[:, None, None]) * R + experts[None, :, None] * r + rank[None, None, :]
    )
    mask_3 = (tokens < T)[:, None, None] & (experts < E)[None, :, None] & (rank < r)[None, None, :]
    tl.store(dsg + at_s, total_gate, mask=mask_3)
    tl.store(dsu + at_s, total_up, mask=mask_3)
    at_w = (part.to(tl.int64) * T + tokens[:, None]) * E + experts[None, :]
    tl.store(dw + at_w, total_w, mask=live & (experts < E)[None, :])


@triton.jit
def backward_columns_kernel(
    dhbar, dz, g, u, sg, su, bg, bu, ad, w, chosen, keep, dbg, dbu, dad, T, F, E, r, chunk,
    EP: tl.constexpr, RP: tl.constexpr, BM: tl.constexpr, BF: tl.constexpr,
    ACT: tl.constexpr, SPARSE: tl.constexpr, DROP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dB_gate, dB_up and dA_down^T [parts, F, R] (fp32) of BF inner columns, from one part of the tokens
    (`chunk` each)."""
    f, part = tl.program_id(0) * BF + tl.arange(0, BF), tl.program_id(1)
    rank, experts = tl.arange(0, RP), tl.arange(0, EP)
    R = E * r
    wide = (f < F)[None, :]
    total_gate, total_up = tl.zeros((BF, EP, RP), tl.float32), tl.zeros((BF, EP, RP), tl.float32)
    total_down = tl.zeros((BF, EP, RP), tl.float32)
    for start in range(part * chunk, min(T, part * chunk + chunk), BM):
        tokens = start + tl.arange(0, BM)
        live, rows = tokens[:, None] < T, tokens[:, None].to(tl.int64)
        mask = live & wide
        at = rows * F + f[None, :]
        gate, up = (
            tl.load(g + at, mask=mask, other=0.0).to(tl.float32),
            tl.load(u + at, mask=mask, other=0.0).to(tl.float32),
        )
        dh_in = tl.load(dhbar + at, mask=mask, other=0.0).to(tl.float32)
        kept = dh_in
        if DROP:
            kept = tl.load(keep + at, mask=mask, other=0.0).to(tl.float32)
        for e in range(0, E):
            weight, has = _weight(w, chosen, tokens, e, T, E, SPARSE)
            if tl.max(has.to(tl.int32)) > 0:
                column = e * r + rank[None, :]
                at_s, mask_s = rows * R + column, live & (rank < r)[None, :]
                at_b, mask_b = f[:, None].to(tl.int64) * R + column, (f < F)[:, None] & (rank < r)[None, :]
                a, b, s_gate, s_up, _, _ = _inner(
                    gate, up, sg, su, bg, bu, at_s, at_b, mask_s, mask_b, PRECISION
                )
                down = tl.load(ad + column * F + f[:, None], mask=mask_b, other=0.0)
                dz_e = tl.load(dz + at_s, mask=mask_s, other=0.0)
                h, _, da, db = _gradients(a, b, dh_in, dz_e, down, weight, kept, ACT, DROP, PRECISION)
                h = h * weight[:, None]
                if DROP:
                    h = h * kept
                one, zero = (experts == e)[None, :, None], tl.zeros((BF, RP), tl.float32)
                kind = s_gate.dtype
                total_gate += tl.where(
                    one, dot(tl.trans(da).to(kind), s_gate, zero, PRECISION)[:, None, :], 0.0
                )
                total_up += tl.where(one, dot(tl.trans(db).to(kind), s_up, zero, PRECISION)[:, None, :], 0.0)
                total_down += tl.where(one, dot(tl.trans(h).to(kind), dz_e, zero, PRECISION)[:, None, :], 0.0)
    at = (part.to(tl.int64) * F + f[:, None, None]) * R + experts[None, :, None] * r + rank[None, None, :]
    mask = (f < F)[:, None, None] & (experts < E)[None, :, None] & (rank < r)[None, None, :]
    tl.store(dbg + at, total_gate, mask=mask)
    tl.store(dbu + at, total_up, mask=mask)
    tl.store(dad + at, total_down, mask=mask)


# Tiles


MOST = 256
"""Rank rows that the kernels hold, the number of experts padded to a power of two and their rank to one of 16
at least."""


def fits(experts: int, r: int) -> bool:
    """Whether the kernels can hold the rank rows of `experts` experts of rank r."""
    ep, rp = _padded(experts, r)
    return ep * rp <= MOST


def _padded(experts: int, r: int) -> tuple[int, int]:
    return triton.next_power_of_2(experts), max(16, triton.next_power_of_2(r))


def tile(kernel: str, experts: int, r: int, dtype: torch.dtype) -> Tile:
    """BM tokens by BF inner columns. kernel: forward, tokens or columns (of the backward)."""
    ep, rp = _padded(experts, r)
    many, fp32 = ep * rp > 128, dtype == torch.float32
    bm, bf, warps = {
        "forward": (32 if many or fp32 else 64, 16 if many and fp32 else 32, 8),
        "tokens": (16 if many or fp32 or rp > 16 else 32, 16, 8),
        "columns": (16 if many or fp32 else 32, 16, 8),
    }[kernel]
    return Tile({"EP": ep, "RP": rp, "BM": bm, "BF": bf}, num_warps=warps, num_stages=1)


# Operations


def _arguments(w: Tensor, chosen: Tensor | None, keep: Tensor | None) -> tuple[Tensor, Tensor]:
    """Something to point at where an argument is absent."""
    return (w if chosen is None else chosen), (w if keep is None else keep)


def _sizes(g: Tensor, sg: Tensor, w: Tensor) -> tuple[int, int, int, int]:
    """T, F, E, r. Raises ValueError where the kernels cannot hold the experts."""
    (t, f), e = g.shape, w.shape[1]
    r = sg.shape[1] // e
    if not fits(e, r):
        raise ValueError(
            f"mix_ffn: {e} experts of rank {r} have more than the {MOST} rank rows (padded) that the "
            "Triton kernels hold."
        )
    return t, f, e, r


def _options(t: Tile, act: str, chosen: Tensor | None, keep: Tensor | None, dtype: torch.dtype) -> dict:
    flags = {
        "ACT": act,
        "SPARSE": chosen is not None,
        "DROP": keep is not None,
        "PRECISION": precision(dtype),
    }
    return t.sizes | flags | {"num_warps": t.num_warps, "num_stages": t.num_stages}


@torch.library.custom_op("moabench::mix_ffn", mutates_args=())
def mix_ffn(
    g: Tensor, u: Tensor, sg: Tensor, su: Tensor, bg: Tensor, bu: Tensor, ad: Tensor, w: Tensor,
    chosen: Tensor | None, keep: Tensor | None, act: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`hbar` [T, F] and `z` [T, R] (moabench.kernels.mix_ffn); all but w (fp32), chosen (bool [T, E]) in one
    dtype."""
    g, u, sg, su, bg, bu, ad, w = (t.contiguous() for t in (g, u, sg, su, bg, bu, ad, w))
    t, f, e, r = _sizes(g, sg, w)
    hbar = torch.empty_like(g)
    if not t:
        return hbar, sg.new_empty(0, e * r)
    it = tile("forward", e, r, g.dtype)
    blocks = triton.cdiv(t, it.sizes["BM"])
    parts, split = parts_of(f, it.sizes["BF"], blocks, g.device)
    z = g.new_empty(parts, t, e * r, dtype=torch.float32)
    forward_kernel[(blocks, parts)](
        g,
        u,
        sg,
        su,
        bg,
        bu,
        ad,
        w,
        *_arguments(w, chosen, keep),
        hbar,
        z,
        t,
        f,
        e,
        r,
        split,
        **_options(it, act, chosen, keep, g.dtype),
    )
    return hbar, z.sum(0).to(g.dtype)


@mix_ffn.register_fake
def _(g, u, sg, su, bg, bu, ad, w, chosen, keep, act):
    return torch.empty_like(g, memory_format=torch.contiguous_format), sg.new_empty(sg.shape)


@torch.library.custom_op("moabench::mix_ffn_backward", mutates_args=())
def mix_ffn_backward(
    dhbar: Tensor, dz: Tensor, g: Tensor, u: Tensor, sg: Tensor, su: Tensor, bg: Tensor, bu: Tensor,
    ad: Tensor, w: Tensor,
    chosen: Tensor | None, keep: Tensor | None, act: str,
) -> list[Tensor]:  # fmt: skip
    """Gradients of g, u, sg, su, bg, bu, ad and w."""
    dhbar, dz, g, u, sg, su, bg, bu, ad, w = (
        t.contiguous() for t in (dhbar, dz, g, u, sg, su, bg, bu, ad, w)
    )
    t, f, e, r = _sizes(g, sg, w)
    dg, du = torch.empty_like(g), torch.empty_like(u)
    if not t:
        return [
            dg,
            du,
            torch.empty_like(sg),
            torch.empty_like(su),
            *(torch.zeros_like(x) for x in (bg, bu, ad, w)),
        ]
    inputs = (dhbar, dz, g, u, sg, su, bg, bu, ad, w, *_arguments(w, chosen, keep))
    wide = {"dtype": torch.float32}
    it = tile("tokens", e, r, g.dtype)
    blocks = triton.cdiv(t, it.sizes["BM"])
    parts, split = parts_of(f, it.sizes["BF"], blocks, g.device)
    dsg, dsu, dw = (
        g.new_empty(parts, t, e * r, **wide),
        g.new_empty(parts, t, e * r, **wide),
        g.new_empty(parts, t, e, **wide),
    )
    backward_tokens_kernel[(blocks, parts)](
        *inputs, dg, du, dsg, dsu, dw, t, f, e, r, split, **_options(it, act, chosen, keep, g.dtype)
    )
    it = tile("columns", e, r, g.dtype)
    blocks = triton.cdiv(f, it.sizes["BF"])
    parts, chunk = parts_of(t, it.sizes["BM"], blocks, g.device)
    dbg, dbu, dad = (g.new_empty(parts, f, e * r, **wide) for _ in range(3))
    backward_columns_kernel[(blocks, parts)](
        *inputs, dbg, dbu, dad, t, f, e, r, chunk, **_options(it, act, chosen, keep, g.dtype)
    )
    whole = [x.sum(0) for x in (dsg, dsu, dbg, dbu, dad, dw)]
    whole[4] = whole[4].t().contiguous()
    return [dg, du, *(x.to(g.dtype) for x in whole[:5]), whole[5].to(w.dtype)]


@mix_ffn_backward.register_fake
def _(dhbar, dz, g, u, sg, su, bg, bu, ad, w, chosen, keep, act):
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (g, u, sg, su, bg, bu, ad, w)]


def _save(ctx, inputs, output):
    *tensors, chosen, keep, act = inputs
    ctx.save_for_backward(*tensors, chosen, keep)
    ctx.act = act


def _backward(ctx, dhbar: Tensor, dz: Tensor):
    return *mix_ffn_backward(dhbar, dz, *ctx.saved_tensors, ctx.act), None, None, None


mix_ffn.register_autograd(_backward, setup_context=_save)


def variants(dtype: torch.dtype) -> list[Variant]:
    """The compilations that a GPU would ask for."""
    p, wide, found = pointer(dtype), "*fp32", []
    ints = dict.fromkeys(("T", "F", "E", "r"), "i32")
    inputs = dict.fromkeys(("g", "u", "sg", "su", "bg", "bu", "ad"), p) | {
        "w": wide,
        "chosen": "*i1",
        "keep": p,
    }
    gradients = {"dhbar": p, "dz": p}
    kernels = {
        "forward": (forward_kernel, inputs | {"hbar": p, "z": wide} | ints | {"split": "i32"}),
        "tokens": (
            backward_tokens_kernel,
            gradients
            | inputs
            | {"dg": p, "du": p, "dsg": wide, "dsu": wide, "dw": wide}
            | ints
            | {"split": "i32"},
        ),
        "columns": (
            backward_columns_kernel,
            gradients | inputs | {"dbg": wide, "dbu": wide, "dad": wide} | ints | {"chunk": "i32"},
        ),
    }
    for experts, r in ((8, 8), (8, 16), (4, 32), (8, 32)):
        for sparse, drop in ((True, False), (False, True)):
            for name, (kernel, types) in kernels.items():
                flags = {"ACT": "silu", "SPARSE": sparse, "DROP": drop, "PRECISION": precision(dtype)}
                label = (
                    f"mix_ffn {name} E{experts} r{r}{' sparse' if sparse else ''}{' dropout' if drop else ''}"
                )
                found.append(Variant(label, kernel, types, flags, tile(name, experts, r, dtype)))
    return found
