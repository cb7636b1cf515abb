"""Seams: how banks of experts attach to a decoder layer, one file each, named as `Experts.seam` says.

A seam is made from the banks of one adapter at its places (`Entry`), refuses what does not fit before
anything is attached, declares tensors, puts wrappers where it must, and runs. A new way to attach is a new
file here; the layer knows only the protocol (`base.Seam`).
"""

from __future__ import annotations

import importlib

from .base import Entry, Seam, tensor_name

__all__ = ["Entry", "Seam", "of_kind", "tensor_name"]


def of_kind(kind: str) -> type[Seam]:
    """The class of the seam `kind`."""
    return importlib.import_module(f"{__name__}.{kind}").Seam
