"""Comparison of tensors by relative RMS error."""

from __future__ import annotations

from torch import Tensor


def relative_rms(got: Tensor, expected: Tensor) -> float:
    """RMS of the difference over RMS of `expected`, both taken in fp64; the plain RMS where `expected` is
    zero."""
    difference = (got.detach().double() - expected.detach().double()).square().mean().sqrt().item()
    size = expected.detach().double().square().mean().sqrt().item()
    return difference / size if size else difference


def assert_near(name: str, got: Tensor | None, expected: Tensor, bound: float) -> None:
    """Fail with the tensor's name unless shapes agree and the relative RMS error is at most `bound` (None
    counts as zeros)."""
    if got is None:
        assert not expected.count_nonzero(), (
            f"{name}: nothing, expected values up to {expected.abs().max().item():.3g}"
        )
        return
    assert got.shape == expected.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    error = relative_rms(got, expected) if expected.numel() else 0.0
    assert error <= bound, f"{name}: relative RMS error {error:.2e}, expected at most {bound:.0e}"
