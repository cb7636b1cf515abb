"""norm_shrink against an fp64 loop written from its equation, and against the norm followed by linear_shrink.

Run: python -m pytest tests/kernels/test_norm_shrink.py
"""

from __future__ import annotations

import pytest
import torch
from compare import assert_near, relative_rms

from moabench.kernels import backend, lowrank
from moabench.kernels.norm_shrink import norm_shrink

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RUNS = [("torch", torch.float64), ("torch", torch.float32), ("triton", torch.float32)]
BOUND = {torch.float64: 1e-12, torch.float32: 4e-6}
SHAPES = [  # tokens, width, rank rows, router rows
    (1, 5, 1, 0),
    (3, 16, 6, 9),
    (70, 33, 24, 3),
    (66, 130, 40, 24),
    (5, 8, 0, 4),
]
EPS = 1e-5


def inputs(tokens, d, rows, heads):
    torch.manual_seed(0)
    x, g = torch.randn(tokens, d).double() * 3, torch.rand(d).double() + 0.5
    return x, g, torch.randn(rows, d).double(), torch.randn(heads, d).double() if heads else None


def loop(x, g, a, h):
    """y[t, i] = g[i] x[t, i] / sqrt(mean_j x[t, j]^2 + eps), s[t, r] = a[r] . y[t], one token at a time."""
    ys, ss, zs = [], [], []
    for row in x:
        y = g * row / torch.sqrt((row**2).mean() + EPS)
        ys.append(y)
        ss.append(a @ y)
        zs.append(y[:0] if h is None else h @ y)
    return torch.stack(ys), torch.stack(ss), torch.stack(zs)


@pytest.mark.parametrize(("kernels", "dtype"), RUNS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_outputs_and_gradients(shape, kernels, dtype):
    x, g, a, h = inputs(*shape)
    trained = [t.requires_grad_() for t in (x, a, h) if t is not None]
    want = loop(x, g, a, h)
    cotangents = [torch.randn_like(t) for t in want]
    expected = torch.autograd.grad(want, trained, cotangents, allow_unused=True, materialize_grads=True)
    device = DEVICE if kernels == "triton" else "cpu"
    low = [t.detach().to(device, dtype).requires_grad_() for t in trained]
    with backend.use(kernels):
        y, s, z = norm_shrink(low[0], g.to(device, dtype), EPS, *low[1:])
    got = [y, s] if h is None else [y, s, z]
    for name, one, w in zip(("Y", "S", "Z"), got, want, strict=False):
        assert_near(name, one, w, BOUND[dtype])
    grads = torch.autograd.grad(got, low, [c.to(low[0]) for c in cotangents[: len(got)]], allow_unused=True)
    for name, one, w in zip(("x.grad", "a.grad", "h.grad"), grads, expected, strict=False):
        assert_near(name, one, w, BOUND[dtype])


@pytest.mark.parametrize("used", [(0,), (1,), (2,), (0, 2), (1, 2)])
@pytest.mark.parametrize(("kernels", "dtype"), RUNS[1:])
def test_some_outputs_unused(used, kernels, dtype):
    x, g, a, h = inputs(7, 12, 5, 3)
    trained = [t.requires_grad_() for t in (x, a, h)]
    want = loop(x, g, a, h)
    cotangents = [torch.randn_like(t) for t in want]
    options = {"allow_unused": True, "materialize_grads": True}
    expected = torch.autograd.grad([want[i] for i in used], trained, [cotangents[i] for i in used], **options)
    low = [t.detach().to(DEVICE, dtype).requires_grad_() for t in trained]
    with backend.use(kernels):
        got = norm_shrink(low[0], g.to(low[0]), EPS, *low[1:])
    grads = torch.autograd.grad(
        [got[i] for i in used], low, [cotangents[i].to(low[0]) for i in used], **options
    )
    for name, one, w in zip(("x.grad", "a.grad", "h.grad"), grads, expected, strict=True):
        assert_near(name, one, w, BOUND[dtype])


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_bf16_equals_the_norm_followed_by_the_shrink(kernels):
    """Y is rounded as transformers' RMSNorm rounds it, and S and Z are of the rounded Y."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    x, g, a, h = inputs(20, 32, 16, 8)
    norm = LlamaRMSNorm(32, EPS).to(DEVICE, torch.bfloat16).requires_grad_(False)
    norm.weight.copy_(g)
    x, a, h = x.to(DEVICE, torch.bfloat16), a.to(DEVICE, torch.bfloat16), h.to(DEVICE, torch.float32)
    with backend.use(kernels):
        y, s, z = norm_shrink(x, norm.weight, EPS, a, h)
    want = norm(x)
    # A rounding may fall to the other side where rstd differs in its last digit; Triton's interpreter
    # truncates to bf16.
    bound = 1e-3 if kernels == "torch" or DEVICE == "cuda" else 2**-7
    assert relative_rms(y, want) < bound
    assert_near("S", s, y.double() @ a.double().t(), 2**-7)
    assert_near("Z", z, y.double() @ h.double().t(), 2e-6)
    assert z.dtype == torch.float32
    (_,), s_plain, _ = lowrank.linear_shrink(want, [(a, None)], a, h)
    assert relative_rms(s, s_plain) < 2 * max(bound, 2**-8)


def test_gradcheck():
    x, g, a, h = inputs(3, 4, 2, 3)
    x, a, h = (t.requires_grad_() for t in (x, a, h))
    assert torch.autograd.gradcheck(lambda x, a, h: norm_shrink(x, g, EPS, a, h), (x, a, h))


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_compiles_without_a_graph_break_and_repeats_bitwise(kernels):
    x, g, a, h = (t.to(DEVICE, torch.float32) for t in inputs(9, 12, 5, 3))
    x, a, h = (t.requires_grad_() for t in (x, a, h))

    def run(form):
        out = form(x, g, EPS, a, h)
        return [*out, *torch.autograd.grad([out[0].sum(), out[1].square().sum(), out[2].sum()], [x, a, h])]

    with backend.use(kernels):
        first, second, compiled = (
            run(norm_shrink),
            run(norm_shrink),
            run(torch.compile(norm_shrink, backend="aot_eager", fullgraph=True)),
        )
    for one, again, other in zip(first, second, compiled, strict=True):
        assert torch.equal(one, again)
        assert_near("compiled", other, one, 1e-6)


def test_a_norm_that_trains_is_refused():
    x, g, a, _ = inputs(3, 4, 2, 0)
    with pytest.raises(ValueError, match="the norm's weight is frozen"):
        norm_shrink(x, g.requires_grad_(), EPS, a)
