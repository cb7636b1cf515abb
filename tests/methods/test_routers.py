"""Every registered router against its loop in fp64 (references/routers), the invariants that all routers
share, and those of each card.

Run: python -m pytest tests/methods/test_routers.py
"""

from __future__ import annotations

import pytest
import references
import torch
from tiny import assert_near, batch
from torch.nn import functional as F

from moabench.methods import LinearRouter, Router
from moabench.methods.recorder import Context
from moabench.methods.spec import ConfigError

KINDS = sorted(k for k, r in Router.kinds().items() if k != "none" and not r.reads_facts)
FACTS = sorted(k for k, r in Router.kinds().items() if r.reads_facts)
REFERENCES = {kind: references.of("routers", kind) for kind in (*KINDS, *FACTS)}
VARIANTS = [(kind, options) for kind in KINDS for options in REFERENCES[kind].VARIANTS]
WIDTH = 12


def make(kind, experts, **options):
    """A router that can choose among `experts` experts and random tensors for it."""
    router = Router.of_kind(kind, "router")(**options)
    try:
        router.check(experts)
    except ConfigError:
        router = Router.of_kind(kind, "router")(**{**options, "k": experts})
    torch.manual_seed(0)
    declared = router.params(WIDTH, experts)
    return router, {n: torch.randn(p.shape, requires_grad=p.trained) for n, p in declared.items()}


def scores(router, tensors, x):
    return (
        F.linear(x, *router.heads(tensors)) if isinstance(router, LinearRouter) else router.scores(tensors, x)
    )


def given(router, tensors, rows, labels=False):
    """What `route` is given beside the scores of `rows`: buffers, and labels where it is taught by them."""
    buffers = {n: t for n, t in tensors.items() if not t.requires_grad}
    return buffers | ({"labels": torch.arange(rows) % 3} if labels and router.reads_skills(True) else {})


def run(router, tensors, x, training=False):
    return router.route(scores(router, tensors, x), training, **given(router, tensors, len(x), training))


def tokens(n=40):
    return torch.randn(n, WIDTH, generator=torch.Generator().manual_seed(5))


def test_none_has_no_tensor():
    assert Router.of_kind("none", "router")().params(WIDTH, 3) == {}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("kind", "options"), VARIANTS, ids=str)
def test_equation_and_gradients(kind, options, training):
    """Weights, probabilities, selection and threshold; gradients of every tensor from random cotangents on
    the weights."""
    router, tensors = make(kind, 5, **options)
    x = tokens()
    got = run(router, tensors, x, training)
    exact = {n: t.detach().double().requires_grad_(t.requires_grad) for n, t in tensors.items()}
    choose = REFERENCES[kind].choose
    choices = [choose(router, exact, u, training=training, skill=t % 3) for t, u in enumerate(x.double())]
    weights = torch.stack([torch.stack(c.w) for c in choices])
    assert_near("weights", got.weights, weights, 1e-6)
    assert_near("probs", got.probs, torch.stack([torch.stack(c.p) for c in choices]), 1e-6)
    assert_near("logits", got.logits, torch.stack([torch.stack(c.z) for c in choices]), 1e-6)
    assert got.selected.tolist() == [c.chosen for c in choices]
    if choices[0].tau is not None:
        assert_near("tau", got.extras["tau"][:, 0], torch.stack([c.tau for c in choices]), 1e-6)
    if got.ids is not None:
        assert torch.equal(torch.zeros_like(got.selected).scatter(1, got.ids, True), got.selected)
    trained = [n for n, t in tensors.items() if t.requires_grad]
    cotangent = torch.randn(weights.shape, dtype=torch.float64)
    if not got.weights.requires_grad:
        learns = weights.requires_grad and torch.autograd.grad(
            weights, [exact[n] for n in trained], cotangent, allow_unused=True, materialize_grads=True
        )
        assert not learns or all(not g.count_nonzero() for g in learns)
        return
    want = torch.autograd.grad(
        weights, [exact[n] for n in trained], cotangent, allow_unused=True, materialize_grads=True
    )
    grads = torch.autograd.grad(
        got.weights, [tensors[n] for n in trained], cotangent.float(), allow_unused=True
    )
    for name, g, w in zip(trained, grads, want, strict=True):
        option, value = REFERENCES[kind].QUIET.get(name, (None, None))
        if option and getattr(router, option) == value:
            assert g is None, f"{name}: expected no gradient at all with {option}={value}"
        else:
            assert_near(f"{name}.grad", g, w if w.norm() > 1e-12 else torch.zeros_like(w), 1e-4)


