"""Routers that are no linear map of the token, on linears of their own: MoLoRA's experts under MoA's gates,
against loops in fp64.

Run: python -m pytest tests/methods/test_linear_gates.py
"""

from __future__ import annotations

import pytest
import torch
from tiny import attached, batch

from moabench import methods
from moabench.methods.spec import ConfigError


def gates(router, p, x):
    """sigmoid(R(x)) of one token, arXiv 2506.05928."""
    p = {name: tensor.double() for name, tensor in p.items()}
    if router.net == "linear":
        return torch.sigmoid(p["weight"] @ x + p["bias"])
    first, third = p["w1"] @ x + p["b1"], p["w3"] @ x + p["b3"]
    return torch.sigmoid(p["w2"] @ (first * torch.sigmoid(first) * third) + p["b2"])


@pytest.mark.parametrize("net", ["linear", "swiglu"])
@pytest.mark.parametrize("kind", ["sigmoid", "threshold"])
def test_gates_on_a_linear(kind, net):
    model = attached(
        "molora", router={"kind": kind, "net": net}, experts={"n": 3, "r": 2, "targets": ["q", "down"]}
    )
    inputs = batch(right=2)
    met = {}
    sites = {site.name: site for site in model.base_model.sites()}
    assert len(sites) == 4
    for name, site in sites.items():
        site.module.register_forward_hook(
            lambda m, args, out, name=name: met.update({name: (args[0].detach(), out.detach())})
        )
    routing = methods.capture_routing(model, inputs)
    for name, site in sites.items():
        x, y = (t.flatten(0, 1).double() for t in met[name])
        bank, weights = site.banks[0], routing[name].weights.double()
        a, b = bank.A.detach().double().view(3, 2, -1), bank.B.detach().double().view(-1, 3, 2)
        frozen = site.module.base_layer.weight.detach().double()
        for t in range(len(x)):
            if not inputs["attention_mask"].flatten()[t]:
                continue
            if kind == "sigmoid":
                torch.testing.assert_close(
                    weights[t], gates(site.router, site.tensors, x[t]).detach(), rtol=1e-5, atol=1e-6
                )
            expected = frozen @ x[t]
            for e in range(3):
                expected = expected + weights[t, e] * 8 / 2 * (b[:, e] @ (a[e] @ x[t]))
            torch.testing.assert_close(y[t], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "losses", "message"),
    [
        (
            "molora",
            {"switch_balance": {"coef": 0.1, "values": "shifted"}},
            "reads tau, which router.kind=softmax does not have",
        ),
        ("molora_oracle", {"z_loss": {"coef": 0.1}}, "reads logits, which router.kind=oracle does not have"),
    ],
)
def test_a_loss_that_the_router_cannot_feed(name, losses, message):
    with pytest.raises(ConfigError, match=message):
        attached(name, losses=losses)
