"""Auxiliary losses against loops over the recorded routing: padding, scope, reduction, form, coefficient,
accumulation.

Run: python -m pytest tests/methods/test_losses.py
"""

from __future__ import annotations

import pytest
import torch
from tiny import METHODS, answer_only, assert_near, attached, batch, trainable

from moabench import methods
from moabench.benchmarks.observing import load_measures
from moabench.benchmarks.observing.load import LoadCounts
from moabench.methods.loss import Loss
from moabench.methods.routing import Routing
from moabench.methods.spec import ConfigError


def routing_of(probs, chosen, mask=None, **extras):
    """A routing of one site, [T, 1, E] as the recorder stores it."""
    extras = {k: v.unsqueeze(1) for k, v in extras.items()}
    logits = probs.log().unsqueeze(1)
    return Routing(
        weights=probs.unsqueeze(1),
        chosen=chosen.unsqueeze(1),
        probs=probs.unsqueeze(1),
        logits=logits,
        mask=mask,
        extras=extras,
    )


def loop_balance(groups, experts) -> float:
    """E sum_i f_i P_i of each group of (chosen [E], values [E]) rows."""
    losses = []
    for rows in groups:
        total = 0.0
        for i in range(experts):
            total += (
                sum(float(c[i]) for c, _ in rows) / len(rows) * sum(float(v[i]) for _, v in rows) / len(rows)
            )
        losses.append(experts * total)
    return losses


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("values", ["probs", "shifted"])
@pytest.mark.parametrize("reduce", ["sum", "mean"])
@pytest.mark.parametrize("scope", ["site", "model"])
def test_switch_balance(scope, reduce, values, masked):
    torch.manual_seed(0)
    mask = torch.tensor([True, False, True, True, False, True, True]) if masked else None
    real = torch.ones(7, dtype=torch.bool) if mask is None else mask
    routings, groups = [], []
    for _ in range(3):
        probs, chosen = torch.randn(7, 4).softmax(-1), torch.rand(7, 4) > 0.4
        shifted = probs - 0.1
        routings.append(routing_of(probs, chosen, mask, tau=torch.full((7, 1), 0.1)))
        groups.append(
            [
                (c, v)
                for c, v, m in zip(chosen, probs if values == "probs" else shifted, real, strict=True)
                if m
            ]
        )
    if scope == "model":
        groups = [[row for rows in groups for row in rows]]
    want = loop_balance(groups, 4)
    want = 0.7 * (sum(want) if reduce == "sum" else sum(want) / len(want))
    got = Loss.parse(
        {"kind": "switch_balance", "coef": 0.7, "scope": scope, "reduce": reduce, "values": values}, ""
    )(routings)
    assert got.item() == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_balanced_routing_gives_k(k):
    """moe_lora_topk.md: with uniform p and equal shares L = k at each site."""
    tokens = torch.arange(8)
    chosen = torch.zeros(8, 4, dtype=torch.bool)
    for slot in range(k):
        chosen[tokens, (tokens + slot) % 4] = True
    routing = routing_of(torch.full((8, 4), 0.25), chosen)
    loss = Loss.parse({"kind": "switch_balance", "coef": 1.0}, "")
    assert loss([routing]).item() == pytest.approx(k)
    assert loss([routing] * 3).item() == pytest.approx(3 * k)


def test_gradient_of_the_balance_loss_goes_through_p_alone():
    torch.manual_seed(0)
    probs = torch.randn(6, 3).softmax(-1).requires_grad_()
    chosen = torch.rand(6, 3) > 0.5
    Loss.parse({"kind": "switch_balance", "coef": 1.0}, "")([routing_of(probs, chosen)]).backward()
    assert_near("probs.grad", probs.grad, (3 * chosen.float().mean(0) / 6).expand(6, 3), 1e-6)


