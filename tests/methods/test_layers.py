"""Options by layer: the same mixture in every decoder layer, with experts of other sizes or numbers in some.

Run: python -m pytest tests/methods/test_layers.py
"""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from tiny import attached as attach
from tiny import base, batch

from moabench import methods
from moabench.methods import catalog
from moabench.methods.losses.switch_balance import SwitchBalance
from moabench.methods.routing import Routing
from moabench.methods.spec import ConfigError


def attached(name: str, layers: dict, model=None, **overrides):
    return attach(name, base(num_hidden_layers=4) if model is None else model, layers=layers, **overrides)


def test_a_smaller_expert_is_a_larger_one_without_its_last_rank_row():
    """molora with rank 2, and 3 in layers 1 and 3, computes what rank 3 everywhere does where the third row's
    B is 0 in layers 0 and 2."""
    mixed = attached(
        "molora", {"1, 3": {"experts": {"r": 3, "alpha": 3}}}, experts={"n": 3, "r": 2, "alpha": 2}
    )
    whole = attach("molora", base(num_hidden_layers=4), experts={"n": 3, "r": 3, "alpha": 3})
    small, large = dict(mixed.named_parameters()), dict(whole.named_parameters())
    assert small.keys() == large.keys()
    with torch.no_grad():
        for name, tensor in small.items():
            if tensor.shape == large[name].shape:
                large[name].copy_(tensor)
            elif name.endswith("A"):
                large[name].unflatten(0, (3, 3))[:, :2] = tensor.unflatten(0, (3, 2))
            else:
                large[name].zero_().unflatten(1, (3, 3))[..., :2] = tensor.unflatten(1, (3, 2))
    assert (
        sum(t.shape != large[n].shape for n, t in small.items()) == 2 * 5 * 2
    )  # A and B of five linears in two layers
    inputs = batch()
    ours, theirs = mixed(**inputs), whole(**inputs)
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-5, atol=1e-5)
    cotangent = torch.randn_like(ours.logits)
    ((ours.logits + theirs.logits) * cotangent).sum().backward()
    for name, tensor in small.items():
        grad = large[name].grad
        if tensor.requires_grad and tensor.shape != large[name].shape:
            grad = (
                grad.unflatten(0, (3, 3))[:, :2] if name.endswith("A") else grad.unflatten(1, (3, 3))[..., :2]
            ).reshape(tensor.shape)
        if tensor.requires_grad:
            torch.testing.assert_close(tensor.grad, grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "layers", "counts"),
    [
        ("moe_lora_topk", {"0-1": {"experts": {"n": 3}}}, [3, 3, 8, 8]),
        ("molora", {"0": {"experts": {"n": 2}}, "3": {"experts": {"n": 4, "r": 2}}}, [2, 8, 8, 4]),
    ],
)
def test_layers_may_have_other_numbers_of_experts(name, layers, counts, tmp_path):
    model, inputs = attached(name, layers), batch()
    routing = methods.capture_routing(model, inputs)
    found = {int(site.split(".")[2]): r.weights.shape[-1] for site, r in routing.items()}
    assert [found[i] for i in range(4)] == counts
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base(num_hidden_layers=4), tmp_path)
    torch.testing.assert_close(again(**inputs).logits, model(**inputs).logits)


def test_balance_over_routers_with_other_numbers_of_experts_is_the_sum_of_theirs():
    torch.manual_seed(0)

    def routing(experts: int) -> Routing:
        probs = torch.rand(7, 2, experts).softmax(-1)
        return Routing(weights=probs, probs=probs, logits=probs, chosen=probs > 0.2)

    loss, few, many = SwitchBalance(coef=0.5), routing(3), routing(5)
    torch.testing.assert_close(loss([few, many]), loss([few]) + loss([many]))


def test_pefts_own_lora_has_ranks_by_layer():
    model = attached("lora", {"1-2": {"experts": {"r": 5, "alpha": 5}}}, experts={"r": 3, "alpha": 3})
    ranks = {int(n.split(".")[4]): t.shape[0] for n, t in model.named_parameters() if "lora_A" in n}
    assert ranks == {0: 3, 1: 5, 2: 5, 3: 3}
    scales = {m.scaling["default"] for m in model.modules() if hasattr(m, "lora_A")}
    assert scales == {1.0}


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"4": {"experts": {"r": 2}}}, "layer 4 is named, but this model's are 0 to 3"),
        ({"first": {}}, "'first' names no layers"),
        ({"3-1": {}}, "'3-1' names no layers"),
        ({"0-1": {"experts": {"r": 2}}, "1": {"experts": {"r": 3}}}, "layer 1 was named before"),
        (
            {"0": {"experts": {"rr": 2}}},
            "unknown key 'method.layers.0.experts.rr' (value 2). Did you mean 'r'?",
        ),
        ({"0": {"router": {"kind": "topk"}}}, "expected options of 'experts'"),
        ({"0": {"experts": {"targets": ["q"]}}}, "expected the same banks, targets and routers"),
    ],
)
def test_what_cannot_differ_is_refused(layers, message):
    with pytest.raises(ConfigError) as caught:
        catalog.parse(catalog.override(catalog.raw("molora"), {"layers": layers}))
        attached("molora", layers)
    assert message in str(caught.value)


def test_a_loss_over_all_routers_needs_equal_numbers_of_experts():
    with pytest.raises(ConfigError, match="as many experts as elsewhere"):
        catalog.parse(catalog.override(catalog.raw("mixlora"), {"layers": {"0": {"experts": {"n": 4}}}}))
