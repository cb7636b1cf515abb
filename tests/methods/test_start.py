"""How far from the base each method starts, and what its tensors are drawn from.

Run: python -m pytest tests/methods/test_start.py
"""

from __future__ import annotations

import pytest
import references
import torch
from tiny import assert_near, attached, base, batch, logits

from moabench.methods import catalog


@pytest.mark.parametrize("name", catalog.names())
def test_step_zero_equals_the_base(name):
    inputs = batch(left=2)
    real = inputs["attention_mask"].bool()
    want = logits(base(), **inputs)[real]
    got = logits(attached(name, trained=False), **inputs)[real]
    bound = references.of("methods", name).START
    if bound is None:
        assert torch.equal(got, want)
    else:
        assert_near("logits", got, want, bound)


def test_top_p_with_raw_weights_shrinks_the_frozen_block():
    """mixlora.md: the weights sum to less than 1, so the model does not start at its base."""
    inputs = batch()
    got = logits(attached("mixlora_dynamic", trained=False, **{"router.renormalize": False}), **inputs)
    change = (got - logits(base(), **inputs)).norm() / logits(base(), **inputs).norm()
    assert change > 1e-3


def test_initial_distributions():
    """A, routers and biases like torch.nn.Linear; B, gamma and SwiGLU biases 0; the adapter Xavier with gain
    1e-4; the prompt N(0, 1); MixLoRA's router N(0, 0.02^2)."""
    soft = attached("moa_soft", trained=False).base_model.sites()[0]
    banks = {(b.name, b.place): b.tensors for b in soft.banks}
    adapter = 1e-4 * (6 / (32 + 16)) ** 0.5
    uniform = {
        "A of q": (banks["lora", "q"]["A"], 32**-0.5),
        "A of down": (banks["lora", "down"]["A"], 48**-0.5),
        "D": (banks["parallel_adapter", "ffn"]["down"], adapter),
        "U": (banks["parallel_adapter", "ffn"]["up"], adapter),
        "W1": (soft.tensors["w1"], 32**-0.5),
        "W2": (soft.tensors["w2"], 28**-0.5),
        "W of MoLoRA": (attached("molora", trained=False).base_model.sites()[0].tensors["weight"], 32**-0.5),
    }
    for name, (tensor, bound) in uniform.items():
        assert 0.9 * bound < tensor.abs().max() <= bound, name
        assert tensor.std().item() == pytest.approx(bound / 3**0.5, rel=0.15), name
    prompt, mix = banks["prompt", "attention"], attached("mixlora", trained=False).base_model.sites()[0]
    assert prompt["embedding"].std().item() == pytest.approx(1.0, rel=0.15)
    assert mix.tensors["weight"].std().item() == pytest.approx(0.02, rel=0.15)
    drawn = {"A", "down", "up", "embedding", "w1", "w2", "w3"}
    tensors = [*soft.tensors.items(), *((n, t) for b in banks.values() for n, t in b.items())]
    assert not any(t.count_nonzero() for n, t in tensors if n not in drawn) and all(
        t.count_nonzero() for n, t in tensors if n in drawn
    )


def test_tensors_are_drawn_from_the_global_generator():
    """The seed set before attaching decides, and two tensors never share a draw."""
    first, again = attached("molora", trained=False), attached("molora", trained=False)
    draws = [b.A for model in (first, again) for s in model.base_model.sites() for b in s.banks]
    half = len(draws) // 2
    assert all(torch.equal(a, b) for a, b in zip(draws[:half], draws[half:], strict=True))
    assert not any(
        a.shape == b.shape and torch.equal(a, b) for i, a in enumerate(draws[:half]) for b in draws[:i]
    )
