"""Routers as rules: the Triton kernels and the plain form of every rule against the router's own `route()` in
fp64, values and gradients; the load statistics against loops.

Run: python -m pytest tests/kernels/test_route_rule.py   (Triton in its interpreter where there is no GPU)
"""

from __future__ import annotations

import math

import pytest
import torch
from compare import assert_near
from torch.utils.checkpoint import checkpoint

from moabench.kernels import backend, route
from moabench.methods import Router, catalog
from moabench.methods.recorder import Recorder
from moabench.methods.router import FactRouter, decide
from moabench.methods.routing import Routing

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = [
    "torch",
    pytest.param(
        "triton", marks=pytest.mark.skipif(not backend.installed(), reason="Triton is not installed")
    ),
]
ROUTERS = [
    ("softmax", {}),
    *(("topk", {"k": k, "renormalize": r}) for k in (1, 2, 5) for r in (True, False)),
    *(
        ("top_p", {"p": p, "renormalize": r})
        for p, r in ((0.6, True), (0.6, False), (0.05, True), (0.95, True))
    ),
    ("adaptive_threshold", {}),
    ("adaptive_threshold", {"weights": "plain", "tau_max": 0.4}),
    ("adaptive_threshold", {"threshold": "constant", "weights": "plain"}),
    ("adaptive_threshold", {"threshold": "constant", "tau_max": 0.5}),
    ("sigmoid", {}),
    *(
        ("threshold", {"dynamic": d, "gamma_max": 0.8, "grad": g})
        for d in (True, False)
        for g in ("none", "subtract", "ste")
    ),
    ("threshold", {"gamma_max": 0.0, "grad": "subtract"}),
]
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
    options = options | ({"k": min(options["k"], experts)} if "k" in options else {})
    return Router.of_kind(kind, "router")(**options)


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


def ruled(router, scores, name, mask=None, stats=False):
    """The router's rule by one backend, as a Routing."""
    with backend.use(name):
        made = route.decide(scores, router.rule, mask, stats)
    extras = {} if made.tau is None else {"tau": made.tau}
    logits = route.experts_only(scores, router.rule)
    return Routing(made.weights, made.chosen, made.probs, logits, made.ids, extras=extras, stats=made.stats)


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
@pytest.mark.parametrize("kind", ["softmax", "topk", "top_p", "adaptive_threshold", "sigmoid", "threshold"])
def test_shapes(kind, shape, name):
    torch.manual_seed(1)
    if shape[2] == 1 and kind == "adaptive_threshold":  # p = 1, far from tau
        compare(make(kind, {"tau_max": 0.4}), shape, name)
    else:
        compare(make(kind, {"k": 2} if kind == "topk" else {}, shape[2]), shape, name)


def test_every_shipped_router_has_a_rule():
    for name in catalog.names():
        for mixture in getattr(catalog.parse(catalog.raw(name)), "mixtures", ()):
            router = mixture.router
            assert (
                isinstance(router, FactRouter) or router.kind == "none" or isinstance(router.rule, route.Rule)
            ), name


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("kind", sorted({k for k, _ in ROUTERS}))
def test_decide_is_what_the_router_says(kind, name):
    """`methods.router.decide` on both backends: tensors, shapes [T, E], statistics in place of passes over
    the routing."""
    torch.manual_seed(2)
    router = make(kind, {})
    scores = scores_for(router, 21, 1, 8, torch.float32)[:, 0]
    mask = torch.rand(21, device=DEVICE) > 0.3
    want = router.route(scores, False)
    with backend.use(name):
        got = decide(router, scores, False, mask, stats=True)
        assert decide(router, scores, False).stats is None
    assert got.weights.shape == (21, 8) and set(got.extras) == set(want.extras)
    assert_near("weights", got.weights, want.weights, 1e-6)
    assert torch.equal(got.selected, want.selected)
    assert got.stats["weights"].shape == (1, 8) and got.stats["tokens"].tolist() == [mask.sum().item()]


