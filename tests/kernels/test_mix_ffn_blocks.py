"""mix_ffn taken in blocks of tokens against one block, and what it keeps for the backward.

Run: python -m pytest tests/kernels/test_mix_ffn_blocks.py
"""

from __future__ import annotations

import pytest
import torch
from compare import assert_near, relative_rms
from test_mix_ffn import NAMES, inputs

from moabench.kernels import mix_ffn as kernel

TOKENS = 150  # two whole blocks of at least 64 and a ragged one


def run(tensors, ids, dtype, dropout=0.0):
    low = [t.detach().to(dtype).requires_grad_() for t in tensors]
    torch.manual_seed(7)
    got = kernel.mix_ffn(*low, ids, dropout=dropout)
    torch.manual_seed(8)
    cotangents = [torch.randn(t.shape).to(dtype) for t in got]
    return [*got, *torch.autograd.grad(got, low, cotangents)]


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("k", [0, 2])
def test_blocks_equal_one_block(k, dropout, monkeypatch):
    torch.manual_seed(0)
    tensors, ids = inputs(TOKENS, 9, 4, 3, k)
    whole = run(tensors, ids, torch.float64, dropout)
    monkeypatch.setattr(kernel, "BLOCK", 1)
    assert [t.start for t in kernel._blocks(tensors[0], 12)] == [0, 64, 128]
    for name, got, want in zip(
        ("hbar", "z", *NAMES), run(tensors, ids, torch.float64, dropout), whole, strict=True
    ):
        assert_near(name, got, want, 1e-13)


@pytest.mark.parametrize("k", [0, 2])
def test_gradients_summed_over_many_bf16_blocks_round_as_one_does(k, monkeypatch):
    """30 blocks: adding them in bf16 one after the other would cost several times the error of one
    rounding."""
    torch.manual_seed(0)
    tensors, ids = inputs(30 * 64, 9, 4, 3, k)
    exact, whole = run(tensors, ids, torch.float64), run(tensors, ids, torch.bfloat16)
    monkeypatch.setattr(kernel, "BLOCK", 1)
    for name, got, one, want in zip(
        ("hbar", "z", *NAMES), run(tensors, ids, torch.bfloat16), whole, exact, strict=True
    ):
        assert relative_rms(got, want) <= 1.3 * relative_rms(one, want), name


@pytest.mark.parametrize("k", [0, 2])
def test_keeps_nothing_of_the_inner_width_but_gate_and_up(k):
    tensors, ids = inputs(20, 17, 8, 2, k, dtype=torch.float32)
    kept = []

    def pack(t):
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        kernel._MixFFN.apply(*tensors, ids, None, "silu")
    assert sum(t.shape == (20, 17) for t in kept) == 2


@pytest.mark.parametrize("k", [0, 2])
def test_compiles_without_a_graph_break(k):
    torch.manual_seed(0)
    tensors, ids = inputs(TOKENS, 9, 4, 3, k, dtype=torch.float32)
    compiled = torch.compile(lambda *t: kernel.mix_ffn(*t, ids), backend="aot_eager", fullgraph=True)
    for name, got, want in zip(("hbar", "z"), compiled(*tensors), kernel.mix_ffn(*tensors, ids), strict=True):
        assert_near(name, got, want, 1e-6)
