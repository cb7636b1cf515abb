"""Triton kernels of shrink, expand and their gradients.

    shrink       S = X A^T in X's dtype, and Z = X H^T in fp32, from one pass over X
    expand_add_  Y += S B^T in place, any strides; also dX += dS A
    outer        S^T Y, a sum over tokens, in two steps of fixed order

Shapes: T tokens, D input width, N output width, R rank rows, H router rows. Sums are fp32. What an fp32
router loses on bf16 tensor cores is given back by taking its weight as a sum of three bf16 numbers (24 bits),
whose products with a bf16 X are exact.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import Tile, Variant, dot, dot_exact, parts_of, pieces, pointer, precision


@triton.jit
def shrink_kernel(
    x, a, h, s, z, T, D, R, H, split, x_row, a_row, a_col, h_row,
    P1: tl.constexpr, P2: tl.constexpr, PH: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
    PARTIAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of BM tokens and up to P1 + P2 rank rows over one of gridDim.y parts of D (`split` columns
    each). The first group of rank rows (program_id 2) also takes the router rows. PARTIAL: s [parts, T, R]
    and z [parts, T, H] are fp32 parts to be summed."""
    tokens = tl.program_id(0) * BM + tl.arange(0, BM)
    part, first = tl.program_id(1), tl.program_id(2) * (P1 + P2)
    live = tokens[:, None] < T
    r1 = first + tl.arange(0, P1)
    acc1 = tl.zeros((BM, P1), tl.float32)
    if P2 > 0:
        r2 = first + P1 + tl.arange(0, P2)
        acc2 = tl.zeros((BM, P2), tl.float32)
    if PH > 0:
        rh = tl.arange(0, PH)
        acch = tl.zeros((BM, PH), tl.float32)
    rows = x + tokens[:, None].to(tl.int64) * x_row
    for start in range(part * split, min(D, part * split + split), BK):
        k = start + tl.arange(0, BK)
        inside = k < D
        tile = tl.load(rows + k[None, :], mask=live & inside[None, :], other=0.0)
        a1 = tl.load(
            a + r1[None, :] * a_row + k[:, None] * a_col, mask=(r1[None, :] < R) & inside[:, None], other=0.0
        )
        acc1 = dot(tile, a1, acc1, PRECISION)
        if P2 > 0:
            a2 = tl.load(
                a + r2[None, :] * a_row + k[:, None] * a_col,
                mask=(r2[None, :] < R) & inside[:, None],
                other=0.0,
            )
            acc2 = dot(tile, a2, acc2, PRECISION)
        if PH > 0:
            ht = tl.load(
                h + rh[None, :] * h_row + k[:, None], mask=(rh[None, :] < H) & inside[:, None], other=0.0
            )
            acch = dot_exact(tile, ht, acch, PRECISION)
    out = tokens[:, None].to(tl.int64)
    if PARTIAL:
        out += part.to(tl.int64) * T
    tl.store(s + out * R + r1[None, :], acc1.to(s.dtype.element_ty), mask=live & (r1[None, :] < R))
    if P2 > 0:
        tl.store(s + out * R + r2[None, :], acc2.to(s.dtype.element_ty), mask=live & (r2[None, :] < R))
    if PH > 0:  # noqa: SIM102 (decided at compile time, the inner one is not)
        if first == 0:
            tl.store(z + out * H + rh[None, :], acch, mask=live & (rh[None, :] < H))


