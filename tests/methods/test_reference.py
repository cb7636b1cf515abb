"""Logits, auxiliary losses and every gradient of whole tiny Llamas against fp64 loops written from the method
cards (references/).

The batch holds a left-padded and a right-padded sequence; the loops run each sequence alone. Models run in
fp32 and in fp64, and in training where a router decides otherwise there.

Run: python -m pytest tests/methods/test_reference.py
"""

from __future__ import annotations

import copy

import pytest
import references
import torch
from references.llama import LoopLlama
from tiny import METHODS, MIXTURES, ROUTED, assert_near, attached, base, batch, facts, trainable

from moabench import methods

CASES = [(name, case) for name in MIXTURES for case in references.of("methods", name).CASES]
PROMPTS = [3, 4]  # prompt tokens of each sequence


def ragged():
    """Two sequences of 7 columns with 5 and 6 real tokens, one padded on the left, one on the right."""
    inputs = batch(left=2, length=7)
    inputs["attention_mask"][1, -1] = 0
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    return inputs


def modes(name: str) -> list[bool]:
    """Training or not, where it makes a difference."""
    routers = [mixture.router for mixture in METHODS[name].mixtures]
    return [False, True] if any(r.reads_skills(True) != r.reads_skills(False) for r in routers) else [False]


def run_loop(plain, model, inputs, real) -> tuple[LoopLlama, list[torch.Tensor]]:
    loop = LoopLlama(plain, model)
    skills = facts(model, inputs).get("skill_ids", torch.zeros(len(real), dtype=torch.long)).tolist()
    return loop, loop(
        [ids[m].tolist() for ids, m in zip(inputs["input_ids"], real, strict=True)], PROMPTS, skills
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize(
    ("name", "overrides", "training"),
    [(*case, training) for case in CASES for training in modes(case[0])],
    ids=lambda c: (
        "-".join(f"{k.rpartition('.')[2]}={v}" for k, v in c.items()) if isinstance(c, dict) else str(c)
    ),
)
def test_model_against_loops(name, overrides, training, dtype):
    plain = base()
    model = attached(name, copy.deepcopy(plain).to(dtype), **overrides).train(training)
    inputs = ragged()
    real = inputs["attention_mask"].bool()
    prompt = (inputs["attention_mask"].cumsum(-1) <= torch.tensor(PROMPTS)[:, None]) & real
    loop, want = run_loop(plain, model, inputs, real)
    torch.manual_seed(4)
    cotangents = [torch.randn_like(w) for w in want]
    extra = loop.losses()
    (sum((w * c).sum() for w, c in zip(want, cotangents, strict=True)) + sum(extra.values())).backward()

    with methods.record(model) as recorder:
        out = model(**inputs, **facts(model, inputs), prompt_mask=prompt).logits
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


@pytest.mark.parametrize("name", ROUTED)
def test_recorded_routing_against_loops(name):
    """Weights, selection and mask of every site, in the order of the batch's tokens; padding is marked, never
    counted."""
    plain = base(num_hidden_layers=1)
    model = attached(name, copy.deepcopy(plain), **references.of("methods", name).CASES[0])
    inputs = ragged()
    real = inputs["attention_mask"].bool()
    prompt = (inputs["attention_mask"].cumsum(-1) <= torch.tensor(PROMPTS)[:, None]) & real
    loop, _ = run_loop(plain, model, inputs, real)
    routing = methods.capture_routing(model, {**inputs, **facts(model, inputs), "prompt_mask": prompt})
    assert routing.keys() == {site for site, choices in loop.routing.items() if choices}
    for site, found in routing.items():
        assert torch.equal(found.mask, real.flatten())
        weights = torch.stack([torch.stack(c.w) for c in loop.routing[site]])
        assert_near(f"{site}.weights", found.weights[found.mask], weights, 2e-5)
        assert found.selected[found.mask].tolist() == [c.chosen for c in loop.routing[site]]
