"""linear_shrink and expand_add_ against fp64 loops over tokens and rank rows: outputs and every gradient, from random cotangents.

Run: python -m pytest tests/kernels/test_lowrank.py
"""

from __future__ import annotations

import pytest
import torch
from compare import assert_near, relative_rms
from torch.nn import functional as F

from moabench.kernels import lowrank

BOUND = {torch.float64: 1e-13, torch.float32: 2e-6}
SHAPES = [  # tokens, input width, output widths, rank rows
    (1, 7, (5,), 1),  # one token, one row
    (3, 16, (8, 8, 4), 6),  # q, k, v
    (70, 33, (17,), 11),  # odd and prime widths
    (5, 4, (), 3),  # a projection without a frozen linear
    (9, 3, (31, 1), 13),  # rank above the input width, one output
]


def randn(*shape, dtype=torch.float64, grad=True):
    return torch.randn(*shape, dtype=dtype).requires_grad_(grad)


def loop_linear_shrink(x, frozen, a):
    """Y_i[t] = W_i x[t] + b_i and S[t, r] = a[r] . x[t], one token and one row at a time."""
    ys = [torch.stack([w @ row + (0 if b is None else b) for row in x]) for w, b in frozen]
    return ys, torch.stack([torch.stack([a_row @ row for a_row in a]) for row in x])


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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("tokens", "d", "widths", "rows"), SHAPES)
def test_linear_shrink(tokens, d, widths, rows, bias, dtype):
    torch.manual_seed(0)
    x, a = randn(tokens, d), randn(rows, d)
    frozen = [(randn(b, d, grad=False), randn(b, grad=False) if bias else None) for b in widths]
    ys, s = loop_linear_shrink(x, frozen, a)
    cotangents = [torch.randn_like(t) for t in (*ys, s)]
    expected = gradients([*ys, s], cotangents, [x, a])

    x_, a_ = (t.detach().to(dtype).requires_grad_() for t in (x, a))
    frozen_ = [(w.to(dtype), None if b is None else b.to(dtype)) for w, b in frozen]
    ys_, s_ = lowrank.linear_shrink(x_, frozen_, a_)
    for i, (got, want) in enumerate(zip(ys_, ys, strict=True)):
        assert_near(f"y{i}", got, want, BOUND[dtype])
    assert_near("s", s_, s, BOUND[dtype])
    for name, got, want in zip(
        ("x.grad", "a.grad"), gradients([*ys_, s_], [c.to(dtype) for c in cotangents], [x_, a_]), expected, strict=True
    ):
        assert_near(name, got, want, BOUND[dtype])


@pytest.mark.parametrize("used", [(0,), (1,), (2,), (0, 2), (0, 1)])
def test_linear_shrink_where_some_outputs_are_unused(used):
    torch.manual_seed(0)
    x, a, frozen = randn(6, 5), randn(3, 5), [(randn(4, 5, grad=False), None), (randn(7, 5, grad=False), None)]
    ys, s = loop_linear_shrink(x, frozen, a)
    ys_, s_ = lowrank.linear_shrink(x, frozen, a)
    cotangents = [torch.randn_like(t) for t in (*ys, s)]
    pick = lambda values: [values[i] for i in used]  # noqa: E731
    want = torch.autograd.grad(pick([*ys, s]), [x, a], pick(cotangents), allow_unused=True, materialize_grads=True)
    got = torch.autograd.grad(pick([*ys_, s_]), [x, a], pick(cotangents), allow_unused=True, materialize_grads=True)
    for name, g, w in zip(("x.grad", "a.grad"), got, want, strict=True):
        assert_near(name, g, w, 1e-13)


@pytest.mark.parametrize(("x_grad", "a_grad"), [(True, False), (False, True), (False, False)])
def test_linear_shrink_where_something_needs_no_gradient(x_grad, a_grad):
    torch.manual_seed(0)
    x, a, w = randn(6, 5, grad=x_grad), randn(3, 5, grad=a_grad), randn(4, 5, grad=False)
    (y,), s = lowrank.linear_shrink(x, [(w, None)], a)
    assert_near("y", y, x @ w.t(), 1e-13)
    if not (x_grad or a_grad):
        assert not s.requires_grad
        return
    cotangent = torch.randn_like(s)
    s.backward(cotangent)
    assert (x.grad is not None, a.grad is not None) == (x_grad, a_grad)
    if a_grad:
        assert_near("a.grad", a.grad, cotangent.t() @ x, 1e-13)


