"""Which implementation of the kernels runs: the one place that picks it.

    backend.select("auto")          # for the process; returns what will run and why
    with backend.use("triton"): ... # for a block, in tests and benchmarks

`torch`   plain torch, hand-written backward: any device and dtype
`triton`  the Triton kernels: CUDA tensors in fp32, bf16 or fp16 (CPU tensors under TRITON_INTERPRET=1, to
          test the kernels)
`auto`    triton for what it can run on a CUDA device, torch for the rest: CPUs, fp64 models, regions under
          autocast

A demanded backend never gives way to the other: `triton` where it cannot run is an error.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Literal, get_args

import torch
from torch import Tensor

Name = Literal["auto", "torch", "triton"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What the Triton kernels compute in."""

_selected: Name = "auto"


def select(name: Name) -> Name:
    """Demand a backend from here on and return the one demanded before. Raises ValueError for an unknown
    name, RuntimeError for `triton` where Triton is not installed."""
    global _selected
    if name not in get_args(Name):
        raise ValueError(f"backend={name!r}: expected one of {', '.join(get_args(Name))}.")
    if name == "triton" and not installed():
        raise RuntimeError(
            "backend='triton': Triton is not installed; expected backend=torch or auto, or `pip "
            "install triton`."
        )
    before, _selected = _selected, name
    return before


def demanded() -> Name:
    """What `select` was last told."""
    return _selected


@contextmanager
def use(name: Name) -> Iterator[None]:
    """`select(name)` for the duration of a block."""
    before = select(name)
    try:
        yield
    finally:
        select(before)


def triton_for(x: Tensor) -> bool:
    """Whether the Triton kernels run for a tensor like x. Raises RuntimeError where they were demanded and
    cannot."""
    if _selected == "torch":
        return False
    fits = x.dtype in DTYPES and not autocasting(x)
    if _selected == "auto":
        return fits and x.is_cuda and installed()
    if not fits or not (x.is_cuda or interpreted()):
        autocast = " under autocast" if autocasting(x) else ""
        raise RuntimeError(
            f"backend='triton': cannot run on {x.device.type} in "
            f"{str(x.dtype).removeprefix('torch.')}{autocast}; expected a CUDA device (or "
            "TRITON_INTERPRET=1) and a model in float32, bfloat16 or float16. Other models take "
            "backend=torch or auto."
        )
    return True


def autocasting(x: Tensor) -> bool:
    """Whether ops on tensors like x choose their own precision; the meta device, which computes nothing,
    knows no autocast."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def describe(device: str | torch.device) -> str:
    """What runs for models on `device`, in words, for the run's record."""
    cuda = torch.device(device).type == "cuda"
    if _selected == "auto":
        if not cuda:
            return f"torch (auto: device {torch.device(device).type})"
        return f"triton {_version()} (auto)" if installed() else "torch (auto: Triton is not installed)"
    return (
        _selected if _selected == "torch" else f"triton {_version()}" + (" (interpreter)" if not cuda else "")
    )


@cache
def installed() -> bool:
    """Whether Triton can be imported."""
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Whether Triton kernels run in its interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _version() -> str:
    import triton

    return triton.__version__
