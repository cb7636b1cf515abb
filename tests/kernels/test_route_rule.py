"""Routers as rules: the Triton kernels of every rule, and the router's own `route()` in single precision,
against `route()` in fp64, values and gradients.

Run: python -m pytest tests/kernels/test_route_rule.py   (Triton in its interpreter where there is no GPU)
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import references
import torch
from compare import assert_near
from torch.utils.checkpoint import checkpoint

from moabench.kernels import backend, route
from moabench.methods import Router
from moabench.methods.router import decide

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = [
    "torch",
    pytest.param(
        "triton", marks=pytest.mark.skipif(not backend.installed(), reason="Triton is not installed")
    ),
]
KINDS = sorted(kind for kind in Router.kinds() if references.of("routers", kind).RULE)
ROUTERS = list(  # options that make a rule of their own
    {
        Router.of_kind(kind, "router")(**options).rule: (kind, options)
        for kind in KINDS
        for options in reversed(references.of("routers", kind).VARIANTS)
    }.values()
)
SHAPES = [  # tokens, sites, experts
    (1, 1, 1),  # one token, one expert
    (130, 1, 8),  # one more tile than whole ones
    (5, 3, 7),  # prime E, sites side by side
    (3, 2, 64),
    (2, 1, 200),
]
TENSORS = ("weights", "probs", "tau", "z-loss")


def make(kind, options, experts=8):
    """The router, fitted to few experts."""
    router = Router.of_kind(kind, "router")(**options)
    return replace(router, k=min(router.k, experts)) if hasattr(router, "k") else router


def scores_for(router, tokens, sites, experts, dtype=torch.float64):
    """Scores [T, G, H] as a view of a wider product's output, as they come from the shrink."""
    heads = experts + router.rule.adaptive
    wide = torch.randn(tokens, 3 + sites * heads + 2, dtype=torch.float64).to(DEVICE, dtype)
    return wide[:, 3 : 3 + sites * heads].view(tokens, sites, heads).detach().requires_grad_()


def outputs(routing):
    """What losses read: weights, probabilities, threshold, and the z-loss of the logits."""
    return [routing.weights, routing.probs, routing.extras.get("tau"), routing.logits.logsumexp(-1).square()]


def gradient(routing, scores, cotangents):
    pairs = [
        (o, c.to(o.dtype))
        for o, c in zip(outputs(routing), cotangents, strict=True)
        if o is not None and o.requires_grad
    ]
    return torch.autograd.grad([o for o, _ in pairs], scores, [c for _, c in pairs])[0]


def cotangents_of(routing):
    return [None if o is None else torch.randn_like(o) for o in outputs(routing)]


def ruled(router, scores, name):
    """The decision by the router's own form, or by the kernel of its rule."""
    with backend.use(name):
        return decide(router, scores, True)


def compare(router, shape, name):
    scores = scores_for(router, *shape)
    want = router.route(scores, True)
    low = scores.detach().float().requires_grad_()
    got = ruled(router, low, name)
    for tensor, g, w in zip(TENSORS, outputs(got), outputs(want), strict=True):
        assert (g is None) == (w is None), tensor
        if w is not None:
            assert_near(tensor, g, w, 1e-6)
    assert torch.equal(got.selected, want.selected) and got.soft == want.soft
    if want.ids is not None:
        assert torch.equal(got.ids, want.ids)
    cotangents = cotangents_of(want)
    assert_near("scores.grad", gradient(got, low, cotangents), gradient(want, scores, cotangents), 1e-5)
    alone = torch.randn_like(want.weights)  # of the weights alone: nothing else is formed
    if want.weights.requires_grad:
        expected = torch.autograd.grad(
            router.route(scores, True).weights, scores, alone, materialize_grads=True, allow_unused=True
        )[0]
        grad = torch.autograd.grad(ruled(router, low, name).weights, low, alone.float())[0]
        assert (grad.double() - expected).abs().max() <= 5e-5 * max(1.0, expected.abs().max())


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize(("kind", "options"), ROUTERS, ids=str)
def test_every_option(kind, options, name):
    torch.manual_seed(0)
    compare(make(kind, options), (17, 2, 8), name)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_shapes(kind, shape, name):
    torch.manual_seed(1)
    if shape[2] == 1 and kind == "adaptive_threshold":  # p = 1, far from tau
        compare(make(kind, {"tau_max": 0.4}), shape, name)
    else:
        compare(make(kind, {}, shape[2]), shape, name)


@pytest.mark.parametrize("kind", sorted(Router.kinds()))
def test_every_router_has_a_rule_or_says_that_it_has_none(kind):
    """In its reference (tests/methods/references/routers)."""
    rule = Router.of_kind(kind, "router")().rule
    assert isinstance(rule, route.Rule) == references.of("routers", kind).RULE


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_rows_without_sites(kind, name):
    """A decision for scores [T, H], as a block's router makes it."""
    torch.manual_seed(2)
    router = make(kind, {})
    scores = scores_for(router, 21, 1, 8, torch.float32)[:, 0]
    want, got = router.route(scores, False), ruled(router, scores, name)
    assert got.weights.shape == (21, 8) and set(got.extras) == set(want.extras)
    assert_near("weights", got.weights, want.weights, 1e-6)
    assert torch.equal(got.selected, want.selected)


