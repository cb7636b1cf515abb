"""Loss-free balancing (moe_lora_bias.md): what moves the bias, what does not, and what it does.

Run: python -m pytest tests/methods/test_sigmoid_bias.py
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from tiny import assert_near, attached, base, batch, logits, losses, train

from moabench import methods
from moabench.methods import Router
from moabench.methods.routing import Routing
from moabench.methods.rule import Rule
from moabench.methods.tuner.moments import Moments

NAME = "moe_lora_bias"
SMALL = {"experts.n": 5, "experts.r": 2, "experts.targets": ["q", "down"], "router.speed": 0.25}


def biases(model) -> torch.Tensor:
    return torch.cat([site.tensors["load_bias"] for site in model.base_model.sites()]).clone()


def rows(*seeds: int) -> dict[str, torch.Tensor]:
    """The batches of several seeds as one."""
    found = [batch(left=2, seed=seed) for seed in seeds]
    return {key: torch.cat([inputs[key] for inputs in found]) for key in found[0]}


def step(model, passes: list[dict]) -> torch.Tensor:
    """The biases after one step of these passes."""
    moments = Moments(model.train())
    for inputs in passes:
        with methods.record(model) as recorder:
            model(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
        moments.passed(recorder.routing)
    moments.after_backward()
    moments.after_step()
    return biases(model)


def test_the_rule_by_hand():
    """b_i + speed sign(mean - load_i): of loads 5, 1, 3, 3 the first is too much, the second too little."""
    bias = torch.tensor([0.0, 0.5, -0.5, 0.0])
    rule = Rule.of_kind("balance_loads", "")(speed=0.25)
    rule.after_step([SimpleNamespace(tensors={"load_bias": bias})], [torch.tensor([5, 1, 3, 3])])
    assert bias.tolist() == [-0.25, 0.75, -0.5, 0.0]


def test_padding_is_no_load():
    chosen = torch.tensor([[True, False], [True, True], [False, True]])
    count = Rule.of_kind("balance_loads", "")().counts
    assert count(Routing(chosen.float(), chosen)).tolist() == [2, 2]
    assert count(Routing(chosen.float(), chosen, mask=torch.tensor([True, True, False]))).tolist() == [2, 1]


def test_once_a_step_however_the_batch_is_cut():
    """Accumulation and gradient checkpointing give the bias of the whole batch, bit for bit; each moved by
    the speed or not at all."""
    whole = step(attached(NAME, **SMALL), [rows(3, 4)])
    assert torch.equal(step(attached(NAME, **SMALL), [rows(3), rows(4)]), whole)
    model = attached(NAME, **SMALL)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert torch.equal(step(model, [rows(3), rows(4)]), whole)
    assert set(whole.abs().tolist()) <= {0.0, 0.25} and whole.count_nonzero()


def test_evaluation_and_passes_alone_move_nothing():
    model = attached(NAME, **SMALL)
    before = step(model, [rows(3)])
    moments = Moments(model.eval())
    methods.capture_routing(model, rows(4))
    logits(model, **rows(4))
    losses(model.train(), rows(4), rows(4)["input_ids"])
    moments.after_step()
    assert torch.equal(biases(model), before)


def test_the_bias_changes_the_selection_alone():
    router = Router.of_kind("sigmoid_bias", "")(k=2, route_scale=2.5)
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(60, 5, generator=generator).requires_grad_()
    none, some = torch.zeros(5), 0.3 * torch.randn(5, generator=generator)
    before, after = (router.route(scores, True, load_bias=b) for b in (none, some))
    same = (before.chosen == after.chosen).all(1)
    assert same.any() and not same.all()
    assert torch.equal(before.weights[same], after.weights[same])
    assert torch.equal(before.probs, after.probs) and torch.equal(before.logits, after.logits)
    for made in (before, after):
        kept = made.probs * made.chosen
        assert_near("weights", made.weights, 2.5 * kept / kept.sum(1, keepdim=True), 1e-6)


def test_one_expert_a_token_keeps_its_gate():
    """With k = 1 the normalised weight would be 1, and the router without a gradient."""
    scores = torch.randn(9, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    made = Router.of_kind("sigmoid_bias", "")(k=1).route(scores, True, load_bias=torch.zeros(5))
    assert_near("weights", made.weights.sum(1), scores.amax(1).sigmoid(), 1e-6)
    made.weights.sum().backward()
    assert scores.grad.count_nonzero() == 9


def test_loads_become_equal_on_a_stationary_input():
    generator = torch.Generator().manual_seed(0)
    tilt = torch.linspace(-1, 1, 8)
    scores = torch.randn(256, 8, generator=generator) + tilt
    router = Router.of_kind("sigmoid_bias", "")(k=2, speed=0.005)
    (rule,), site = router.rules, SimpleNamespace(tensors={"load_bias": torch.zeros(8)})

    def loads():
        return rule.counts(router.route(scores, True, **site.tensors))

    start = loads().double()
    assert start.std() / start.mean() > 0.5
    for _ in range(200):
        rule.after_step([site], [loads()])
    end = loads().double()
    assert end.std() / end.mean() < 0.05


@pytest.mark.parametrize("targets", [["q", "k", "v"], ["down"]], ids=str)
def test_the_bias_is_saved_with_the_adapter_and_is_no_parameter(targets, tmp_path):
    model = attached(NAME, **(SMALL | {"experts.targets": targets}))
    moved = step(model, [rows(3)])
    assert not [n for n, _ in model.named_parameters() if "load_bias" in n]
    train(model, steps=1)
    assert torch.equal(biases(model), moved), "an optimiser moved it"
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base(), tmp_path)
    assert torch.equal(biases(again), moved) and moved.count_nonzero()
