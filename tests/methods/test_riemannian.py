"""Riemannian MoE-LoRA (riemannian_moe_lora.md): what gate_grad=sqrt changes and what not, and the property
that defines the preconditioner.

Run: python -m pytest tests/methods/test_riemannian.py
"""

from __future__ import annotations

import pytest
import references
import torch
from tiny import assert_near, attached, base, batch, logits, losses, trainable

from moabench import methods
from moabench.methods.spec import ConfigError
from moabench.methods.tuner.moments import Moments

NAME = "riemannian_moe_lora"
SMALL = {"experts.n": 3, "experts.r": 2, "experts.alpha": 2, "experts.dropout": 0.0, "router.k": 2}


def made(**overrides):
    return attached(NAME, **(SMALL | overrides))


def test_the_value_is_that_of_the_plain_mixture():
    """Bit for bit where no gradient is asked for, and up to rounding in training."""
    models = [made(**{"experts.gate_grad": gate_grad}) for gate_grad in ("plain", "sqrt")]
    plain, scaled = (logits(model, **batch(left=2)) for model in models)
    assert torch.equal(plain, scaled)
    plain, scaled = (model.train()(**batch(left=2)).logits for model in models)
    assert_near("logits", scaled, plain, 1e-6)


@pytest.mark.parametrize("kind", ["lora", "lora_shared_a"])
def test_experts_learn_by_the_root_of_their_weight_and_the_router_as_ever(kind):
    """Of one token at one linear, so that every gradient of an expert has one weight."""
    grads = {}
    for gate_grad in ("plain", "sqrt"):
        overrides = {"experts.kind": kind, "experts.targets": ["down"], "rules": None}
        model = attached(
            NAME,
            base(num_hidden_layers=1),
            **(SMALL | overrides | {"experts.gate_grad": gate_grad}),
        )
        inputs = {"input_ids": torch.tensor([[11]])}
        (routing,) = methods.capture_routing(model, inputs).values()
        torch.manual_seed(0)
        out = model(**inputs).logits
        (out * torch.randn_like(out)).sum().backward()
        (site,) = model.base_model.sites()
        grads[gate_grad] = (site.tensors["weight"].grad, site.banks[0].B.grad.unflatten(1, (3, 2)))
    assert_near("router", grads["sqrt"][0], grads["plain"][0], 1e-5)
    assert grads["plain"][0].count_nonzero()
    for e, weight in enumerate(routing.weights[0]):
        plain, scaled = (grads[gate_grad][1][:, e] for gate_grad in ("plain", "sqrt"))
        if weight:
            assert_near(f"expert {e}", scaled, plain / weight.sqrt(), 1e-5)
        else:
            assert not scaled.count_nonzero() and not plain.count_nonzero()


def changes(model) -> dict[tuple, torch.Tensor]:
    """By site and expert, what an SGD step of rate 1 changes in B A to first order: G_B A + B G_A."""
    model.zero_grad()
    losses(model, batch(), batch()["input_ids"])[0].backward()
    Moments(model).after_backward()
    found = {}
    for site in model.base_model.sites():
        a, b, start = site.banks[0].A, site.banks[0].B, 0
        for e, r in enumerate(site.banks[0].part.ranks):
            own = slice(start, start + r)
            found[site.name, e] = (b.grad[:, own] @ a[own] + b[:, own] @ a.grad[own]).detach()
            start += r
    return found


@pytest.mark.parametrize("ranks", [2, [1, 3, 2]], ids=str)
@pytest.mark.parametrize("rule", [True, False], ids=["rule", "without"])
def test_the_step_does_not_depend_on_the_parametrisation(rule, ranks):
    """(A, B) and (M A, B M^-1) are one function, and step to one function, whatever M; without the rule they
    do not."""
    overrides = {"rules": {"riemannian": {"damping": 0.0}} if rule else None, "experts.r": ranks}
    model = made(**overrides)
    want, value = changes(model), logits(model, **batch())
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for site in model.base_model.sites():
            a, b, start = site.banks[0].A, site.banks[0].B, 0
            for r in site.banks[0].part.ranks:
                own = slice(start, start + r)
                m = torch.eye(r) * 2 + 0.5 * torch.randn(r, r, generator=generator)
                a[own], b[:, own] = m @ a[own], b[:, own] @ torch.linalg.inv(m)
                start += r
    assert_near("logits", logits(model, **batch()), value, 1e-4)
    got = changes(model)
    for key, change in want.items():
        if rule:
            assert_near(str(key), got[key], change, 5e-3)
        elif change.norm() > 1e-6:
            assert (got[key] - change).norm() > 0.2 * change.norm(), key


@pytest.mark.parametrize("options", [{"damping": 0.5}, {"damping": 0.1, "relative": True}], ids=str)
def test_damping(options):
    model = made(**{"rules": {"riemannian": options}})
    losses(model, batch(), batch()["input_ids"])[0].backward()
    sites = model.base_model.sites()
    want = [
        references.of("rules", "riemannian").after_backward(s.mixture.rules[0], s.banks[0]) for s in sites
    ]
    Moments(model).after_backward()
    for site, expected in zip(sites, want, strict=True):
        for tensor, grad in expected.items():
            assert_near(f"{site.name}.{tensor}", site.banks[0].tensors[tensor].grad, grad, 1e-5)


def test_routers_and_frozen_pairs_are_left_alone():
    model = made()
    sites = model.base_model.sites()
    for tensor in sites[0].banks[0].tensors.values():
        tensor.requires_grad_(False)
    losses(model, batch(), batch()["input_ids"])[0].backward()
    before = {n: p.grad.clone() for n, p in trainable(model).items()}
    Moments(model).after_backward()
    assert all(tensor.grad is None for tensor in sites[0].banks[0].tensors.values())
    for n, p in trainable(model).items():
        assert torch.equal(p.grad, before[n]) == ("router" in n), n


def test_experts_without_a_pair_of_their_own_are_refused():
    with pytest.raises(ConfigError, match="needs a pair A, B of its own"):
        made(**{"experts.kind": "lora_shared_a"})
