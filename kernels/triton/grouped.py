"""Triton kernels of products over rows sorted by expert.

    grouped_product   w_e x_t of each sorted row, its token gathered in the prologue
    grouped_wide      w_e^T s of each sorted row
    grouped_sum_      Y += the rows of each token, in the order of its selections
    grouped_outer     sum of s x_t^T over each expert's rows, in their order

A tile belongs to one expert: the grid has as many tiles as the worst load needs, and each program finds its
own in the ends, so the host knows nothing of the load. Shapes: T tokens, K selections a token, N rows, E
experts, D wide, R narrow. Sums are fp32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import Tile, Variant, dot, pointer, precision


@triton.jit
def _tile(ends, index, E, BM: tl.constexpr, BE: tl.constexpr):
    """Expert, first row and end of tile `index`; expert E where there are fewer tiles."""
    e = tl.arange(0, BE)
    end = tl.load(ends + e, mask=e < E, other=0)
    start = tl.load(ends + e - 1, mask=(e < E) & (e > 0), other=0)
    tiles = (end - start + BM - 1) // BM
    tiles = tl.where(e < E, tiles, 0)
    upto = tl.cumsum(tiles, 0)
    expert = tl.sum(tl.where((e < E) & (upto <= index), 1, 0), 0)
    mine = e == expert
    first = tl.sum(tl.where(mine, start + (index - upto + tiles) * BM, 0), 0)
    return expert, first, tl.sum(tl.where(mine, end, 0), 0)


@triton.jit
def product_kernel(
    x, tokens, ends, w, s, E, D, R, x_row, w_expert, w_row, w_col,
    P: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """S [BM, P] of one tile: X gathered, times its expert's w."""
    expert, first, end = _tile(ends, tl.program_id(0), E, BM, BE)
    if expert < E:
        rows = first + tl.arange(0, BM)
        live = rows < end
        at_x = x + tl.load(tokens + rows, mask=live, other=0)[:, None] * x_row
        r = tl.program_id(1) * P + tl.arange(0, P)
        acc = tl.zeros((BM, P), tl.float32)
        at_w = w + expert.to(tl.int64) * w_expert + r[None, :] * w_row
        for begin in range(0, D, BK):
            k = begin + tl.arange(0, BK)
            inside = k < D
            left = tl.load(at_x + k[None, :], mask=live[:, None] & inside[None, :], other=0.0)
            right = tl.load(
                at_w + k[:, None].to(tl.int64) * w_col, mask=inside[:, None] & (r[None, :] < R), other=0.0
            )
            acc = dot(left, right, acc, PRECISION)
        tl.store(
            s + rows.to(tl.int64)[:, None] * R + r[None, :],
            acc.to(s.dtype.element_ty),
            mask=live[:, None] & (r[None, :] < R),
        )


