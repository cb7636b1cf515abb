"""Triton kernels of RMSNorm with shrink: one program holds BM tokens and walks their columns twice, the
second time from cache.

Shapes: T tokens, D width, R rank rows, H router rows. Sums are fp32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import Tile, Variant, dot, dot_exact, pieces, pointer, precision


@triton.jit
def forward_kernel(
    x, g, a, h, y, rstd, s, z, eps, T, D, R, H, x_row, a_row, h_row,
    P1: tl.constexpr, P2: tl.constexpr, PH: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Y, rstd, S and Z of BM tokens. First walk: the sum of squares; second: Y, and its products with A and
    H."""
    tokens = tl.program_id(0) * BM + tl.arange(0, BM)
    live = tokens[:, None] < T
    rows = x + tokens[:, None].to(tl.int64) * x_row
    squares = tl.zeros((BM,), tl.float32)
    for start in range(0, D, BK):
        k = start + tl.arange(0, BK)
        tile = tl.load(rows + k[None, :], mask=live & (k < D)[None, :], other=0.0).to(tl.float32)
        squares += tl.sum(tile * tile, 1)
    scale = 1.0 / tl.sqrt(squares / D + eps)
    tl.store(rstd + tokens, scale, mask=tokens < T)
    r1 = tl.arange(0, P1)
    acc1 = tl.zeros((BM, P1), tl.float32)
    if P2 > 0:
        r2 = P1 + tl.arange(0, P2)
        acc2 = tl.zeros((BM, P2), tl.float32)
    if PH > 0:
        rh = tl.arange(0, PH)
        acch = tl.zeros((BM, PH), tl.float32)
    out = y + tokens[:, None].to(tl.int64) * D
    for start in range(0, D, BK):
        k = start + tl.arange(0, BK)
        inside = k < D
        tile = tl.load(rows + k[None, :], mask=live & inside[None, :], other=0.0)
        gain = tl.load(g + k, mask=inside, other=0.0)
        normed = (tile.to(tl.float32) * scale[:, None]).to(x.dtype.element_ty)
        normed = (normed.to(tl.float32) * gain[None, :].to(tl.float32)).to(x.dtype.element_ty)
        tl.store(out + k[None, :], normed, mask=live & inside[None, :])
        a1 = tl.load(
            a + r1[None, :] * a_row + k[:, None], mask=(r1[None, :] < R) & inside[:, None], other=0.0
        )
        acc1 = dot(normed, a1, acc1, PRECISION)
        if P2 > 0:
            a2 = tl.load(
                a + r2[None, :] * a_row + k[:, None], mask=(r2[None, :] < R) & inside[:, None], other=0.0
            )
            acc2 = dot(normed, a2, acc2, PRECISION)
        if PH > 0:
            ht = tl.load(
                h + rh[None, :] * h_row + k[:, None], mask=(rh[None, :] < H) & inside[:, None], other=0.0
            )
            acch = dot_exact(normed, ht, acch, PRECISION)
    at = tokens[:, None].to(tl.int64)
    tl.store(s + at * R + r1[None, :], acc1.to(s.dtype.element_ty), mask=live & (r1[None, :] < R))
    if P2 > 0:
        tl.store(s + at * R + r2[None, :], acc2.to(s.dtype.element_ty), mask=live & (r2[None, :] < R))
    if PH > 0:
        tl.store(z + at * H + rh[None, :], acch, mask=live & (rh[None, :] < H))