def loop_stats(routing, mask):
    """The sums token by token in Python floats."""
    tokens, sites, experts = routing.weights.shape
    found = {n: [[0.0] * experts for _ in range(sites)] for n in route.SUMS} | {
        n: [0.0] * sites for n in route.TOTALS
    }
    for t in range(tokens):
        for g in range(sites):
            if mask is not None and not mask[t]:
                continue
            w, p, z = (x[t, g].tolist() for x in (routing.weights, routing.probs, routing.logits))
            chosen = routing.selected[t, g].tolist()
            found["tokens"][g] += 1
            found["idle"][g] += not any(chosen)
            found["squared_lse"][g] += math.log(sum(math.exp(v) for v in z)) ** 2
            for e in range(experts):
                share = p[e] / sum(p)
                found["entropy"][g] -= share * math.log(share) if share else 0.0
                values = (float(chosen[e]), w[e], w[e] / sum(w) if sum(w) else 0.0, p[e], share)
                for name, value in zip(route.SUMS, values, strict=True):
                    found[name][g][e] += value
    return found


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("masked", ["all real", "some", "none real"])
@pytest.mark.parametrize(
    ("kind", "options"), [ROUTERS[0], ROUTERS[3], ROUTERS[8], ROUTERS[11], *ROUTERS[-7:-4]], ids=str
)
def test_statistics(kind, options, masked, name):
    torch.manual_seed(3)
    router = make(kind, options)
    scores = scores_for(router, 70, 2, 8, torch.float32)
    some, none = torch.rand(70, device=DEVICE) > 0.4, torch.zeros(70, dtype=torch.bool, device=DEVICE)
    mask = {"all real": None, "some": some, "none real": none}[masked]
    if masked == "some":
        with torch.no_grad():
            scores[~mask] = float("nan")  # padding must not reach a sum
    routing = ruled(router, scores, name, mask, stats=True)
    want = loop_stats(router.route(scores.double(), False), mask)
    assert set(routing.stats) == set(want)
    for tensor, values in want.items():
        assert not routing.stats[tensor].requires_grad
        assert_near(
            tensor, routing.stats[tensor], torch.tensor(values, dtype=torch.float64, device=DEVICE), 2e-6
        )


def test_recorded_statistics_follow_their_site_and_add_up():
    torch.manual_seed(8)
    router, recorder = make("topk", {}), Recorder()
    parts = [scores_for(router, tokens, 2, 8, torch.float32).detach() for tokens in (4, 3)]
    recorder.entries = [(("q", "k"), decide(router, s, False, None, stats=True), {}) for s in parts]
    for g, site in enumerate(("q", "k")):
        found = recorder.routing[site]
        want = loop_stats(router.route(torch.cat(parts)[:, g : g + 1], False), None)
        for tensor, values in want.items():
            assert_near(tensor, found.stats[tensor], torch.tensor(values, device=DEVICE), 2e-6)
    recorder.entries[0][1].stats = None
    assert recorder.routing["q"].stats is None, "sums of a part are no sums of the whole"
    assert recorder.entries[1][1].per_token(2).stats is None


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
        got, want = ruled(router, s, name, stats=True), router.route(s.detach(), False)
        assert_near("weights", got.weights.sum(-1), want.weights.sum(-1), 1e-6)
        assert got.weights.isfinite().all() and got.probs.isfinite().all()
        grad = torch.autograd.grad(got.weights.square().sum() + got.probs.square().sum(), s)[0]
        assert grad.isfinite().all()
        assert all(v.isfinite().all() for v in got.stats.values())
    nan = torch.full((2, 1, columns), float("nan"), device=DEVICE)
    lost = ruled(router, nan, name)
    assert lost.weights.isnan().all()
    if lost.ids is not None:
        assert ((lost.ids >= 0) & (lost.ids < 8)).all()


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("kind", sorted({k for k, _ in ROUTERS}))
def test_no_token(kind, name):
    router = make(kind, {})
    scores = scores_for(router, 0, 2, 8, torch.float32)
    got = ruled(router, scores, name, stats=True)
    assert got.weights.shape == (0, 2, 8)
    assert all(not v.count_nonzero() for v in got.stats.values())
    assert torch.autograd.grad(got.weights.sum(), scores)[0].shape == scores.shape


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("kind", sorted({k for k, _ in ROUTERS}))
def test_permuted_and_repeated(kind, name):
    """Experts in another order give the weights in that order; two runs are bitwise equal."""
    torch.manual_seed(5)
    router = make(kind, {})
    scores = scores_for(router, 33, 1, 7, torch.float32).detach()
    order = torch.randperm(7, device=DEVICE)
    got = ruled(router, torch.cat([scores[..., order], scores[..., 7:]], -1), name, stats=True)
    want = ruled(router, scores, name, stats=True)
    assert_near("weights", got.weights, want.weights[..., order], 1e-6)
    again = ruled(router, scores, name, stats=True)
    assert torch.equal(again.weights, want.weights) and all(
        torch.equal(again.stats[k], v) for k, v in want.stats.items()
    )


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
    mask = torch.arange(9, device=DEVICE) % 3 > 0
    cotangent = torch.randn(9, 2, 8, device=DEVICE)

    def form(s):
        routing = decide(router, s, True, mask, stats=True)
        return routing.weights * (1 + routing.probs), routing.stats["assignments"]

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
        torch.rand(9, device=DEVICE) > 0.5,
        True,
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
    weights, probs, taus, chosen, _, _ = kernels.route(*forward)
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