@pytest.mark.parametrize("masked", [False, True])
def test_z_loss(masked):
    torch.manual_seed(0)
    mask = torch.tensor([True, False, True, True]) if masked else None
    routings = [routing_of(torch.rand(4, 3), torch.ones(4, 3, dtype=torch.bool), mask) for _ in range(2)]
    want = 0.0
    for r in routings:
        rows = [z for z, m in zip(r.logits[:, 0], [True] * 4 if mask is None else mask, strict=True) if m]
        want += sum(float(z.exp().sum().log()) ** 2 for z in rows) / len(rows)
    loss = lambda **options: Loss.parse({"kind": "z_loss", "coef": 0.5, **options}, "")(routings).item()  # noqa: E731
    assert loss() == pytest.approx(0.5 * want, rel=1e-5)
    assert loss(reduce="mean") == pytest.approx(0.25 * want, rel=1e-5)
    assert loss(scope="model") == pytest.approx(0.25 * want, rel=1e-5)


def drawn(tokens, experts=4, seed=0, padding=0):
    """A top-2 routing with gradient and `padding` tokens that do not count."""
    generator = torch.Generator().manual_seed(seed)
    probs = torch.randn(tokens, experts, generator=generator).softmax(-1)
    chosen = torch.zeros_like(probs, dtype=torch.bool).scatter(-1, probs.topk(2).indices, True)
    mask = (torch.arange(tokens) < tokens - padding) if padding else None
    return probs, chosen, mask


@pytest.mark.parametrize("kind", sorted(Loss.kinds()))
@pytest.mark.parametrize("scope", ["site", "model"])
def test_a_loss_does_not_depend_on_how_the_batch_is_cut(kind, scope):
    """Passes of 5, 1 and 9 tokens at two sites against the 13 real tokens at once: values and gradients. The
    mean over passes by themselves (batch=micro) is another number. A kind that can be `micro` alone says so
    where it is asked for more."""
    parts = [[drawn(5, seed=s), drawn(1, seed=s + 2), drawn(9, seed=s + 4, padding=2)] for s in (0, 1)]
    leaves = [[p.clone().requires_grad_() for p, _, _ in site] for site in parts]

    def routings(i):
        return [
            routing_of(leaf[i], chosen, mask, tau=torch.full((len(chosen), 1), 0.1))
            for leaf, (_, chosen, mask) in ((leaf, site[i]) for leaf, site in zip(leaves, parts, strict=True))
        ]

    def joined():
        found = []
        for leaf, site in zip(leaves, parts, strict=True):
            real = [torch.ones(len(c), dtype=torch.bool) if m is None else m for _, c, m in site]
            probs, chosen, mask = torch.cat(leaf), torch.cat([c for _, c, _ in site]), torch.cat(real)
            found.append(routing_of(probs, chosen, mask, tau=torch.full((len(mask), 1), 0.1)))
        return found

    loss = Loss.parse({"kind": kind, "coef": 0.7, "scope": scope}, "")
    if loss.batch == "micro":
        assert "batch=micro alone" in type(loss).__doc__
        with pytest.raises(ConfigError, match=r"losses\.x\.batch='global': expected one of micro"):
            Loss.parse({"kind": kind, "batch": "global"}, "losses.x")
        return
    flat = [p for leaf in leaves for p in leaf]
    want = loss(joined())
    gradients = torch.autograd.grad(want, flat)
    sums = [[loss.sums(r) for r in routings(i)] for i in range(3)]
    assert not any(s.requires_grad for found in sums for s in found)
    whole = [torch.stack(found).mean(0) for found in zip(*sums, strict=True)]
    got = sum(loss(routings(i), whole) for i in range(3)) / 3
    assert got.item() == pytest.approx(want.item(), rel=1e-5)
    for g, expected in zip(torch.autograd.grad(got, flat), gradients, strict=True):
        assert_near("gradient", g, expected, 1e-5)
    apart = sum(loss(routings(i)) for i in range(3)) / 3
    assert abs(apart.item() / want.item() - 1) > 0.01


