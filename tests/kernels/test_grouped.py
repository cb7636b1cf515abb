"""The low-rank update of selected experts against a loop over tokens in fp64, on both backends; the order of
rows; the rule for it.

Run: python -m pytest tests/kernels/test_grouped.py   (Triton in its interpreter where there is no GPU)
"""

from __future__ import annotations

import pytest
import torch
from compare import assert_near, relative_rms
from torch.utils.checkpoint import checkpoint

from moabench.benchmarks.speed import sorting as tune
from moabench.kernels import backend, grouped, lowrank

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRITON = pytest.param(
    "triton", marks=pytest.mark.skipif(not backend.installed(), reason="Triton is not installed")
)
BACKENDS = ["torch", TRITON]
NAMES = ("y", "x.grad", "a.grad", "b.grad", "weights.grad")
SHAPES = [  # tokens, widths in and out, experts, selected, rank
    (1, 16, 8, 1, 1, 8),  # one token, one expert
    (9, 24, 16, 5, 1, 8),  # prime E, K = 1
    (70, 136, 72, 7, 2, 8),  # more rows than a tile, ragged widths
    (6, 16, 24, 4, 4, 16),  # K = E
    (5, 16, 16, 64, 2, 8),  # most experts empty
    (40, 8, 8, 3, 2, 64),
    (0, 16, 16, 4, 2, 8),  # no token
]


def choose(tokens, experts, k, load="random"):
    """Distinct ids [T, K]."""
    if load == "one expert":
        return torch.arange(k, device=DEVICE).expand(tokens, k).contiguous()
    return torch.rand(tokens, experts).topk(k).indices.to(DEVICE)


def make(shape, load="random", dtype=torch.float32):
    """x, a, b, weights as leaves in `dtype` (weights fp32), ids, the y to add to, and a cotangent."""
    torch.manual_seed(0)
    tokens, d, o, experts, k, r = shape
    parts = [
        torch.randn(n, dtype=torch.float64).to(DEVICE, dtype)
        for n in ((tokens, d), (experts * r, d), (o, experts * r))
    ]
    ids = choose(tokens, experts, k, load)
    weights = torch.zeros(tokens, experts, device=DEVICE).scatter(
        1, ids, torch.rand(tokens, k, device=DEVICE) + 0.1
    )
    leaves = [t.requires_grad_() for t in (*parts, weights)]
    y, cotangent = (torch.randn(tokens, o, dtype=torch.float64).to(DEVICE, dtype) for _ in range(2))
    return leaves, ids, y, cotangent


def loop(x, a, b, weights, ids, y, scale):
    """`y_t + scale sum_k w B_e A_e x_t`, one token and one expert at a time."""
    r, rows = a.shape[0] // weights.shape[1], []
    for t in range(x.shape[0]):
        total = y[t]
        for e in ids[t].tolist():
            total = total + scale * weights[t, e] * (
                b[:, e * r : (e + 1) * r] @ (a[e * r : (e + 1) * r] @ x[t])
            )
        rows.append(total)
    return torch.stack(rows) if rows else y * 1 + 0 * (x.sum() + a.sum() + b.sum() + weights.sum())


def ours(x, a, b, weights, ids, y, scale):
    return grouped.grouped_lowrank(x, a, b, ids, weights, scale, y.clone())