@triton.jit
def _gradient(
    dy,
    ds,
    rows,
    at_y,
    k,
    tokens,
    T,
    D,
    R,
    ds_row,
    rows_row,
    PR: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`dY + dS [A; H]` of one tile [BM, BK], fp32."""
    mask = (tokens < T)[:, None] & (k < D)[None, :]
    tile = tl.load(dy + at_y + k[None, :], mask=mask, other=0.0).to(tl.float32)
    for first in range(0, R, PR):
        r = first + tl.arange(0, PR)
        left = tl.load(
            ds + tokens[:, None].to(tl.int64) * ds_row + r[None, :],
            mask=(tokens < T)[:, None] & (r < R)[None, :],
            other=0.0,
        )
        right = tl.load(
            rows + r[:, None] * rows_row + k[None, :], mask=(r < R)[:, None] & (k < D)[None, :], other=0.0
        )
        tile = dot(left, right, tile, PRECISION)
    return tile


@triton.jit
def backward_kernel(
    dy, ds, rows, x, g, rstd, dx, T, D, R, dy_row, ds_row, rows_row, x_row,
    PR: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`dX = rstd (g dY' - n mean(g dY' n))`, `dY' = dY + dS [A; H]`, of BM tokens. First walk: the mean;
    second: dX."""
    tokens = tl.program_id(0) * BM + tl.arange(0, BM)
    live = tokens[:, None] < T
    scale = tl.load(rstd + tokens, mask=tokens < T, other=0.0)
    at_y, at_x = tokens[:, None].to(tl.int64) * dy_row, tokens[:, None].to(tl.int64) * x_row
    total = tl.zeros((BM,), tl.float32)
    for start in range(0, D, BK):
        k = start + tl.arange(0, BK)
        grad = _gradient(dy, ds, rows, at_y, k, tokens, T, D, R, ds_row, rows_row, PR, BM, BK, PRECISION)
        gain = tl.load(g + k, mask=k < D, other=0.0).to(tl.float32)
        n = (
            tl.load(x + at_x + k[None, :], mask=live & (k < D)[None, :], other=0.0).to(tl.float32)
            * scale[:, None]
        )
        total += tl.sum(grad * gain[None, :] * n, 1)
    mean = total / D
    for start in range(0, D, BK):
        k = start + tl.arange(0, BK)
        grad = _gradient(dy, ds, rows, at_y, k, tokens, T, D, R, ds_row, rows_row, PR, BM, BK, PRECISION)
        gain = tl.load(g + k, mask=k < D, other=0.0).to(tl.float32)
        n = (
            tl.load(x + at_x + k[None, :], mask=live & (k < D)[None, :], other=0.0).to(tl.float32)
            * scale[:, None]
        )
        value = scale[:, None] * (grad * gain[None, :] - n * mean[:, None])
        out = dx + tokens[:, None].to(tl.int64) * D + k[None, :]
        tl.store(out, value.to(dx.dtype.element_ty), mask=live & (k < D)[None, :])


def forward_tile(rows: int, heads: int, dtype: torch.dtype) -> Tile:
    """BM tokens by BK columns a step."""
    p1, p2 = pieces(rows, dtype)
    ph = 0 if not heads else max(16, triton.next_power_of_2(heads))
    held = p1 + p2 + 3 * ph
    sizes = {"P1": p1, "P2": p2, "PH": ph}
    if dtype == torch.float32:
        return Tile(sizes | {"BM": 32, "BK": 16 if ph > 16 else 32}, num_warps=4, num_stages=2)
    return Tile(
        sizes | {"BM": 64, "BK": 64 if held <= 128 else 32}, num_warps=4 if held <= 96 else 8, num_stages=3
    )


def backward_tile(rows: int, dtype: torch.dtype) -> Tile:
    """BM tokens by BK columns a step; PR rank rows a product."""
    pr = min(64, max(16, triton.next_power_of_2(max(1, rows))))
    if dtype == torch.float32:
        return Tile({"PR": min(pr, 32), "BM": 32, "BK": 32}, num_warps=4, num_stages=2)
    return Tile({"PR": pr, "BM": 64, "BK": 64}, num_warps=4, num_stages=2)


@torch.library.custom_op("moabench::norm_shrink", mutates_args=())
def norm_shrink(
    x: Tensor, weight: Tensor, eps: float, a: Tensor, heads: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`Y` [T, D], rstd [T, 1] fp32, `S` [T, R] and `Z` [T, H] fp32 (H = 0 without heads). At most as many
    rank rows as one program holds (192; fp32: 128): raises ValueError beyond."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    a, heads = a.contiguous(), None if heads is None else heads.float().contiguous()
    (tokens, d), rows, n = x.shape, a.shape[0], 0 if heads is None else heads.shape[0]
    tile = forward_tile(rows, n, x.dtype)
    if rows > tile.sizes["P1"] + tile.sizes["P2"]:
        raise ValueError(
            f"norm_shrink: {rows} rank rows in {x.dtype}; expected at most "
            f"{tile.sizes['P1'] + tile.sizes['P2']}."
        )
    y, s = x.new_empty(tokens, d), x.new_empty(tokens, rows)
    rstd, z = x.new_empty(tokens, 1, dtype=torch.float32), x.new_empty(tokens, n, dtype=torch.float32)
    if tokens:
        forward_kernel[(triton.cdiv(tokens, tile.sizes["BM"]),)](
            x, weight, a, x if heads is None else heads, y, rstd, s, z, eps, tokens, d, rows, n,
            x.stride(0), a.stride(0), 0 if heads is None else heads.stride(0),
            **tile.sizes, PRECISION=precision(x.dtype), num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    return y, rstd, s, z


@norm_shrink.register_fake
def _(x, weight, eps, a, heads):
    wide = {"dtype": torch.float32}
    tokens, n = x.shape[0], 0 if heads is None else heads.shape[0]
    return (
        x.new_empty(x.shape),
        x.new_empty(tokens, 1, **wide),
        x.new_empty(tokens, a.shape[0]),
        x.new_empty(tokens, n, **wide),
    )


@torch.library.custom_op("moabench::norm_shrink_backward", mutates_args=())
def norm_shrink_backward(
    dy: Tensor, ds: Tensor | None, rows: Tensor, x: Tensor, weight: Tensor, rstd: Tensor
) -> Tensor:
    """`dX` [T, D] from dy [T, D], ds [T, R] (None: no rank row is used), rows [R, D], and the forward's x, g
    and rstd."""
    dy, x = (t if t.stride(-1) == 1 else t.contiguous() for t in (dy, x))
    ds, rows = rows[:0] if ds is None else ds.contiguous(), rows.contiguous()
    (tokens, d), r, dx = (
        x.shape,
        ds.shape[1] if ds.shape[0] else 0,
        torch.empty_like(x, memory_format=torch.contiguous_format),
    )
    if not tokens:
        return dx
    tile = backward_tile(r, x.dtype)
    backward_kernel[(triton.cdiv(tokens, tile.sizes["BM"]),)](
        dy, ds, rows, x, weight, rstd, dx, tokens, d, r, dy.stride(0), ds.stride(0), rows.stride(0),
        x.stride(0),
        **tile.sizes, PRECISION=precision(x.dtype), num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return dx


@norm_shrink_backward.register_fake
def _(dy, ds, rows, x, weight, rstd):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def variants(dtype: torch.dtype) -> list[Variant]:
    """The compilations that a GPU would ask for."""
    p, wide, found = pointer(dtype), "*fp32", []
    precise = {"PRECISION": precision(dtype)}
    for rows in (8, 64, 128):
        for heads in (0, 8, 24):
            types = {
                "x": p,
                "g": p,
                "a": p,
                "h": wide if heads else p,
                "y": p,
                "rstd": wide,
                "s": p,
                "z": wide,
                "eps": "fp32",
            }
            types |= dict.fromkeys(("T", "D", "R", "H", "x_row", "a_row", "h_row"), "i32")
            found.append(
                Variant(
                    f"norm_shrink R{rows} H{heads}",
                    forward_kernel,
                    types,
                    precise,
                    forward_tile(rows, heads, dtype),
                )
            )
        types = {"dy": p, "ds": p, "rows": p, "x": p, "g": p, "rstd": wide, "dx": p}
        types |= dict.fromkeys(("T", "D", "R", "dy_row", "ds_row", "rows_row", "x_row"), "i32")
        found.append(
            Variant(
                f"norm_shrink backward R{rows}", backward_kernel, types, precise, backward_tile(rows, dtype)
            )
        )
    return found
