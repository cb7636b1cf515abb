"""Tensors read from a file, against what there should be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .spec import ConfigError

SHOWN = 3
"""Names in an error; the others are counted."""


def check(stored: Mapping[str, Tensor], declared: Mapping[str, Tensor], what: str) -> None:
    """Raises ConfigError unless `stored` has the names and shapes of `declared`, all and no others, floats
    for floats, and finite ones. Reads values last: stored may be a file mapped into memory, and declared on
    the meta device."""
    faults: dict[str, Sequence[str]] = {
        "lacks": sorted(declared.keys() - stored.keys()),
        "holds what its config does not declare,": sorted(stored.keys() - declared.keys()),
    }
    names = sorted(stored.keys() & declared.keys())
    faults["has another shape for"] = [
        f"{name} ({tuple(stored[name].shape)}, expected {tuple(declared[name].shape)})"
        for name in names
        if stored[name].shape != declared[name].shape
    ]
    faults["has another kind of numbers for"] = [
        f"{name} ({_kind(stored[name])}, expected {_kind(declared[name])})"
        for name in names
        if not _alike(stored[name], declared[name])
    ]
    for fault, found in faults.items():
        if found:
            raise ConfigError(
                f"{what} {fault} {listed(found)}. Expected what its config declares, all of it and no more."
            )
    # in the dtype that computes: a double may be no number there
    if wrong := [name for name in names if not is_finite(stored[name].to(declared[name].dtype))]:
        raise ConfigError(f"{what} has numbers that are not finite in {listed(wrong)}.")


def is_finite(tensor: Tensor) -> bool:
    """Whether all numbers are, at the cost of reading them once. True for what has none: integers, packed
    weights, the meta device."""
    if not tensor.is_floating_point() or not tensor.numel() or tensor.is_meta:
        return True
    if tensor.element_size() == 1:  # torch compares no 8-bit floats
        tensor = tensor.to(torch.float32)
    low, high = torch.aminmax(tensor.detach())
    return bool(torch.isfinite(low) & torch.isfinite(high))


def listed(names: Sequence[str]) -> str:
    """The first names, and how many more."""
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def _alike(stored: Tensor, declared: Tensor) -> bool:
    """Floats of 16 bits and more are read as each other; everything else is what it is."""
    if not declared.is_floating_point():
        return stored.dtype == declared.dtype
    return stored.is_floating_point() and stored.element_size() > 1


def _kind(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