def dense(x, a, b, weights, ids, y, scale):
    """The masked form: all experts, zeros in the weights."""
    mask = torch.zeros_like(weights).scatter(1, ids, 1.0)
    factor = (weights * mask * scale).repeat_interleave(a.shape[0] // weights.shape[1], dim=1)
    return lowrank.expand_add_(y.clone(), [(lowrank.shrink(x, a) * factor.to(x.dtype), b)])


def results(form, leaves, ids, y, cotangent, scale=0.5):
    out = form(*leaves, ids, y, scale)
    return [out, *torch.autograd.grad(out, leaves, cotangent.to(out.dtype))]


def exact(leaves, ids, y, cotangent):
    return results(
        loop, [t.detach().double().requires_grad_() for t in leaves], ids, y.double(), cotangent.double()
    )


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("load", ["random", "one expert"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equation_and_gradients(shape, load, name):
    case = make(shape, load)
    with backend.use(name):
        got = results(ours, *case)
    for tensor, g, w in zip(NAMES, got, exact(*case), strict=True):
        assert_near(tensor, g, w, 2e-6)


@pytest.mark.parametrize(
    "shape", [(9, 13, 11, 5, 2, 1), (33, 7, 50, 6, 3, 5), (12, 16, 16, 3, 1, 100)], ids=str
)
@pytest.mark.skipif(not backend.installed(), reason="Triton is not installed")
def test_any_rank_and_width(shape):
    """Triton needs no aligned rows, and takes ranks above one program's."""
    case = make(shape)
    with backend.use("triton"):
        got = results(ours, *case)
    for tensor, g, w in zip(NAMES, got, exact(*case), strict=True):
        assert_near(tensor, g, w, 2e-6)


@pytest.mark.parametrize("name", BACKENDS)
def test_bf16_is_as_good_as_the_dense_form(name):
    """Error against fp64 at most twice that of the masked form in bf16; three times in the interpreter, which
    truncates fp32 to bf16."""
    times = 3 if name == "triton" and backend.interpreted() else 2
    case = make((70, 64, 48, 5, 2, 8), dtype=torch.bfloat16)
    with backend.use("torch"):
        reference = results(dense, *case)
    with backend.use(name):
        got = results(ours, *case)
    for tensor, g, r, w in zip(NAMES, got, reference, exact(*case), strict=True):
        assert relative_rms(g, w) <= times * relative_rms(r, w), tensor


@pytest.mark.parametrize("name", BACKENDS)
def test_equals_the_dense_form(name):
    case = make((70, 64, 48, 7, 2, 8))
    with backend.use(name):
        pairs = zip(NAMES, results(ours, *case), results(dense, *case), strict=True)
    for tensor, g, w in pairs:
        assert_near(tensor, g, w, 2e-6)


@pytest.mark.parametrize("name", BACKENDS)
def test_sites_with_routers_of_their_own(name):
    """Three linears of different widths on one input, each with its ids; one is a slice of a fused output."""
    torch.manual_seed(1)
    tokens, d, experts, k, r, widths = 21, 24, 5, 2, 8, (16, 8, 40)
    x, a = torch.randn(tokens, d, device=DEVICE), torch.randn(3 * experts * r, d, device=DEVICE)
    bs = [torch.randn(n, experts * r, device=DEVICE) for n in widths]
    weights = torch.rand(tokens, 3, experts, device=DEVICE)
    ids = torch.stack([choose(tokens, experts, k) for _ in widths], 1)
    ys = [torch.randn(tokens, n, device=DEVICE) for n in (24, 24, 40)]
    columns = (slice(0, 16), slice(16, 24), slice(None))
    leaves = [t.requires_grad_() for t in (x, a, weights, *bs)]
    cotangents = [torch.randn_like(y) for y in ys[1:]]

    def sites(x, a, weights, *bs):
        outputs = [ys[1].clone(), ys[2].clone()]
        with backend.use(name):
            shrunk = grouped.shrink(x, a, weights, ids, 0.5)
            for g, (out, b) in enumerate(zip((0, 0, 1), bs, strict=True)):
                outputs[out] = grouped.expand_add_(outputs[out], shrunk, g, b, columns[g])
        return outputs

    def wanted(x, a, weights, *bs):
        parts = a.unflatten(0, (3, -1))
        first = [
            loop(x, parts[g], bs[g], weights[:, g], ids[:, g], ys[1].double()[:, columns[g]], 0.5)
            for g in (0, 1)
        ]
        return [torch.cat(first, 1), loop(x, parts[2], bs[2], weights[:, 2], ids[:, 2], ys[2].double(), 0.5)]

    fine = [t.detach().double().requires_grad_() for t in leaves]
    got, want = sites(*leaves), wanted(*fine)
    grads = torch.autograd.grad(got, leaves, cotangents)
    expected = torch.autograd.grad(want, fine, [c.double() for c in cotangents])
    for tensor, g, w in zip(
        ("fused", "alone", "x", "a", "w", "b0", "b1", "b2"), (*got, *grads), (*want, *expected), strict=True
    ):
        assert_near(tensor, g, w, 2e-6)


@pytest.mark.parametrize("sites", [1, 3])
@pytest.mark.parametrize("k", [1, 2])
def test_order(sites, k):
    """Rows of a site are sorted by expert, then by token; ends and both directions of the permutation
    agree."""
    torch.manual_seed(2)
    ids = torch.stack([choose(11, 6, k) for _ in range(sites)], 1)
    order = grouped.sort(ids, 6)
    assert order.ends.dtype == torch.int32
    for g in range(sites):
        wanted = sorted((ids[t, g, j].item(), t, j) for t in range(11) for j in range(k))
        assert order.tokens[g].tolist() == [t for _, t, _ in wanted]
        assert order.ends[g].tolist() == [sum(e <= last for e, _, _ in wanted) for last in range(6)]
        assert [order.rows[g, t, j].item() for _, t, j in wanted] == list(range(11 * k))
        assert order.slots[g].tolist() == [t * k + j for _, t, j in wanted]


@pytest.mark.parametrize("name", BACKENDS)
def test_repeats_bitwise_whatever_the_gradient_looks_like(name):
    leaves, ids, y, _ = make((33, 24, 16, 5, 2, 8))
    with backend.use(name):
        one = results(
            ours, leaves, ids, y, torch.ones((), device=DEVICE).expand(y.shape)
        )  # stride 0, as sum() gives it
        two = results(ours, leaves, ids, y, torch.ones_like(y))
    for tensor, a, b in zip(NAMES, one, two, strict=True):
        assert torch.equal(a, b), tensor


@pytest.mark.parametrize("name", BACKENDS)
def test_compiled_and_checkpointed(name):
    case = make((9, 16, 24, 5, 2, 8))
    with backend.use(name):
        want = results(ours, *case)
        compiled = results(torch.compile(ours, backend="aot_eager", fullgraph=True), *case)
        recomputed = results(lambda *a: checkpoint(ours, *a, use_reentrant=False), *case)
    for tensor, w, c, r in zip(NAMES, want, compiled, recomputed, strict=True):
        assert_near(tensor, c, w, 1e-6)
        assert torch.equal(r, w), tensor


@pytest.mark.skipif(not backend.installed(), reason="Triton is not installed")
def test_registrations():
    from moabench.kernels.triton import grouped as kernels

    x, w = torch.randn(5, 12, device=DEVICE), torch.randn(3, 4, 12, device=DEVICE)
    order = grouped.sort(choose(5, 3, 2).unsqueeze(1), 3)
    tokens, rows, ends = order.tokens[0], order.rows[0], order.ends[0]
    s, wide = torch.randn(10, 4, device=DEVICE), torch.randn(10, 12, device=DEVICE)
    calls = {
        kernels.grouped_product: (x, tokens, ends, w),
        kernels.grouped_wide: (s, ends, w),
        kernels.grouped_sum_: (x, wide, rows),
        kernels.grouped_outer: (s, x, tokens, ends),
    }
    for op, arguments in calls.items():
        torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))


def test_when_sorting_is_preferred():
    """(E - K) r > c K, and only where a kernel takes the shapes."""
    c = grouped.BREAK_EVEN["cpu", torch.float32]
    with backend.use("torch"):
        assert grouped.prefers_sorted(int(c) + 3, 2, 8, "cpu", torch.float32, 256)
        assert not grouped.prefers_sorted(2 + int(c) // 4, 2, 8, "cpu", torch.float32, 256)
        assert not grouped.prefers_sorted(10_000, 10_000, 8, "cpu", torch.float32, 256)
        assert not grouped.prefers_sorted(10_000, 1, 3, "cpu", torch.float32, 256), "rows of 12 bytes"
        assert not grouped.prefers_sorted(10_000, 1, 8, "cpu", torch.float32, 255), (
            "a width that is not whole 16 bytes"
        )
        assert not grouped.prefers_sorted(10_000, 1, 8, "cpu", torch.float64, 256), "no kernel for fp64"
        if DEVICE == "cuda":
            assert not grouped.prefers_sorted(10_000, 1, 8, "cuda", torch.bfloat16, 256), (
                "plain torch would wait for the host"
            )


def test_crossing():
    """The self-benchmark finds c from ratios that follow (u / c)^0.7, and says nothing beyond what it saw."""
    points = [(u, (u / 90) ** 0.7) for u in (24, 56, 120, 504)]
    assert tune.crossing(points) == "90"
    assert tune.crossing(points[:2]) == "above 56"
    assert tune.crossing(points[2:]) == "below 120"
    assert tune.ratio(8, 16, 4, 2, 8, "cpu", torch.float32, rounds=1) > 0