def test_no_grad_mode_and_frozen_weights():
    torch.manual_seed(0)
    x, a, w, b = randn(6, 5), randn(3, 5), randn(4, 5), randn(4)
    with torch.no_grad():
        (y,), s = lowrank.linear_shrink(x, [(w, b)], a)
        assert not y.requires_grad and not s.requires_grad
        assert torch.equal(y, F.linear(x, w, b)) and torch.equal(s, F.linear(x, a))
    (y,), s = lowrank.linear_shrink(x, [(w, b)], a)  # weights that do train get their gradients
    (y.sum() + s.sum()).backward()
    assert_near("w.grad", w.grad, x.sum(0).expand(4, -1), 1e-13)
    assert_near("b.grad", b.grad, torch.full_like(b, 6.0), 1e-13)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
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
def test_expand_add(parts, tokens, dtype):
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

    low = [t.detach().to(dtype).requires_grad_() for t in tensors]
    inner = low[0] * 1  # the frozen output is never a leaf
    got = lowrank.expand_add_(inner, [(low[1 + 2 * i], low[2 + 2 * i], *term[2:]) for i, term in enumerate(terms)])
    assert got.data_ptr() == inner.data_ptr(), "y is overwritten, not copied"
    assert_near("y", got, want, BOUND[dtype])
    names = ["y.grad", *(f"{n}{i}.grad" for i in range(len(terms)) for n in "sb")]
    for name, g, w in zip(names, gradients(got, cotangent.to(dtype), low), expected, strict=True):
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
    """fp32 adapters over a bf16 base: error against fp64 at most twice that of the plain bf16 torch form."""
    torch.manual_seed(0)
    x, w, a, b = randn(70, 64), randn(48, 64, grad=False), randn(16, 64), randn(48, 16)
    cotangent = torch.randn(70, 48).double()

    def run(form, dtype):
        x_, a_, b_ = x.detach().to(dtype).requires_grad_(), a.detach().requires_grad_(), b.detach().requires_grad_()
        y = form(x_, w.to(dtype), a_, b_)
        return [y, *gradients(y, cotangent.to(dtype), [x_, a_, b_])]

    def plain(x, w, a, b):
        return F.linear(x, w) + F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype))

    def ours(x, w, a, b):
        (y,), s = lowrank.linear_shrink(x, [(w, None)], a)
        return lowrank.expand_add_(y, [(s, b)])

    exact = run(plain, torch.float64)
    for name, got, reference, want in zip(
        ("y", "x.grad", "a.grad", "b.grad"), run(ours, torch.bfloat16), run(plain, torch.bfloat16), exact, strict=True
    ):
        assert relative_rms(got, want) <= 2 * relative_rms(reference, want), name


def test_autocast_gives_the_plain_result():
    torch.manual_seed(0)
    x, a, w = randn(6, 8, dtype=torch.float32), randn(3, 8, dtype=torch.float32), randn(4, 8, dtype=torch.float32, grad=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (y,), s = lowrank.linear_shrink(x, [(w, None)], a)
        assert y.dtype == s.dtype == torch.bfloat16
        assert torch.equal(y, F.linear(x, w)) and torch.equal(s, F.linear(x, a))


def test_gradcheck():
    torch.manual_seed(0)
    x, a, b, w = randn(3, 4), randn(2, 4), randn(5, 2), randn(5, 4, grad=False)
    assert torch.autograd.gradcheck(lambda x, a: (lambda ys, s: (*ys, s))(*lowrank.linear_shrink(x, [(w, None)], a)), (x, a))
    y, s = randn(3, 5), randn(3, 2)
    assert torch.autograd.gradcheck(lambda y, s, b: lowrank.expand_add_(y * 1, [(s, b), (s, b[:2], slice(1, 3))]), (y, s, b))


def test_repeats_bitwise_and_saves_nothing_of_output_width():
    tokens, width = 13, 512
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        x, a, b = (randn(*s, dtype=torch.float32) for s in ((tokens, 8), (3, 8), (width, 3)))
        w = randn(width, 8, dtype=torch.float32, grad=False)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
            (y,), s = lowrank.linear_shrink(x, [(w, None)], a)
            out = lowrank.expand_add_(y, [(s, b)])
        own = {t.data_ptr() for t in (x, a, b, w, s)}
        assert not [t.shape for t in saved if tokens in t.shape and width in t.shape], "an activation of output width is saved"
        assert sum(t.nbytes for t in saved if t.data_ptr() not in own) == 0, "bytes saved beyond x, S and the parameters"
        results.append([out, *gradients(out, torch.ones_like(out), [x, a, b])])
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)