@pytest.mark.parametrize("name", BACKENDS)
def test_equal_scores_go_to_the_lower_index(name):
    scores = torch.tensor([[[1.0, 3.0, 3.0, 0.0, 3.0]], [[0.0] * 5]], device=DEVICE)
    two = ruled(make("topk", {"k": 2}), scores, name)
    assert two.ids[:, 0].tolist() == [[1, 2], [0, 1]]
    assert two.weights[:, 0].tolist() == [[0, 0.5, 0.5, 0, 0], [0.5, 0.5, 0, 0, 0]]
    prefix = ruled(make("top_p", {"p": 0.5}), scores, name)
    assert prefix.selected[:, 0].tolist() == [
        [False, True, True, False, False],
        [True, True, True, False, False],
    ]


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize(("kind", "options"), ROUTERS, ids=str)
def test_extremes(kind, options, name):
    """Huge scores and ruled-out experts (-inf) give finite results; NaN shows and selects nothing outside the
    experts."""
    router = make(kind, options)
    columns = 8 + router.rule.adaptive
    torch.manual_seed(4)
    hot = torch.randn(6, 1, columns, device=DEVICE)
    hot[:, :, :5] = -float("inf")
    for s in (
        torch.randn(6, 1, columns, device=DEVICE) * 1e4,
        torch.zeros(4, 1, columns, device=DEVICE),
        hot,
    ):
        s = s.requires_grad_()
        got, want = ruled(router, s, name), router.route(s.detach(), False)
        assert_near("weights", got.weights.sum(-1), want.weights.sum(-1), 1e-6)
        assert got.weights.isfinite().all() and got.probs.isfinite().all()
        grad = torch.autograd.grad(got.weights.square().sum() + got.probs.square().sum(), s)[0]
        assert grad.isfinite().all()
    nan = torch.full((2, 1, columns), float("nan"), device=DEVICE)
    lost = ruled(router, nan, name)
    assert lost.weights.isnan().all()
    if lost.ids is not None:
        assert ((lost.ids >= 0) & (lost.ids < 8)).all()


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_no_token(kind, name):
    router = make(kind, {})
    scores = scores_for(router, 0, 2, 8, torch.float32)
    got = ruled(router, scores, name)
    assert got.weights.shape == (0, 2, 8)
    assert torch.autograd.grad(got.weights.sum(), scores)[0].shape == scores.shape


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_permuted_and_repeated(kind, name):
    """Experts in another order give the weights in that order; two runs are bitwise equal."""
    torch.manual_seed(5)
    router = make(kind, {})
    scores = scores_for(router, 33, 1, 7, torch.float32).detach()
    order = torch.randperm(7, device=DEVICE)
    got = ruled(router, torch.cat([scores[..., order], scores[..., 7:]], -1), name)
    want = ruled(router, scores, name)
    assert_near("weights", got.weights, want.weights[..., order], 1e-6)
    again = ruled(router, scores, name)
    assert torch.equal(again.weights, want.weights)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize(
    ("kind", "options"),
    [("topk", {"k": 2}), ("adaptive_threshold", {}), ("threshold", {"grad": "ste"})],
    ids=str,
)
def test_compiled_and_checkpointed(kind, options, name):
    torch.manual_seed(6)
    router = make(kind, options)
    scores = scores_for(router, 9, 2, 8, torch.float32)
    cotangent = torch.randn(9, 2, 8, device=DEVICE)

    def form(s):
        routing = decide(router, s, True)
        return routing.weights * (1 + routing.probs), routing.selected.sum(0)

    def run(f):
        value, counts = f(scores)
        return value, counts, torch.autograd.grad(value, scores, cotangent)[0]

    with backend.use(name):
        want = run(form)
        compiled = run(torch.compile(form, backend="aot_eager", fullgraph=True))
        recomputed = run(lambda s: checkpoint(form, s, use_reentrant=False))
    for tensor, w, c, r in zip(
        ("value", "assignments", "scores.grad"), want, compiled, recomputed, strict=True
    ):
        assert_near(tensor, c, w, 1e-6)
        assert torch.equal(r, w), tensor


@pytest.mark.skipif(not backend.installed(), reason="Triton is not installed")
@pytest.mark.parametrize("select", ["all", "top_k", "top_p", "threshold"])
def test_registrations(select):
    """Schema and fake implementations, as torch checks them."""
    from moabench.kernels.triton import route as kernels

    torch.manual_seed(7)
    scores, adaptive = torch.randn(9, 2, 6, device=DEVICE), select == "threshold"
    forward = (
        scores,
        "softmax",
        select,
        2,
        0.5,
        0.3,
        adaptive,
        adaptive,
        True,
    )
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(kernels.route, forward, test_utils=checks)
    weights, probs, taus, chosen, _ = kernels.route(*forward)
    kept = weights if select == "all" else probs
    backward = (
        torch.randn_like(weights),
        None,
        None,
        kept,
        chosen,
        taus,
        "softmax",
        select,
        0.3,
        adaptive,
        adaptive,
        True,
        False,
        0.0,
    )
    torch.library.opcheck(kernels.route_backward, backward, test_utils=checks)