@triton.jit
def wide_kernel(
    s, ends, w, out, E, D, R, s_row, w_expert, w_row, w_col,
    P: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile [BM, BN] of w_e^T S; the narrow side in steps of P."""
    expert, first, end = _tile(ends, tl.program_id(0), E, BM, BE)
    if expert < E:
        rows, columns = first + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN)
        live, inside = rows < end, columns < D
        acc = tl.zeros((BM, BN), tl.float32)
        at_w = w + expert.to(tl.int64) * w_expert + columns[None, :].to(tl.int64) * w_col
        for begin in range(0, R, P):
            r = begin + tl.arange(0, P)
            left = tl.load(
                s + rows.to(tl.int64)[:, None] * s_row + r[None, :],
                mask=live[:, None] & (r[None, :] < R),
                other=0.0,
            )
            right = tl.load(at_w + r[:, None] * w_row, mask=(r[:, None] < R) & inside[None, :], other=0.0)
            acc = dot(left, right, acc, PRECISION)
        at = out + rows.to(tl.int64)[:, None] * D + columns[None, :]
        tl.store(at, acc.to(out.dtype.element_ty), mask=live[:, None] & inside[None, :])


@triton.jit
def sum_kernel(y, wide, rows, T, D, K, y_row, BM: tl.constexpr, BN: tl.constexpr):
    """Y [BM, BN] += the K rows of each token."""
    tokens, columns = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN)
    live = tokens < T
    mask = live[:, None] & (columns < D)[None, :]
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K):
        row = tl.load(rows + tokens.to(tl.int64) * K + k, mask=live, other=0)
        acc += tl.load(wide + row[:, None] * D + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    at = y + tokens.to(tl.int64)[:, None] * y_row + columns[None, :]
    before = tl.load(at, mask=mask, other=0.0)
    tl.store(at, (before.to(tl.float32) + acc).to(y.dtype.element_ty), mask=mask)


@triton.jit
def outer_kernel(
    s, x, tokens, ends, out, D, R, s_row, x_row,
    P: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out [R, BN] of expert program_id(1): X^T S over its rows, whose tall side suits the tensor cores."""
    columns, expert = tl.program_id(0) * BN + tl.arange(0, BN), tl.program_id(1)
    start, end = tl.load(ends + expert - 1, mask=expert > 0, other=0), tl.load(ends + expert)
    inside = columns < D
    r = tl.program_id(2) * P + tl.arange(0, P)
    acc = tl.zeros((BN, P), tl.float32)
    for begin in range(start, end, BM):
        rows = begin + tl.arange(0, BM)
        live = rows < end
        token = tl.load(tokens + rows, mask=live, other=0)
        left = tl.load(
            x + token[None, :] * x_row + columns[:, None], mask=inside[:, None] & live[None, :], other=0.0
        )
        right = tl.load(
            s + rows.to(tl.int64)[:, None] * s_row + r[None, :],
            mask=live[:, None] & (r[None, :] < R),
            other=0.0,
        )
        acc = dot(left, right, acc, PRECISION)
    at = out + expert.to(tl.int64) * R * D + columns[:, None] + r[None, :].to(tl.int64) * D
    tl.store(at, acc.to(out.dtype.element_ty), mask=inside[:, None] & (r[None, :] < R))


# Tiles


def narrow(r: int, dtype: torch.dtype) -> int:
    """Narrow columns that one program holds."""
    return min(32 if dtype == torch.float32 else 64, max(16, triton.next_power_of_2(r)))


def product_tile(r: int, experts: int, dtype: torch.dtype) -> Tile:
    """BM rows by BK columns a step; P narrow columns a program."""
    sizes = {"P": narrow(r, dtype), "BE": triton.next_power_of_2(experts)}
    if dtype == torch.float32:
        return Tile(sizes | {"BM": 32, "BK": 32}, num_warps=4, num_stages=2)
    return Tile(sizes | {"BM": 64, "BK": 128 if experts <= 64 else 64}, num_warps=4, num_stages=3)


def wide_tile(r: int, experts: int, dtype: torch.dtype) -> Tile:
    """BM rows by BN columns; P narrow columns a step."""
    sizes = {"P": narrow(r, dtype), "BE": triton.next_power_of_2(experts)}
    if dtype == torch.float32:
        return Tile(sizes | {"BM": 32, "BN": 64}, num_warps=4, num_stages=2)
    return Tile(sizes | {"BM": 64, "BN": 128}, num_warps=4, num_stages=2)


def sum_tile() -> Tile:
    """BM tokens by BN columns."""
    return Tile({"BM": 8, "BN": 256}, num_warps=4, num_stages=1)


def outer_tile(r: int, dtype: torch.dtype) -> Tile:
    """BN columns by BM rows a step; P narrow columns a program."""
    if dtype == torch.float32:
        return Tile({"P": narrow(r, dtype), "BM": 16, "BN": 64}, num_warps=4, num_stages=2)
    return Tile({"P": narrow(r, dtype), "BM": 64, "BN": 64}, num_warps=4, num_stages=3)


# Operations


def _contiguous_rows(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()


@torch.library.custom_op("moabench::grouped_product", mutates_args=())
def grouped_product(x: Tensor, tokens: Tensor, ends: Tensor, w: Tensor) -> Tensor:
    """`w_e x_t` [N, R] of x [T, D], tokens [N] int64, ends [E] int32 and w [E, R, D] of any strides."""
    x = _contiguous_rows(x)
    (experts, r, d), n = w.shape, tokens.shape[0]
    s = x.new_empty(n, r)
    if not s.numel():
        return s
    tile = product_tile(r, experts, x.dtype)
    sizes = tile.sizes
    product_kernel[(triton.cdiv(n, sizes["BM"]) + experts, triton.cdiv(r, sizes["P"]))](
        x, tokens, ends, w, s, experts, d, r, x.stride(0), *w.stride(),
        **sizes, PRECISION=precision(x.dtype), num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return s


@grouped_product.register_fake
def _(x, tokens, ends, w):
    return x.new_empty(tokens.shape[0], w.shape[1])


@torch.library.custom_op("moabench::grouped_wide", mutates_args=())
def grouped_wide(s: Tensor, ends: Tensor, w: Tensor) -> Tensor:
    """`w_e^T s` [N, D] of s [N, R], ends [E] int32 and w [E, R, D] of any strides."""
    s = _contiguous_rows(s)
    (experts, r, d), n = w.shape, s.shape[0]
    out = s.new_empty(n, d)
    if not out.numel():
        return out
    tile = wide_tile(r, experts, s.dtype)
    wide_kernel[(triton.cdiv(n, tile.sizes["BM"]) + experts, triton.cdiv(d, tile.sizes["BN"]))](
        s, ends, w, out, experts, d, r, s.stride(0), *w.stride(),
        **tile.sizes, PRECISION=precision(s.dtype), num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return out


@grouped_wide.register_fake
def _(s, ends, w):
    return s.new_empty(s.shape[0], w.shape[2])


@torch.library.custom_op("moabench::grouped_sum_", mutates_args=("y",))
def grouped_sum_(y: Tensor, wide: Tensor, rows: Tensor) -> None:
    """`y_t += sum_k wide[rows_tk]` in place; y [T, D] with unit column stride, wide [N, D], rows [T, K]
    int64."""
    (t, d), rows = y.shape, rows.contiguous()
    if not y.numel() or not rows.numel():
        return
    tile = sum_tile()
    sum_kernel[(triton.cdiv(t, tile.sizes["BM"]), triton.cdiv(d, tile.sizes["BN"]))](
        y,
        wide.contiguous(),
        rows,
        t,
        d,
        rows.shape[1],
        y.stride(0),
        **tile.sizes,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


@grouped_sum_.register_fake
def _(y, wide, rows):
    return None


@torch.library.custom_op("moabench::grouped_outer", mutates_args=())
def grouped_outer(s: Tensor, x: Tensor, tokens: Tensor, ends: Tensor) -> Tensor:
    """`sum s x_t^T` [E, R, D] over each expert's rows, of s [N, R], x [T, D], tokens [N] int64 and ends [E]
    int32."""
    s, x = _contiguous_rows(s), _contiguous_rows(x)
    r, d, experts = s.shape[1], x.shape[1], ends.shape[0]
    out = x.new_empty(experts, r, d)
    if not out.numel():
        return out
    tile = outer_tile(r, x.dtype)
    sizes = tile.sizes
    outer_kernel[(triton.cdiv(d, sizes["BN"]), experts, triton.cdiv(r, sizes["P"]))](
        s, x, tokens, ends, out, d, r, s.stride(0), x.stride(0),
        **sizes, PRECISION=precision(x.dtype), num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return out


@grouped_outer.register_fake
def _(s, x, tokens, ends):
    return x.new_empty(ends.shape[0], s.shape[1], x.shape[1])


# The steps by the names that moabench.kernels.grouped asks for

product = grouped_product
outer = grouped_outer


def add_product_(y: Tensor, s: Tensor, tokens: Tensor, rows: Tensor, ends: Tensor, w: Tensor) -> None:
    """y [T, D] plus, in place, `w_e^T s` of each token's rows [T, K]."""
    grouped_sum_(y, grouped_wide(s, ends, w), rows)


# For the offline gate


def variants(dtype: torch.dtype) -> list[Variant]:
    """The compilations that a GPU would ask for: ranks 8 to 64, A and B as they lie."""
    p, found = pointer(dtype), []
    common, precise = {"tokens": "*i64", "ends": "*i32"}, {"PRECISION": precision(dtype)}

    def add(
        name: str, kernel, pointers: dict[str, str], tile: Tile, products: bool = True, **constants
    ) -> None:
        constants |= precise if products else {}
        ints = {
            n: "i32"
            for n in kernel.arg_names
            if n not in pointers and n not in constants and n not in tile.sizes
        }
        found.append(Variant(name, kernel, pointers | ints, constants, tile, products))

    for r in (8, 24, 64):
        for experts in (8, 192):
            for of, one in (("A", {"w_col": 1}), ("B", {"w_row": 1})):
                name = f"R{r} E{experts} {of}"
                pointers = {"x": p, "w": p, "s": p} | common
                add(
                    f"grouped product {name}",
                    product_kernel,
                    pointers,
                    product_tile(r, experts, dtype),
                    **one,
                )
                pointers = {"s": p, "w": p, "out": p, "ends": "*i32"}
                add(f"grouped wide {name}", wide_kernel, pointers, wide_tile(r, experts, dtype), **one)
        add(f"grouped outer R{r}", outer_kernel, {"s": p, "x": p, "out": p} | common, outer_tile(r, dtype))
    add("grouped sum", sum_kernel, {"y": p, "wide": p, "rows": "*i64"}, sum_tile(), products=False)
    return found
