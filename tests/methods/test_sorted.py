"""Methods whose tokens are sorted by expert against themselves with every expert on every token: outputs,
gradients, decoding.

Run: python -m pytest tests/methods/test_sorted.py
"""

from __future__ import annotations

import pytest
import torch
from tiny import answer_only, assert_near, attached, batch, logits, losses, trainable

from moabench import methods
from moabench.kernels import grouped

SIZES = {"experts.n": 16, "experts.r": 4, "router.k": 2}


def outcome(monkeypatch, sort: bool, **overrides):
    """Logits, loss and gradients in training mode, and the number of sorted terms met."""
    met = []
    shrink = grouped.shrink
    monkeypatch.setattr(grouped, "prefers_sorted", lambda *a: sort)
    monkeypatch.setattr(grouped, "shrink", lambda *a: met.append(1) or shrink(*a))
    model, inputs = attached("moe_lora_topk", **(SIZES | overrides)), batch(left=2)
    before = logits(model, **inputs)
    model.train()
    torch.manual_seed(4)
    task, extra = losses(model, inputs, answer_only(inputs["input_ids"]))
    (task + sum(extra.values())).backward()
    monkeypatch.undo()
    return before, task, {n: p.grad for n, p in trainable(model).items()}, len(met)


@pytest.mark.parametrize(
    "overrides", [{}, {"router.k": 1}, {"experts.dropout": 0.3}, {"experts.targets": ["q", "down"]}]
)
def test_sorted_equals_dense(monkeypatch, overrides):
    dense, sorted_ = outcome(monkeypatch, False, **overrides), outcome(monkeypatch, True, **overrides)
    assert not dense[3] and sorted_[3]
    assert_near("logits", sorted_[0], dense[0], 1e-5)
    # the same mask is drawn in both, but not of the same stream of random numbers everywhere
    if "experts.dropout" not in overrides:
        assert_near("loss", sorted_[1], dense[1], 1e-5)
    for name, gradient in dense[2].items():
        assert_near(name, sorted_[2][name], gradient, 2e-4)


def test_generation_with_a_cache(monkeypatch):
    model, inputs = attached("moe_lora_topk", **SIZES), batch(left=2)
    inputs.pop("position_ids")
    want = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    monkeypatch.setattr(grouped, "prefers_sorted", lambda *a: True)
    assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False), want)


def test_only_what_can_be_sorted_is(monkeypatch):
    """Ranks that differ, soft routers, block routers and changed weights take the dense form."""
    monkeypatch.setattr(grouped, "prefers_sorted", lambda *a: True)
    monkeypatch.setattr(grouped, "shrink", lambda *a: pytest.fail("sorted"))
    for name, overrides in (
        ("moe_lora_topk", {"experts.n": 2, "experts.r": [2, 3], "router.k": 1}),
        ("molora", {}),
        ("moa_sparse", {}),
    ):
        logits(attached(name, **overrides), **batch())


def test_the_rule_decides(monkeypatch):
    """On a CPU in fp32 few experts are dense, 64 experts of rank 8 with k = 1 are sorted."""
    called = []
    shrink = grouped.shrink
    monkeypatch.setattr(grouped, "shrink", lambda *a: called.append(1) or shrink(*a))
    logits(attached("moe_lora_topk"), **batch())
    assert not called
    methods.capture_routing(
        attached("moe_lora_topk", **{"experts.n": 64, "experts.r": 8, "router.k": 1}), batch()
    )
    assert called