@triton.jit
def expand_kernel(
    y, s, b, T, N, R, y_row, s_row, b_row, b_col,
    P: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Y [BM, BN] += S B^T for one tile of Y; the rank rows in steps of P."""
    tokens = tl.program_id(0) * BM + tl.arange(0, BM)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    live = tokens[:, None] < T
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(0, R, P):
        r = start + tl.arange(0, P)
        left = tl.load(
            s + tokens[:, None].to(tl.int64) * s_row + r[None, :], mask=live & (r[None, :] < R), other=0.0
        )
        right = tl.load(
            b + columns[None, :].to(tl.int64) * b_row + r[:, None].to(tl.int64) * b_col,
            mask=(columns[None, :] < N) & (r[:, None] < R),
            other=0.0,
        )
        acc = dot(left, right, acc, PRECISION)
    at = y + tokens[:, None].to(tl.int64) * y_row + columns[None, :]
    mask = live & (columns[None, :] < N)
    before = tl.load(at, mask=mask, other=0.0)
    tl.store(at, (before.to(tl.float32) + acc).to(y.dtype.element_ty), mask=mask)


@triton.jit
def outer_kernel(
    y, s, out, T, N, R, chunk, y_row, s_row,
    P1: tl.constexpr, P2: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[part, R, BN] = S^T Y over the `chunk` tokens of one part, fp32. The tile is Y^T S, whose tall side
    suits the tensor cores."""
    columns = tl.program_id(0) * BN + tl.arange(0, BN)
    part, first = tl.program_id(1), tl.program_id(2) * (P1 + P2)
    r1 = first + tl.arange(0, P1)
    acc1 = tl.zeros((BN, P1), tl.float32)
    if P2 > 0:
        r2 = first + P1 + tl.arange(0, P2)
        acc2 = tl.zeros((BN, P2), tl.float32)
    wide = columns[:, None] < N
    for start in range(part * chunk, min(T, part * chunk + chunk), BM):
        tokens = start + tl.arange(0, BM)
        live = tokens < T
        offset = tokens.to(tl.int64)
        left = tl.load(y + offset[None, :] * y_row + columns[:, None], mask=wide & live[None, :], other=0.0)
        right = tl.load(
            s + offset[:, None] * s_row + r1[None, :], mask=live[:, None] & (r1[None, :] < R), other=0.0
        )
        acc1 = dot(left, right, acc1, PRECISION)
        if P2 > 0:
            right = tl.load(
                s + offset[:, None] * s_row + r2[None, :], mask=live[:, None] & (r2[None, :] < R), other=0.0
            )
            acc2 = dot(left, right, acc2, PRECISION)
    at = out + part.to(tl.int64) * R * N + columns[:, None]
    tl.store(at + r1[None, :].to(tl.int64) * N, acc1, mask=wide & (r1[None, :] < R))
    if P2 > 0:
        tl.store(at + r2[None, :].to(tl.int64) * N, acc2, mask=wide & (r2[None, :] < R))


# Tiles


def shrink_tile(rows: int, heads: int, dtype: torch.dtype) -> Tile:
    """BM tokens by BK columns for `rows` rank rows and `heads` router rows (whose three parts are held at
    once)."""
    p1, p2 = pieces(rows, dtype)
    ph = 0 if not heads else max(16, triton.next_power_of_2(heads))
    sizes, held = {"P1": p1, "P2": p2, "PH": ph}, p1 + p2 + 3 * ph
    if dtype == torch.float32:
        return Tile(sizes | {"BM": 32, "BK": 32}, num_warps=4, num_stages=2)
    block = 128 if held <= 64 else 64 if held <= 160 or not ph else 32
    return Tile(sizes | {"BM": 64, "BK": block}, num_warps=4 if held <= 96 else 8, num_stages=3)


def expand_tile(rows: int, dtype: torch.dtype) -> Tile:
    """BM tokens by BN columns; P rank rows a step."""
    p = min(64, max(16, triton.next_power_of_2(rows)))
    if dtype == torch.float32:
        return Tile({"P": min(p, 32), "BM": 32, "BN": 64}, num_warps=4, num_stages=2)
    return Tile({"P": p, "BM": 128, "BN": 128}, num_warps=8, num_stages=2)


def outer_tile(rows: int, dtype: torch.dtype) -> Tile:
    """BN columns by BM tokens a step for `rows` rank rows."""
    p1, p2 = pieces(rows, dtype)
    wide = p1 + p2 > 128
    if dtype == torch.float32:
        return Tile({"P1": p1, "P2": p2, "BM": 16, "BN": 64}, num_warps=8, num_stages=2)
    return Tile({"P1": p1, "P2": p2, "BM": 32 if wide else 64, "BN": 128}, num_warps=8, num_stages=3)


# Operations


@torch.library.custom_op("moabench::shrink", mutates_args=())
def shrink(x: Tensor, a: Tensor, heads: Tensor | None) -> tuple[Tensor, Tensor]:
    """`S = x a^T` [T, R] in x's dtype and `Z = x heads^T` [T, H] in fp32 (H = 0 without heads); a [R, D] of
    any strides."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    heads = None if heads is None else heads.float().contiguous()
    (tokens, d), rows, n = x.shape, a.shape[0], 0 if heads is None else heads.shape[0]
    s, z = x.new_empty(tokens, rows), x.new_empty(tokens, n, dtype=torch.float32)
    if not tokens or not rows + n:
        return s, z
    tile = shrink_tile(rows, n, x.dtype)
    sizes, groups = tile.sizes, max(1, triton.cdiv(rows, tile.sizes["P1"] + tile.sizes["P2"]))
    blocks = triton.cdiv(tokens, sizes["BM"])
    parts, split = parts_of(d, sizes["BK"], blocks * groups, x.device)
    out_s, out_z = s, z
    if parts > 1:
        out_s = x.new_empty(parts, tokens, rows, dtype=torch.float32)
        out_z = x.new_empty(parts, tokens, n, dtype=torch.float32)
    shrink_kernel[(blocks, parts, groups)](
        x, a, x if heads is None else heads, out_s, out_z, tokens, d, rows, n, split,
        x.stride(0), a.stride(0), a.stride(1), 0 if heads is None else heads.stride(0),
        **sizes, PARTIAL=parts > 1, PRECISION=precision(x.dtype), num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )  # fmt: skip
    return (s, z) if parts == 1 else (out_s.sum(0).to(x.dtype), out_z.sum(0))


@shrink.register_fake
def _(x, a, heads):
    n = 0 if heads is None else heads.shape[0]
    return x.new_empty(x.shape[0], a.shape[0]), x.new_empty(x.shape[0], n, dtype=torch.float32)


@torch.library.custom_op("moabench::expand_add_", mutates_args=("y",))
def expand_add_(y: Tensor, s: Tensor, b: Tensor) -> None:
    """`y += s b^T` in place; y [T, N] with unit column stride, s [T, R], b [N, R] of any strides."""
    if not y.numel() or not s.shape[1]:
        return
    s = s if s.stride(-1) == 1 else s.contiguous()
    tile = expand_tile(s.shape[1], y.dtype)
    grid = (triton.cdiv(y.shape[0], tile.sizes["BM"]), triton.cdiv(y.shape[1], tile.sizes["BN"]))
    expand_kernel[grid](
        y, s, b, y.shape[0], y.shape[1], s.shape[1], y.stride(0), s.stride(0), b.stride(0), b.stride(1),
        **tile.sizes, PRECISION=precision(y.dtype), num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip


@expand_add_.register_fake
def _(y, s, b):
    return None


@torch.library.custom_op("moabench::outer", mutates_args=())
def outer(s: Tensor, y: Tensor) -> Tensor:
    """`s^T y` [R, N] in the dtype of y, the sum over tokens of s [T, R] and y [T, N]."""
    y, s = (t if t.stride(-1) == 1 else t.contiguous() for t in (y, s))
    (tokens, o), rows = y.shape, s.shape[1]
    if not tokens or not rows * o:
        return y.new_zeros(rows, o)
    tile = outer_tile(rows, y.dtype)
    sizes, groups = tile.sizes, triton.cdiv(rows, tile.sizes["P1"] + tile.sizes["P2"])
    blocks = triton.cdiv(o, sizes["BN"])
    parts, chunk = parts_of(tokens, sizes["BM"], blocks * groups, y.device)
    out = y.new_empty(parts, rows, o, dtype=torch.float32)
    outer_kernel[(blocks, parts, groups)](
        y, s, out, tokens, o, rows, chunk, y.stride(0), s.stride(0),
        **sizes, PRECISION=precision(y.dtype), num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return (out[0] if parts == 1 else out.sum(0)).to(y.dtype)


@outer.register_fake
def _(s, y):
    return y.new_empty(s.shape[1], y.shape[1])


# The steps by the names that moabench.kernels.lowrank asks for


def shrink_both(x: Tensor, a: Tensor, heads: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """`S = X A^T` and `Z = X H^T` (None without heads)."""
    s, z = shrink(x, a, heads)
    return s, None if heads is None else z


def product(y: Tensor, b: Tensor) -> Tensor:
    """`y b` [T, R] from y [T, N] and b [N, R]."""
    return shrink(y, b.t(), None)[0]


def add_(y: Tensor, s: Tensor, b: Tensor) -> Tensor:
    """`y += s b^T` in place."""
    expand_add_(y, s, b)
    return y


# For the offline gate


def variants(dtype: torch.dtype) -> list[Variant]:
    """The compilations that a GPU would ask for: ranks 8 to 256, with and without routers, whole and split
    sums, and the transposed matrices of the backward."""
    p, found = pointer(dtype), []
    precise = {"PRECISION": precision(dtype)}

    def add(name: str, kernel, pointers: dict[str, str], tile: Tile, **constants) -> None:
        ints = {
            n: "i32"
            for n in kernel.arg_names
            if n not in pointers and n not in constants and n not in tile.sizes and n != "PRECISION"
        }
        found.append(Variant(name, kernel, pointers | ints, constants | precise, tile))

    for rows in (8, 24, 64, 128, 192, 256):
        tile = shrink_tile(rows, 0, dtype)
        add(
            f"shrink R{rows} of dY",
            shrink_kernel,
            {"x": p, "a": p, "h": p, "s": p, "z": "*fp32"},
            tile,
            a_row=1,
            PARTIAL=False,
        )
        for heads, partial in ((0, False), (8, False), (24, True)):
            pointers = {
                "x": p,
                "a": p,
                "h": "*fp32" if heads else p,
                "s": "*fp32" if partial else p,
                "z": "*fp32",
            }
            name = f"shrink R{rows} H{heads}{' split' if partial else ''}"
            add(name, shrink_kernel, pointers, shrink_tile(rows, heads, dtype), a_col=1, PARTIAL=partial)
        for name, one in ((f"expand R{rows}", "b_col"), (f"expand R{rows} of dX", "b_row")):
            add(name, expand_kernel, {"y": p, "s": p, "b": p}, expand_tile(rows, dtype), **{one: 1})
        add(f"outer R{rows}", outer_kernel, {"y": p, "s": p, "out": "*fp32"}, outer_tile(rows, dtype))
    return found
