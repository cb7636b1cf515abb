"""What the Triton kernels share: tiles over rank rows, products, and how a variant is described for the
offline gate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from moabench.kernels import backend

UPCAST = tl.constexpr(backend.interpreted())
"""In the interpreter `tl.dot` multiplies the bit patterns of bf16: operands become fp32 there, which is
exact."""


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """`acc + a b` in fp32."""
    if UPCAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def dot_exact(x, h, acc, PRECISION: tl.constexpr):
    """`acc + x h` for fp32 h: with bf16 x by h's three bf16 parts, else in fp32."""
    if x.dtype == tl.bfloat16:
        high = h.to(tl.bfloat16)
        rest = h - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
        return dot(x, high, dot(x, middle, dot(x, low, acc, PRECISION), PRECISION), PRECISION)
    return tl.dot(x.to(tl.float32), h, acc, input_precision="ieee")


def pieces(rows: int, dtype: torch.dtype) -> tuple[int, int]:
    """Widths, powers of two from 16 on (the second may be 0), of the two tiles that hold the rank rows of one
    program with little to spare: 24 -> (16, 16), 72 -> (64, 16), 192 -> (128, 64). More than 192 rows (fp32:
    128) take several programs."""
    rows = min(max(rows, 1), 128 if dtype == torch.float32 else 192)
    first = max(16, 1 << (rows.bit_length() - 1))
    rest = rows - first
    return first, (0 if rest <= 0 else max(16, triton.next_power_of_2(rest)))


def parts_of(length: int, step: int, programs: int, device: torch.device) -> tuple[int, int]:
    """Into how many parts a sum over `length` goes so that `programs` programs a part fill the device, and
    the length of one part, a multiple of `step`. On a CPU (the interpreter) two, so that the sum over parts
    is tested."""
    wanted = (
        2 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
    )
    steps = triton.cdiv(length, step)
    parts = max(1, min(steps, wanted // max(1, programs)))
    per_part = triton.cdiv(steps, parts)
    return triton.cdiv(steps, per_part), per_part * step


def precision(dtype: torch.dtype) -> str:
    """How products of fp32 operands are taken: as torch takes them."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


@dataclass(frozen=True)
class Tile:
    """Sizes (constexpr arguments) and launch options of one kernel for one problem."""

    sizes: dict[str, int]
    num_warps: int = 4
    num_stages: int = 2


@dataclass(frozen=True)
class Variant:
    """One kernel with everything that a compilation needs. arguments: type of each argument that is not
    constexpr ("*bf16", "i32")."""

    name: str
    kernel: Any
    arguments: dict[str, str]
    constants: dict[str, Any]
    tile: Tile
    products: bool = True
    """Whether it must use the tensor cores."""


def pointer(dtype: torch.dtype) -> str:
    """Triton's name of a pointer to `dtype`."""
    return {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}[dtype]
