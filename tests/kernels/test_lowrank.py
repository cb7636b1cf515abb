"""linear_shrink and expand_add_ against fp64 loops over tokens and rank rows: outputs and every gradient,
from random cotangents, on both backends.

Run: python -m pytest tests/kernels/test_lowrank.py
"""

from __future__ import annotations

import pytest
import torch
from compare import assert_near, relative_rms
from torch.nn import functional as F

from moabench.kernels import backend, lowrank

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RUNS = [("torch", torch.float64), ("torch", torch.float32), ("triton", torch.float32)]
BOUND = {torch.float64: 1e-13, torch.float32: 2e-6}
SHAPES = [  # tokens, input width, output widths, rank rows, router rows (0: no routers)
    (1, 7, (5,), 1, 0),  # one token, one row
    (3, 16, (8, 8, 4), 6, 9),  # q, k, v and their routers
    (70, 33, (17,), 11, 3),  # odd and prime widths
    (5, 4, (), 3, 1),  # a projection without a frozen linear
    (9, 3, (31, 1), 13, 0),  # rank above the input width, one output
    (6, 5, (4,), 0, 7),  # routers alone, as with dropout
]


def randn(*shape, dtype=torch.float64, grad=True):
    return torch.randn(*shape, dtype=dtype).requires_grad_(grad)


def loop_linear_shrink(x, frozen, *rows):
    """Y_i[t] = W_i x[t] + b_i, and S[t, r] = a[r] . x[t] for each block of rows, one token and one row at a
    time."""
    ys = [torch.stack([w @ row + (0 if b is None else b) for row in x]) for w, b in frozen]
    return ys, *(
        torch.stack([torch.stack([r @ row for r in block] or [row[:0].sum()])[: len(block)] for row in x])
        for block in rows
    )


def loop_expand(y, terms):
    """y[t, columns] + sum over rank rows of S[t, r] B[:, r]."""
    rows = []
    for t in range(y.shape[0]):
        row = y[t].clone()
        for s, b, *part in terms:
            columns = part[0] if part else slice(None)
            for r in range(s.shape[1]):
                row = row.index_add(0, torch.arange(y.shape[1])[columns], s[t, r] * b[:, r])
        rows.append(row)
    return torch.stack(rows)


def gradients(outputs, cotangents, tensors):
    return torch.autograd.grad(outputs, tensors, cotangents, allow_unused=True)


@pytest.mark.parametrize(("kernels", "dtype"), RUNS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("tokens", "d", "widths", "rows", "heads"), SHAPES)
def test_linear_shrink(tokens, d, widths, rows, heads, bias, kernels, dtype):
    torch.manual_seed(0)
    tensors = {"x": randn(tokens, d), "a": randn(rows, d)} | ({"heads": randn(heads, d)} if heads else {})
    frozen = [(randn(b, d, grad=False), randn(b, grad=False) if bias else None) for b in widths]
    ys, *projections = loop_linear_shrink(tensors["x"], frozen, *list(tensors.values())[1:])
    want = [*ys, *projections]
    cotangents = [torch.randn_like(t) for t in want]
    expected = gradients(want, cotangents, list(tensors.values()))

    device = DEVICE if kernels == "triton" else "cpu"
    low = [t.detach().to(device, dtype).requires_grad_() for t in tensors.values()]
    frozen = [(w.to(low[0]), None if b is None else b.to(low[0])) for w, b in frozen]
    with backend.use(kernels):
        ys_, s, z = lowrank.linear_shrink(low[0], frozen, *low[1:])
    assert (z is None) == (not heads)
    got = [*ys_, s, *([z] if heads else [])]
    for name, g, w in zip([*(f"y{i}" for i in range(len(ys))), "s", "z"], got, want, strict=False):
        assert_near(name, g, w, BOUND[dtype])
    for name, g, w in zip(
        tensors, gradients(got, [c.to(low[0]) for c in cotangents], low), expected, strict=True
    ):
        assert_near(f"{name}.grad", g, torch.zeros_like(tensors[name]) if w is None else w, BOUND[dtype])


