"""Operations on router scores against their definitions: values, gradients, shapes, extremes.

Run: python -m pytest tests/kernels/test_route.py
"""

from __future__ import annotations

import pytest
import torch
from compare import assert_near

from moabench.kernels import route


@pytest.mark.parametrize(
    "shape", [(5,), (1, 1), (7, 1), (1, 8), (70, 13), (9, 3, 5), (2, 4, 3, 5), (0, 4)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_softmax(shape, dtype):
    torch.manual_seed(0)
    scores = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    powers = [torch.exp(s) for s in scores.unbind(-1)]
    want = torch.stack([p / sum(powers) for p in powers], -1)
    cotangent = torch.randn_like(want)
    low = scores.detach().to(dtype).requires_grad_()
    got = route.softmax(low)
    assert got.shape == want.shape and got.dtype == dtype
    if not got.numel():
        return
    assert_near("softmax", got, want, 1e-6)
    grad = torch.autograd.grad(got, low, cotangent.to(dtype))[0]
    expected = torch.autograd.grad(want, scores, cotangent)[0]
    assert (grad.double() - expected).abs().max() < 1e-6


def test_softmax_of_extremes():
    inf = float("inf")
    scores = torch.tensor([[1e4, -1e4, 0.0], [0.0, -inf, -inf], [3.0, 3.0, 3.0]], requires_grad=True)
    got = route.softmax(scores)
    assert torch.equal(got[0], torch.tensor([1.0, 0.0, 0.0])) and torch.equal(
        got[1], torch.tensor([1.0, 0.0, 0.0])
    )
    assert_near("equal scores", got[2], torch.full((3,), 1 / 3), 1e-6)
    got.square().sum().backward()
    assert scores.grad.isfinite().all()