def test_layers_collapsed_onto_different_experts_look_even_to_a_loss_over_the_model():
    """Four layers, each with every token on an expert of its own: scope=model gives 1, the value of uniform
    routing, scope=site 4. Load measures, by which a report judges, are taken by site."""
    routings = []
    for layer in range(4):
        probs = torch.nn.functional.one_hot(torch.full((16,), layer), 4).float()
        routings.append(routing_of(probs, probs.bool()))
    value = lambda scope: Loss.parse(  # noqa: E731
        {"kind": "switch_balance", "coef": 1.0, "scope": scope, "reduce": "mean"}, ""
    )(routings).item()
    assert value("model") == pytest.approx(1.0) and value("site") == pytest.approx(4.0)
    meter = LoadCounts()
    meter.update({f"layer{i}": r.at_site(0) for i, r in enumerate(routings)}, (1, 16))
    found = load_measures.measures(meter)
    assert found["load/max_vio_worst"] == found["load/max_vio"] == pytest.approx(3.0)
    assert found["load/effective_experts_worst"] == pytest.approx(1.0)


def test_uniform_is_not_the_least():
    """E 2, k 1: three tokens of four undecided and sent to the first, one sure of the second."""
    probs = torch.tensor([[0.5, 0.5]] * 3 + [[0.0, 1.0]])
    chosen = torch.tensor([[True, False]] * 3 + [[False, True]])
    loss = Loss.parse({"kind": "switch_balance", "coef": 1.0}, "")
    assert loss([routing_of(probs, chosen)]).item() == pytest.approx(0.875)


def test_coefficient_zero_is_left_out_and_negative_refused():
    for coef, kinds in ((0.0, set()), (0.1, {"switch_balance"})):
        model = attached("moe_lora_topk", **{"losses.switch_balance.coef": coef})
        with methods.record(model) as recorder:
            model(**batch())
        assert set(recorder.losses) == kinds
    with pytest.raises(ConfigError, match=r"coef=-0\.1"):
        methods.load("moe_lora_topk", losses={"switch_balance": {"coef": -0.1}})


@pytest.mark.parametrize(
    "name", [n for n, m in METHODS.items() if any("switch_balance" in x.losses for x in m.mixtures)]
)
def test_losses_of_a_model_do_not_count_padding(name):
    model = attached(name, **{"losses.switch_balance.coef": 0.5})

    def value(inputs):
        with torch.no_grad(), methods.record(model) as recorder:
            model(**inputs)
        return recorder.losses["switch_balance"].item()

    inputs = batch()
    pad = torch.zeros(2, 3, dtype=torch.long)
    for side in (0, 1):
        join = lambda real, filler: torch.cat([filler, real] if side == 0 else [real, filler], 1)  # noqa: B023, E731
        mask = join(inputs["attention_mask"], pad)
        padded = {
            "input_ids": join(inputs["input_ids"], pad),
            "attention_mask": mask,
            "position_ids": (mask.cumsum(-1) - 1).clamp(min=0),
        }
        assert value(padded) == pytest.approx(value(inputs), rel=1e-5)


def test_two_passes_in_one_record_share_one_loss():
    """A loss over two passes is that of their tokens together or of each, never silently doubled for one
    pass."""
    model = attached("adamole", **{"losses.switch_balance.coef": 0.5})
    with methods.record(model) as one:
        model(**batch())
    with methods.record(model) as again:
        model(**batch())
    assert torch.equal(one.losses["switch_balance"], again.losses["switch_balance"])
    assert torch.equal(one.losses["switch_balance"], one.losses["switch_balance"]), (
        "reading losses changes nothing"
    )


@pytest.mark.parametrize("name", ["adamole", "mixlora"])
def test_gradient_of_losses_reaches_routers_and_what_feeds_them(name):
    model = attached(name, **{"losses.switch_balance.coef": 0.5, "experts.dropout": 0.0})
    inputs = batch(left=2)
    with methods.record(model) as recorder:
        model(**inputs, labels=answer_only(inputs["input_ids"]))
    recorder.losses["switch_balance"].backward()
    routers = [p.grad for n, p in trainable(model).items() if "router" in n]
    assert routers and all(g is not None and g.isfinite().all() and g.norm() > 0 for g in routers)


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