@pytest.mark.parametrize("used", [(0,), (1,), (2,), (3,), (0, 2), (0, 3), (2, 3), (0, 1)])
def test_linear_shrink_where_some_outputs_are_unused(used):
    torch.manual_seed(0)
    x, a, heads, frozen = (
        randn(6, 5),
        randn(3, 5),
        randn(2, 5),
        [(randn(4, 5, grad=False), None), (randn(7, 5, grad=False), None)],
    )
    ys, *rest = loop_linear_shrink(x, frozen, a, heads)
    ys_, *rest_ = lowrank.linear_shrink(x, frozen, a, heads)
    cotangents = [torch.randn_like(t) for t in (*ys, *rest)]
    pick = lambda values: [values[i] for i in used]  # noqa: E731
    want = torch.autograd.grad(
        pick([*ys, *rest]), [x, a, heads], pick(cotangents), allow_unused=True, materialize_grads=True
    )
    got = torch.autograd.grad(
        pick([*ys_, *rest_]), [x, a, heads], pick(cotangents), allow_unused=True, materialize_grads=True
    )
    for name, g, w in zip(("x.grad", "a.grad", "heads.grad"), got, want, strict=True):
        assert_near(name, g, w, 1e-13)


@pytest.mark.parametrize("trained", [(), ("x",), ("a",), ("heads",), ("x", "heads"), ("a", "heads")])
def test_linear_shrink_where_something_needs_no_gradient(trained):
    torch.manual_seed(0)
    t = {name: randn(n, 5, grad=name in trained) for name, n in (("x", 6), ("a", 3), ("heads", 2))}
    w = randn(4, 5, grad=False)
    (y,), s, z = lowrank.linear_shrink(t["x"], [(w, None)], t["a"], t["heads"])
    for name, got, want in (("y", y, w), ("s", s, t["a"]), ("z", z, t["heads"])):
        assert_near(name, got, t["x"] @ want.t(), 1e-13)
    cotangents = [torch.randn_like(s), torch.randn_like(z)]
    if trained:
        torch.autograd.backward([s, z], cotangents)
    assert {name for name, v in t.items() if v.grad is not None} == set(trained)
    for name, cotangent in zip(("a", "heads"), cotangents, strict=True):
        if name in trained:
            assert_near(f"{name}.grad", t[name].grad, cotangent.t() @ t["x"], 1e-13)


def test_no_grad_mode_and_frozen_weights():
    torch.manual_seed(0)
    x, a, heads, w, b = randn(6, 5), randn(3, 5), randn(2, 5), randn(4, 5), randn(4)
    with torch.no_grad():
        (y,), s, z = lowrank.linear_shrink(x, [(w, b)], a, heads)
        assert not (y.requires_grad or s.requires_grad or z.requires_grad)
        for name, got, want in (
            ("y", y, F.linear(x, w, b)),
            ("s", s, F.linear(x, a)),
            ("z", z, F.linear(x, heads)),
        ):
            assert_near(name, got, want, 1e-14)
    (y,), s, z = lowrank.linear_shrink(x, [(w, b)], a, heads)  # weights that do train get their gradients
    (y.sum() + s.sum() + z.sum()).backward()
    assert_near("w.grad", w.grad, x.sum(0).expand(4, -1), 1e-13)
    assert_near("b.grad", b.grad, torch.full_like(b, 6.0), 1e-13)
    assert_near("heads.grad", heads.grad, x.sum(0).expand(2, -1), 1e-13)


