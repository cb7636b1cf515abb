"""Every shipped method on the Triton kernels against itself on plain torch: training losses, gradients,
decoding.

In Triton's interpreter where there is no GPU. Run: python -m pytest tests/methods/test_backends.py
"""

from __future__ import annotations

import pytest
import references
import torch
from tiny import MIXTURES, answer_only, assert_near, attached, batch, logits, losses, trainable

pytest.importorskip("triton", reason="Triton is not installed")

from moabench import methods
from moabench.kernels import backend

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = {name: references.of("methods", name).SIZES for name in MIXTURES}
"""Fewer experts where there are many: the interpreter takes its time."""


def placed(tensors: dict) -> dict:
    return {name: t.to(DEVICE) for name, t in tensors.items()}


def trained(name: str, kernels: str, steps: int = 2):
    """Losses of a few SGD steps, the gradients of the first, and logits before. (AdamW divides gradients by
    their size, so that of tensors without a real gradient it would compare rounding errors.)"""
    model, inputs = attached(name, **SIZES[name]).to(DEVICE), placed(batch(left=2, length=6))
    labels = answer_only(inputs["input_ids"], prompt=3)
    optimiser = torch.optim.SGD(list(trainable(model).values()), lr=1e-2)
    found, gradients = [], {}
    with backend.use(kernels):
        start = logits(model, **inputs)
        model.train()
        for step in range(steps):
            torch.manual_seed(5)  # dropout
            task, extra = losses(model, inputs, labels)
            optimiser.zero_grad()
            total = task + sum(extra.values())
            total.backward()
            if not step:
                gradients = {n: p.grad.clone() for n, p in trainable(model).items() if p.grad is not None}
            optimiser.step()
            found.append(total.item())
    return found, gradients, start


@pytest.mark.parametrize("name", MIXTURES)
def test_the_same_training_on_both_backends(name):
    (torch_losses, torch_gradients, torch_logits), (losses_, gradients, logits_) = (
        trained(name, "torch"),
        trained(name, "triton"),
    )
    for ours, theirs in zip(losses_, torch_losses, strict=True):
        assert abs(ours - theirs) <= 1e-5 * abs(theirs)
    assert gradients.keys() == torch_gradients.keys()
    whole = torch.stack([g.norm() for g in torch_gradients.values()]).norm()
    for tensor, gradient in gradients.items():
        difference = (gradient - torch_gradients[tensor]).norm()
        assert difference <= 2e-5 * torch_gradients[tensor].norm() + 3e-5 * whole, tensor
    assert_near("logits", logits_, torch_logits, 2e-5)


def test_the_kernels_run(monkeypatch):
    """The comparison above would pass if the torch backend ran twice."""
    from moabench.kernels.triton import lowrank, mix_ffn, route

    calls: set[str] = set()
    for module, name in (
        (lowrank, "shrink"),
        (lowrank, "expand_add_"),
        (lowrank, "outer"),
        (mix_ffn, "mix_ffn"),
        (route, "route"),
    ):
        original = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *a, original=original, name=name: calls.add(name) or original(*a)
        )
    trained("mixlora", "triton", steps=1)
    assert calls == {"shrink", "expand_add_", "outer", "mix_ffn", "route"}


def test_routing_is_the_same():
    model, inputs = (
        attached("moe_lora_topk", **SIZES["moe_lora_topk"]).to(DEVICE),
        placed(batch(left=2, length=6)),
    )
    with backend.use("torch"):
        want = methods.capture_routing(model, inputs)
    with backend.use("triton"):
        got = methods.capture_routing(model, inputs)
    assert got.keys() == want.keys()
    for site, routing in got.items():
        assert_near(site, routing.weights, want[site].weights, 1e-5)
        assert torch.equal(routing.chosen, want[site].chosen)
