"""Rules against their loops (references/rules): what they do to the gradients and buffers of every method
that has some, once a step however many passes it has.

Run: python -m pytest tests/methods/test_rules.py
"""

from __future__ import annotations

from collections import defaultdict

import pytest
import references
import torch
from tiny import METHODS, answer_only, assert_near, attached, batch, given, losses, trainable

from moabench import methods
from moabench.methods.tuner.moments import Moments

RULED = [name for name, method in METHODS.items() if any(mixture.rules for mixture in method.mixtures)]


def accumulated(model, moments, passes: int) -> dict[str, list]:
    """Gradients of a step of several passes; by site, the selection of each real token."""
    chosen = defaultdict(list)
    for seed in range(3, 3 + passes):
        inputs = batch(left=2, right=1, seed=seed)
        with methods.record(model) as recorder:
            task = model(**given(model, inputs), labels=answer_only(inputs["input_ids"])).loss
        (task + sum(recorder.losses.values())).backward()
        moments.passed(recorder.routing)
        for site, routing in recorder.routing.items():
            chosen[site] += routing.selected[routing.mask].tolist()
    return chosen


def buffers(model) -> dict[str, torch.Tensor]:
    return {n: b.clone() for n, b in model.named_buffers() if "mixture" in n}


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("name", RULED)
def test_rules_against_loops(name, passes):
    model = attached(name, **references.of("methods", name).SIZES).train()
    moments = Moments(model)
    chosen = accumulated(model, moments, passes)
    sites = model.base_model.sites()

    want = {n: p.grad.clone() for n, p in trainable(model).items()}
    names = {id(p): n for n, p in model.named_parameters()}
    for site in sites:
        for rule in site.mixture.rules:
            reference = references.of("rules", rule.kind)
            for bank in site.banks if hasattr(reference, "after_backward") else ():
                for tensor, grad in reference.after_backward(rule, bank).items():
                    want[names[id(bank.tensors[tensor])]] = grad
    moments.after_backward()
    for n, p in trainable(model).items():
        assert_near(f"{n}.grad", p.grad, want[n], 1e-4)

    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    want, names = buffers(model), {id(b): n for n, b in model.named_buffers()}
    for site in sites:
        for rule in site.mixture.rules:
            reference = references.of("rules", rule.kind)
            if hasattr(reference, "after_step"):
                for tensor, value in reference.after_step(rule, site, chosen[site.name]).items():
                    want[names[id(site.tensors[tensor])]] = value
    moments.after_step()
    for n, b in buffers(model).items():
        assert_near(n, b, want[n], 1e-6)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("name", RULED)
def test_a_step_without_a_pass_moves_no_buffer(name):
    """What was counted for a step is forgotten after it."""
    model = attached(name, **references.of("methods", name).SIZES).train()
    moments = Moments(model)
    accumulated(model, moments, 1)
    moments.after_step()
    before = buffers(model)
    moments.after_step()
    assert all(torch.equal(b, before[n]) for n, b in buffers(model).items())


def test_methods_without_rules_are_left_alone():
    model = attached("molora").train()
    moments = Moments(model)
    losses(model, batch(), answer_only(batch()["input_ids"]))[0].backward()
    before = {n: p.grad.clone() for n, p in trainable(model).items()}
    moments.after_backward()
    moments.after_step()
    assert not moments.rules and all(torch.equal(p.grad, before[n]) for n, p in trainable(model).items())