@pytest.mark.parametrize(
    ("kind", "options"), [(k, o) for k in FACTS for o in REFERENCES[k].VARIANTS], ids=str
)
def test_decisions_from_facts(kind, options):
    """Those of every token of a ragged batch."""
    router, inputs = Router.of_kind(kind, "router")(**options), batch(left=2, right=1)
    ids, skills = inputs["input_ids"], torch.tensor([3, 11])
    prompt = torch.arange(ids.shape[1]) < 5
    context = Context(
        mask=inputs["attention_mask"].bool(),
        prompt=prompt.expand_as(ids),
        shape=tuple(ids.shape),
        input_ids=ids,
        skill_ids=skills,
    )
    got = router.spread(router.decide(context, 5), context)
    for b, row in enumerate(ids.tolist()):
        real = inputs["attention_mask"][b].bool().tolist()
        facts = {"prompt": [i for i, m in zip(row[:5], real, strict=False) if m], "skill": int(skills[b])}
        for t, token in enumerate(row):
            want = REFERENCES[kind].choose(router, {}, None, experts=5, token=token, **facts)
            at = b * len(row) + t
            assert got.chosen[at].tolist() == want.chosen, f"sequence {b}, token {t}"
            assert got.weights[at].tolist() == [float(w) for w in want.w]


