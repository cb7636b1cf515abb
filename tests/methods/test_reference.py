"""Logits, auxiliary losses and every gradient of whole tiny Llamas against fp64 loops written from the method
cards (loop_llama.py).

The batch holds a left-padded and a right-padded sequence; the loops run each sequence alone. Models run in
fp32 and in fp64.

Run: python -m pytest tests/methods/test_reference.py
"""

from __future__ import annotations

import copy

import pytest
import torch
from loop_llama import LoopLlama, switch_balance, z_loss
from tiny import assert_near, attached, base, batch, trainable

from moabench import methods

SMALL_BLOCK = {
    "experts.r": 2,
    "experts.alpha": 3,
    "experts.prompt.length": 3,
    "experts.parallel_adapter.bottleneck": 5,
}
NO_PROMPT = {k: v for k, v in SMALL_BLOCK.items() if "prompt" not in k}
HOMOGENEOUS = {"experts.n": 3, "experts.r": 2, "experts.alpha": 3}
MIXLORA = {
    "experts.n": 3,
    "experts.r": 2,
    "experts.alpha": 3,
    "experts.dropout": 0.0,
    "losses.switch_balance.coef": 0.3,
}
CASES = [
    ("molora", HOMOGENEOUS),
    ("molora", {**HOMOGENEOUS, "experts.r": [1, 4, 2], "router.bias": True}),
    (
        "molora",
        {
            **HOMOGENEOUS,
            "experts.rslora": True,
            "experts.targets": ["q", "k", "v", "o", "gate", "up", "down"],
        },
    ),
    (
        "molora",
        {**HOMOGENEOUS, "experts.targets": ["q", "v", "down"], "experts.r": [2, 4, 8], "router.kind": "none"},
    ),
    ("moe_lora_topk", {**HOMOGENEOUS, "router.k": 2, "losses.switch_balance.coef": 0.3}),
    (
        "moe_lora_topk",
        {**HOMOGENEOUS, "router.k": 1, "router.renormalize": False, "experts.targets": ["k", "gate"]},
    ),
    ("moe_lora_topk", {**HOMOGENEOUS, "router.k": 3, "losses.z_loss.coef": 0.2}),
    ("hydralora", HOMOGENEOUS),
    ("adamole", {**HOMOGENEOUS, "losses.switch_balance.coef": 0.3}),
    (
        "adamole",
        {
            **HOMOGENEOUS,
            "router.bias": False,
            "losses.switch_balance": {"coef": 0.3, "values": "shifted", "reduce": "mean"},
        },
    ),
    ("mixlora", {**MIXLORA, "router.k": 2}),
    (
        "mixlora",
        {**MIXLORA, "router.k": 1, "router.renormalize": False, "losses.switch_balance.scope": "site"},
    ),
    ("mixlora_dynamic", {**MIXLORA, "router.p": 0.7}),
    ("mixlora_dynamic", {**MIXLORA, "router.p": 0.7, "router.renormalize": False}),
    ("moa_soft", SMALL_BLOCK),
    (
        "moa_soft",
        {
            **SMALL_BLOCK,
            "input": "raw",
            "router.net": "linear",
            "experts.lora.targets": ["v", "o", "up", "gate", "down"],
        },
    ),
    *(
        ("moa_sparse", {**NO_PROMPT, "router.grad": g, "input": i, "router.gamma_max": 0.9})
        for g in ("none", "subtract", "ste")
        for i in ("normed", "raw")
    ),
    ("moa_sparse", {**NO_PROMPT, "router.dynamic": False, "router.gamma_max": 0.5, "router.net": "linear"}),
    ("moa_instance", SMALL_BLOCK),
    ("moa_instance", {**SMALL_BLOCK, "input": "normed", "router.pool": "last_prompt"}),
    ("unipeft", SMALL_BLOCK),
    ("unipeft", {**SMALL_BLOCK, "gates": {"lora": "lora", "prompt": "prompt", "parallel_adapter": "prompt"}}),
    ("naive_sum", SMALL_BLOCK),
]
PROMPTS = [3, 4]  # prompt tokens of each sequence


def ragged():
    """Two sequences of 7 columns with 5 and 6 real tokens, one padded on the left, one on the right."""
    inputs = batch(left=2, length=7)
    inputs["attention_mask"][1, -1] = 0
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    return inputs


def expected_losses(model, loop) -> dict[str, torch.Tensor]:
    """Auxiliary losses from the loop's choices, with the options of the spec."""
    spec = model.base_model.peft_config["default"].spec
    total = {}
    for kind, options in (spec.get("losses") or {}).items():
        if options["coef"]:
            form = {k: v for k, v in options.items() if k != "coef"}
            total[kind] = options["coef"] * (
                switch_balance(loop.routing, **form) if kind == "switch_balance" else z_loss(loop.routing)
            )
    return total


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize(
    ("name", "overrides"),
    CASES,
    ids=lambda c: c if isinstance(c, str) else "-".join(f"{k.rpartition('.')[2]}={v}" for k, v in c.items()),
)
def test_model_against_loops(name, overrides, dtype):
    plain = base()
    model = attached(name, copy.deepcopy(plain).to(dtype), **overrides)
    inputs = ragged()
    real = inputs["attention_mask"].bool()
    prompt = (inputs["attention_mask"].cumsum(-1) <= torch.tensor(PROMPTS)[:, None]) & real
    loop = LoopLlama(plain, model)
    want = loop([ids[m].tolist() for ids, m in zip(inputs["input_ids"], real, strict=True)], PROMPTS)
    torch.manual_seed(4)
    cotangents = [torch.randn_like(w) for w in want]
    extra = expected_losses(model, loop)
    (sum((w * c).sum() for w, c in zip(want, cotangents, strict=True)) + sum(extra.values())).backward()

    with methods.record(model) as recorder:
        out = model(**inputs, prompt_mask=prompt).logits
    got = [row[m] for row, m in zip(out, real, strict=True)]
    (
        sum((g * c).sum() for g, c in zip(got, cotangents, strict=True)) + sum(recorder.losses.values())
    ).backward()
    for b, (g, w) in enumerate(zip(got, want, strict=True)):
        assert_near(f"logits of sequence {b}", g, w, 1e-5)
    assert recorder.losses.keys() == extra.keys()
    for kind, value in extra.items():
        assert_near(kind, recorder.losses[kind], value, 1e-5)
    for n, p in trainable(model).items():
        reference = loop.parameters[n].grad
        assert_near(
            f"{n}.grad",
            p.grad,
            torch.zeros_like(loop.parameters[n]) if reference is None else reference,
            2e-4,
        )


def test_recorded_routing_against_loops():
    """Weights, selection and mask of every site, in the order of the batch's tokens; padding is marked, never
    counted."""
    plain = base()
    model = attached("adamole", copy.deepcopy(plain), **HOMOGENEOUS)
    inputs = ragged()
    real = inputs["attention_mask"].bool()
    loop = LoopLlama(plain, model)
    loop([ids[m].tolist() for ids, m in zip(inputs["input_ids"], real, strict=True)], PROMPTS)
    routing = methods.capture_routing(model, inputs)
    assert routing.keys() == loop.routing.keys()
    for site, choices in loop.routing.items():
        found = routing[site]
        assert torch.equal(found.mask, real.flatten())
        assert_near(
            f"{site}.weights",
            found.weights[found.mask],
            torch.stack([torch.stack(c.w) for c in choices]),
            2e-5,
        )
        assert found.selected[found.mask].tolist() == [c.chosen for c in choices]
