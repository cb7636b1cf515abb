"""Bases whose linears are not torch's own: what they give may be a view, or kept by them, and is left as it
is.

Run: python -m pytest tests/methods/test_other_linears.py
"""

from __future__ import annotations

import pytest
import torch
from tiny import MIXTURES, assert_near, attached, base, batch, given
from torch import nn


class Kept(nn.Linear):
    """A linear that keeps what it gives, and gives a view of it, as a packed or a cached one may."""

    def forward(self, x):
        self.kept = super().forward(x)
        self.before = self.kept.detach().clone()
        return self.kept[:]


@pytest.mark.parametrize("name", MIXTURES)
def test_nothing_is_written_into_what_a_linear_of_another_kind_gave(name):
    """`expand_add_` writes in place, and so only into what torch's own linear made."""
    model = attached(name)
    inputs = given(model, batch())
    model, want = base(), model(**inputs).logits
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    for linear in linears:
        linear.__class__ = Kept
    model = attached(name, model)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            got = model(**inputs).logits
        assert_near("logits", got, want, 1e-5)
        assert all(torch.equal(linear.kept, linear.before) for linear in linears)
    got.sum().backward()
    assert any(p.grad is not None and p.grad.any() for p in model.parameters())