@pytest.mark.parametrize("experts", [1, 2, 5, 13])
@pytest.mark.parametrize("kind", KINDS)
def test_common_invariants(kind, experts):
    router, tensors = make(kind, experts)
    x = tokens()
    got = run(router, tensors, x)
    assert got.weights.shape == got.selected.shape == (40, experts) and got.weights.dtype == torch.float32
    assert torch.all((got.weights != 0) <= got.selected), "a weight outside the selection"
    for _ in range(2):  # evaluation is deterministic
        assert torch.equal(run(router, tensors, x).weights, got.weights)
    buffers = given(router, tensors, len(x))
    # leading dimensions are kept
    wide = router.route(scores(router, tensors, x).unflatten(0, (4, 2, 5)), False, **buffers)
    assert wide.weights.shape == (4, 2, 5, experts) and torch.equal(wide.selected.flatten(0, 2), got.selected)
    assert_near("leading dimensions", wide.weights.flatten(0, 2), got.weights, 1e-6)
    alone = torch.cat([router.route(s[None], False, **buffers).weights for s in scores(router, tensors, x)])
    assert_near("a token on its own", alone, got.weights, 1e-6)
    if REFERENCES[kind].SUMS_TO_ONE and getattr(router, "k", 2) > 1:
        assert_near("sum of weights", got.weights.sum(-1), torch.ones(40), 1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_permuting_experts_permutes_weights(kind):
    router, tensors = make(kind, 7)
    s = scores(router, tensors, tokens())
    order = torch.randperm(7)
    # what follows the experts' scores belongs to the threshold
    permuted = torch.cat([s[:, order], s[:, 7:]], 1)
    buffers = given(router, tensors, len(s))
    got = router.route(permuted, False, **{n: t[order] for n, t in buffers.items()})
    want = router.route(s, False, **buffers)
    for name in ("weights", "selected", "probs"):
        assert_near(name, getattr(got, name).float(), getattr(want, name)[:, order].float(), 1e-6)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_large_logits_and_ties_stay_finite(kind, training):
    router, tensors = make(kind, 6)
    columns = scores(router, tensors, tokens()).shape[1]
    for s in (torch.randn(30, columns) * 1e4, torch.zeros(4, columns), torch.full((4, columns), -3e4)):
        s = s.requires_grad_()
        facts = given(router, tensors, len(s), training)
        got = router.route(s, training, **facts)
        assert got.weights.isfinite().all() and got.probs.isfinite().all()
        if got.weights.requires_grad:
            got.weights.square().sum().backward()
            assert s.grad.isfinite().all(), "gradient of the scores"
        again = router.route(s, training, **facts)
        assert torch.equal(again.selected, got.selected), "ties are broken the same way every time"


@pytest.mark.parametrize("k", [1, 2, 5])
def test_topk_selects_exactly_k(k):
    router, tensors = make("topk", 5, k=k)
    got = run(router, tensors, tokens())
    assert (
        (got.weights > 0).sum(-1).eq(k).all()
        and got.selected.sum(-1).eq(k).all()
        and got.ids.shape == (40, k)
    )
    raw, _ = make("topk", 5, k=k, renormalize=False)
    kept = run(raw, tensors, tokens())
    assert torch.equal(kept.weights[kept.selected], kept.probs[kept.selected])
    if k == 5:
        assert_near("k = E", got.weights, scores(router, tensors, tokens()).softmax(-1), 1e-6)


def test_topk_of_one_has_no_router_gradient():
    router, tensors = make("topk", 5, k=1)
    grad = torch.autograd.grad(
        (run(router, tensors, tokens()).weights * torch.randn(40, 5)).sum(), tensors["weight"]
    )[0]
    assert not grad.count_nonzero()


def test_top_p_keeps_the_smallest_prefix():
    for p in (0.05, 0.3, 0.6, 0.95):
        router, tensors = make("top_p", 6, p=p, renormalize=False)
        got = run(router, tensors, tokens())
        for weights, probs in zip(got.weights, got.probs, strict=True):
            kept = weights[weights > 0]
            assert len(kept) >= 1 and kept.sum() >= p - 1e-6
            assert len(kept) == 1 or kept.sum() - kept.min() < p, "the last kept expert was not needed"
            assert kept.min() >= probs[weights == 0].max() if (weights == 0).any() else True
    few, tensors = make("top_p", 6, p=1e-6)
    assert run(few, tensors, tokens()).selected.sum(-1).eq(1).all()
    many = Router.of_kind("top_p", "")(p=1 - 1e-7)
    uniform = many.route(torch.zeros(3, 6), False)
    assert uniform.selected.all() and torch.allclose(uniform.weights, torch.full((3, 6), 1 / 6))


def test_adaptive_threshold_range_and_minimum():
    for tau_max in (None, 0.05, 0.4):
        router, tensors = make("adaptive_threshold", 5, tau_max=tau_max)
        got = run(router, tensors, tokens())
        bound = 1 / 5 if tau_max is None else tau_max
        assert (got.extras["tau"] > 0).all() and (got.extras["tau"] < bound).all()
        sums = got.weights.sum(-1)
        assert torch.all(((sums - 1).abs() < 1e-5) | (sums == 0)), "weights sum to 1 or are all 0"
        if bound <= 1 / 5:
            assert (got.selected.sum(-1) >= 1).all()
    above = Router.of_kind("adaptive_threshold", "")(tau_max=1.0)
    nothing = above.route(
        torch.tensor([[0.0, 0.0, 0.0, 9.0]], requires_grad=True), True
    )  # tau near 1, p = 1/3
    assert not nothing.selected.any() and not nothing.weights.count_nonzero()
    dense = Router.of_kind("adaptive_threshold", "")(tau_max=1e-9).route(torch.randn(9, 6), False)
    assert_near("tau -> 0", dense.weights, dense.probs, 1e-6)


def test_adaptive_threshold_is_continuous():
    """An expert at the threshold has weight 0, reached from both sides."""
    router = Router.of_kind("adaptive_threshold", "")(threshold="constant", tau_max=0.2)

    def weight(p):
        probabilities = torch.tensor([[p, 0.5, 0.5 - p]], dtype=torch.float64)
        return router.route(probabilities.log(), False).weights[0, 0].item()

    assert weight(0.2 - 1e-6) == 0
    assert 0 <= weight(0.2 + 1e-6) < 1e-5
    assert weight(0.25) > 0.05


def test_adaptive_threshold_gradients():
    """The threshold learns from tokens with two or more selected experts, and from them only."""
    router = Router.of_kind("adaptive_threshold", "")()
    one = torch.tensor([[4.0, 0.0, 0.0, 0.0]], requires_grad=True)  # three experts and the threshold
    assert router.route(one, True).selected.sum() == 1
    router.route(one, True).weights[0, 0].backward()
    assert not one.grad.abs().gt(1e-9).any(), "weight exactly 1: no task gradient to gate or threshold"
    two = torch.tensor([[2.0, 1.5, -3.0, 0.0]], requires_grad=True)
    assert router.route(two, True).selected.sum() == 2
    router.route(two, True).weights[0, 0].backward()
    assert two.grad[0, 3].abs() > 1e-3 and two.grad.isfinite().all()


def test_threshold_limits():
    """Gamma_max = 0 is the sigmoid router; a constant Gamma_max above 1 selects nothing."""
    for dynamic in (True, False):
        router, tensors = make("threshold", 6, gamma_max=0.0, dynamic=dynamic)
        got = run(router, tensors, tokens())
        soft = run(make("sigmoid", 6)[0], tensors, tokens())
        assert got.selected.all() and got.weights.shape == soft.weights.shape
        assert_near("weights", got.weights, soft.weights, 1e-7)
    router, tensors = make("threshold", 6, gamma_max=1.5, dynamic=False)
    nothing = run(router, tensors, tokens())
    assert not nothing.selected.any() and not nothing.weights.count_nonzero()


@pytest.mark.parametrize("grad", ["none", "subtract", "ste"])
def test_threshold_values_and_gradient_to_tau(grad):
    router, tensors = make("threshold", 6, gamma_max=1.0, grad=grad)
    got = run(router, tensors, tokens(), training=True)
    tau, chosen = got.extras["tau"], got.selected
    assert chosen.any() and not chosen.all() and not got.weights[~chosen].count_nonzero()
    if grad != "subtract":
        assert torch.all((got.weights >= tau - 1e-6)[chosen]) and torch.all(got.weights[chosen] < 1)
    got.weights.sum().backward()
    head = tensors["threshold_weight"].grad
    assert head is None if grad == "none" else head.isfinite().all() and head.norm() > 1e-3
    near = torch.tensor([[0.0, 1e-6]])  # gate 0.5 just below and just above tau = 0.5
    for sign in (1, -1):
        w = (
            Router.of_kind("threshold", "")(gamma_max=1.0, grad=grad)
            .route(near * torch.tensor([[1.0, sign]]), False)
            .weights
        )
        assert w.item() < 1e-6 if grad == "subtract" or sign == 1 else w.item() == pytest.approx(0.5)


def test_one_map_for_several_sites():
    """Routers that read one input are rows of one GEMM: [T, G, H] scores give the routing of each site
    alone."""
    for kind in KINDS:
        router, tensors = make(kind, 4)
        columns = scores(router, tensors, tokens()).shape[1]
        s = torch.randn(9, 3, columns)
        buffers = {n: torch.randn(3, *t.shape) for n, t in given(router, tensors, 9).items()}
        together = router.route(s, False, **buffers).weights
        for g in range(3):
            alone = router.route(s[:, g], False, **{n: t[g] for n, t in buffers.items()}).weights
            assert_near(f"{kind} at site {g}", together[:, g], alone, 1e-6)