@pytest.mark.parametrize(("kernels", "dtype"), RUNS)
@pytest.mark.parametrize("tokens", [1, 3, 70])
@pytest.mark.parametrize(
    "parts",
    [
        [None],
        [slice(0, 5), slice(5, 9)],  # gate and up of one fused linear
        [None, slice(2, 9), slice(4, 6)],  # overlapping: two mixtures on one linear
        [slice(8, 9)],
    ],
)
def test_expand_add(parts, tokens, kernels, dtype):
    torch.manual_seed(0)
    width = 9
    terms = []
    for rows, part in zip((1, 5, 7), parts, strict=False):
        wide = width if part is None else part.stop - part.start
        terms.append((randn(tokens, rows), randn(wide, rows), *(() if part is None else (part,))))
    y = randn(tokens, width)
    want = loop_expand(y, terms)
    cotangent = torch.randn_like(want)
    tensors = [y, *(t for s, b, *_ in terms for t in (s, b))]
    expected = gradients(want, cotangent, tensors)

    low = [t.detach().to(DEVICE if kernels == "triton" else "cpu", dtype).requires_grad_() for t in tensors]
    inner = low[0] * 1  # the frozen output is never a leaf
    with backend.use(kernels):
        got = lowrank.expand_add_(
            inner, [(low[1 + 2 * i], low[2 + 2 * i], *term[2:]) for i, term in enumerate(terms)]
        )
    assert got.data_ptr() == inner.data_ptr(), "y is overwritten, not copied"
    assert_near("y", got, want, BOUND[dtype])
    names = ["y.grad", *(f"{n}{i}.grad" for i in range(len(terms)) for n in "sb")]
    for name, g, w in zip(names, gradients(got, cotangent.to(low[0]), low), expected, strict=True):
        assert_near(name, g, w, BOUND[dtype])


def test_expand_add_without_gradients():
    torch.manual_seed(0)
    y, s, b = randn(4, 5, grad=False), randn(4, 2), randn(5, 2)
    want = y + s @ b.t()
    with torch.no_grad():
        got = lowrank.expand_add_(y, [(s, b)])
    assert got is y and not got.requires_grad
    assert_near("y", y, want, 1e-13)
    frozen = lowrank.expand_add_(y * 1, [(s.detach(), b)])  # B alone trains
    frozen.sum().backward()
    assert s.grad is None
    assert_near("b.grad", b.grad, s.sum(0).expand(5, -1), 1e-13)


def test_bf16_is_as_good_as_the_plain_form():
    """fp32 adapters over a bf16 base: error against fp64 at most twice that of the plain bf16 torch form;
    router scores in fp32."""
    torch.manual_seed(0)
    x, w, a, b, heads = randn(600, 64), randn(48, 64, grad=False), randn(16, 64), randn(48, 16), randn(8, 64)
    cotangents = torch.randn(600, 48).double(), torch.randn(600, 8).double()

    def run(form, dtype):
        low = [
            x.detach().to(dtype).requires_grad_(),
            *(t.detach().clone().requires_grad_() for t in (a, b, heads)),
        ]
        outputs = form(low[0], w.to(dtype), *low[1:])
        return [
            *outputs,
            *gradients(outputs, [c.to(o.dtype) for c, o in zip(cotangents, outputs, strict=True)], low),
        ]

    def plain(x, w, a, b, heads):
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        return F.linear(x, w) + F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype)), F.linear(
            x.to(wide), heads.to(wide)
        )

    def ours(x, w, a, b, heads):
        (y,), s, z = lowrank.linear_shrink(x, [(w, None)], a, heads)
        assert z.dtype == torch.float32
        return lowrank.expand_add_(y, [(s, b)]), z

    exact, got, reference = run(plain, torch.float64), run(ours, torch.bfloat16), run(plain, torch.bfloat16)
    for name, g, r, want in zip(
        ("y", "z", "x.grad", "a.grad", "b.grad", "heads.grad"), got, reference, exact, strict=True
    ):
        bound = 2 * relative_rms(r, want)
        if name == "heads.grad":  # formed in bf16 like every other gradient: as good as those
            bound = 2 * relative_rms(reference[3], exact[3])
        assert relative_rms(g, want) <= bound, name


def test_autocast_gives_the_plain_result():
    torch.manual_seed(0)
    x, a, heads = (randn(n, 8, dtype=torch.float32) for n in (6, 3, 2))
    w = randn(4, 8, dtype=torch.float32, grad=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (y,), s, z = lowrank.linear_shrink(x, [(w, None)], a, heads)
        assert y.dtype == s.dtype == torch.bfloat16 and z.dtype == torch.float32
        assert torch.equal(y, F.linear(x, w)) and torch.equal(s, F.linear(x, a))
    assert torch.equal(z, F.linear(x, heads))


def test_gradcheck():
    torch.manual_seed(0)
    x, a, h, b, w = randn(3, 4), randn(2, 4), randn(3, 4), randn(5, 2), randn(5, 4, grad=False)

    def shrink(x, a, h):
        (y,), s, z = lowrank.linear_shrink(x, [(w, None)], a, h)
        return y, s, z

    assert torch.autograd.gradcheck(shrink, (x, a, h))
    y, s = randn(3, 5), randn(3, 2)
    assert torch.autograd.gradcheck(
        lambda y, s, b: lowrank.expand_add_(y * 1, [(s, b), (s, b[:2], slice(1, 3))]), (y, s, b)
    )


def test_repeats_bitwise_and_saves_nothing_of_output_width():
    tokens, width = 13, 512
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        x, a, b, heads = (randn(*s, dtype=torch.float32) for s in ((tokens, 8), (3, 8), (width, 3), (4, 8)))
        w = randn(width, 8, dtype=torch.float32, grad=False)
        saved: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, saved=saved: saved.append(t) or t, lambda t: t
        ):
            (y,), s, z = lowrank.linear_shrink(x, [(w, None)], a, heads)
            out = lowrank.expand_add_(y, [(s, b)])
        assert not [t.shape for t in saved if tokens in t.shape and width in t.shape], (
            "an activation of output width is saved"
        )
        own = {t.untyped_storage().data_ptr() for t in (x, a, b, heads, w, s)}
        new = sum(t.nbytes for t in saved if t.untyped_storage().data_ptr() not in own)
        assert new <= (3 + 4) * 8 * 4, (
            "bytes saved beyond x, S, the parameters and one copy of the rows [A; H]"
        )
        results.append(
            [out, z, *gradients([out, z], [torch.ones_like(out), torch.ones_like(z)], [x, a, b, heads])]
        )
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("owner", [[0], [0, 0, 1], [2, 0, 1, 1, 0, 2, 2]], ids=str)
def test_weigh(owner, dtype):
    """Each rank row times its owner's weight and scale, entry by entry; nothing but S and w is kept."""
    torch.manual_seed(0)
    tokens, sites, experts = 5, 2, max(owner) + 1
    s, w, scale = (
        randn(tokens, sites, len(owner)),
        randn(tokens, sites, experts),
        torch.rand(experts, dtype=torch.float64),
    )
    spread = torch.zeros(experts, len(owner), dtype=torch.float64)
    for row, e in enumerate(owner):
        spread[e, row] = scale[e]
    want = torch.stack([s[..., row] * w[..., e] * scale[e] for row, e in enumerate(owner)], -1)
    cotangent = torch.randn_like(want)
    expected = gradients(want, cotangent, [s, w])
    low = [t.detach().to(dtype).requires_grad_() for t in (s, w)]
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        got = lowrank.weigh(*low, spread)
    assert {t.data_ptr() for t in saved if t.dim() == 3} == {t.data_ptr() for t in low}
    assert_near("Sw", got, want, BOUND[dtype])
    for name, g, e in zip(
        ("s.grad", "w.grad"), gradients(got, cotangent.to(dtype), low), expected, strict=True
    ):
        assert_near(name, g, e, BOUND[dtype])
