"""The Triton kernels of shrink, expand and outer against fp64: ragged tiles, ranks, strides, bf16, compiled
and checkpointed.

tests/kernels/test_lowrank.py compares the nodes that run on them with loops. Run: python -m pytest
tests/kernels/test_triton_lowrank.py (in Triton's interpreter where there is no GPU)
"""

from __future__ import annotations

import pytest
import torch
from compare import assert_near, relative_rms
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton", reason="Triton is not installed")

from moabench.kernels import backend, lowrank
from moabench.kernels.triton import lowrank as kernels
from moabench.kernels.triton.common import pieces

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BOUND = {torch.float32: 2e-6, torch.bfloat16: 6e-3}
SHAPES = [  # tokens, width, rank rows, router rows
    (1, 16, 1, 0),  # one token, one rank row
    (64, 128, 16, 8),  # whole tiles
    (65, 33, 24, 3),  # one more than a tile, odd width
    (3, 130, 64, 13),  # fewer tokens than a tile, width above one step
    (70, 7, 72, 24),  # two pieces, q, k and v routers
    (5, 48, 200, 17),  # more rank rows than one program holds
    (9, 20, 0, 5),  # routers alone
    (0, 20, 8, 5),  # no token
]


def randn(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=torch.float64).to(DEVICE, dtype)


@pytest.mark.parametrize(
    "rows", [1, 7, 8, 16, 17, 24, 33, 48, 64, 72, 96, 100, 128, 129, 160, 192, 193, 1000]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pieces_hold_the_rows_with_little_to_spare(rows, dtype):
    first, second = pieces(rows, dtype)
    most = 128 if dtype == torch.float32 else 192
    assert min(rows, most) <= first + second <= max(16 if rows <= 16 else 32, 1.5 * min(rows, most))
    assert all(width in (0, 16, 32, 64, 128) for width in (first, second))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_steps(shape, dtype):
    """Each kernel on the numbers that it is given: the error is that of rounding the result."""
    torch.manual_seed(0)
    tokens, d, rows, heads = shape
    x, a, h, s, b = (
        randn(*n, dtype=dtype) for n in ((tokens, d), (rows, d), (heads, d), (tokens, rows), (d, rows))
    )
    h = randn(heads, d, dtype=torch.float32) if heads else None
    fine = [None if t is None else t.double() for t in (x, a, h, s, b)]
    got_s, got_z = kernels.shrink_both(x, a, h)
    assert got_s.dtype == dtype
    assert_near("S", got_s, fine[0] @ fine[1].t(), BOUND[dtype])
    if heads:
        assert got_z.dtype == torch.float32
        assert_near("Z", got_z, fine[0] @ fine[2].t(), 2e-6)  # exact products whatever the dtype of X
    else:
        assert got_z is None
    y = randn(tokens, d, dtype=dtype)
    want = y.double() + fine[3] @ fine[4].t()
    assert kernels.add_(y, s, b) is y
    assert_near("Y", y, want, BOUND[dtype])
    assert_near("outer", kernels.outer(s, x), fine[3].t() @ fine[0], BOUND[dtype])
    assert_near("product", kernels.product(x, b), fine[0] @ fine[4], BOUND[dtype])


def test_strided_views():
    """A slice of a fused linear's output is written in place, and transposed matrices are read as they
    lie."""
    torch.manual_seed(0)
    fused, s, b = (
        randn(70, 50, dtype=torch.float32),
        randn(70, 40, dtype=torch.float32),
        randn(5, 21, dtype=torch.float32).t(),
    )
    before, part = fused.clone(), s[:, 10:15]
    want = before[:, 20:41].double() + part.double() @ b.double().t()
    kernels.add_(fused[:, 20:41], part, b)
    assert_near("slice", fused[:, 20:41], want, 2e-6)
    assert torch.equal(fused[:, :20], before[:, :20]) and torch.equal(fused[:, 41:], before[:, 41:])
    tall = randn(5, 70, dtype=torch.float32).t()  # unit stride along the tokens
    assert_near("outer of a transpose", kernels.outer(part, tall), part.double().t() @ tall.double(), 2e-6)
    assert_near("shrink of a transpose", kernels.product(tall, b[:5]), tall.double() @ b[:5].double(), 2e-6)


def mixture(x, w, a, b, h):
    """A frozen linear, two experts of ranks 3 and 5, and their router."""
    (y,), s, z = lowrank.linear_shrink(x, [(w, None)], a, h)
    weights = torch.repeat_interleave(z.softmax(-1), torch.tensor([3, 5], device=x.device), 1, output_size=8)
    return lowrank.expand_add_(y, [(s * weights.to(s.dtype), b)])


def tensors(dtype=torch.float32):
    torch.manual_seed(0)
    x, w, a, b, h = randn(66, 24), randn(20, 24), randn(8, 24), randn(20, 8), randn(2, 24)
    low = [x.to(dtype).requires_grad_(), w.to(dtype), *(t.float().requires_grad_() for t in (a, b, h))]
    return low, randn(66, 20)


def run(form, dtype=torch.float32):
    low, cotangent = tensors(dtype)
    y = form(*low)
    return [y, *torch.autograd.grad(y, [low[0], *low[2:]], cotangent.to(y.dtype))]


NAMES = ("y", "x.grad", "a.grad", "b.grad", "h.grad")


def test_bf16_is_as_good_as_plain_torch():
    """Error against fp64 at most twice that of the same sums in plain bf16 torch; the router's gradient,
    formed in bf16 like the others, as good as A's."""

    def plain(x, w, a, b, h):
        z = F.linear(x.to(torch.promote_types(x.dtype, torch.float32)), h)
        weights = torch.repeat_interleave(
            z.softmax(-1), torch.tensor([3, 5], device=x.device), 1, output_size=8
        )
        return F.linear(x, w) + F.linear(F.linear(x, a.to(x.dtype)) * weights.to(x.dtype), b.to(x.dtype))

    low, cotangent = tensors(torch.bfloat16)
    fine = [t.detach().double().requires_grad_() for t in low]
    y = plain(*fine)
    want = [y, *torch.autograd.grad(y, [fine[0], *fine[2:]], cotangent)]
    with backend.use("triton"):
        got = run(mixture, torch.bfloat16)
    reference = run(plain, torch.bfloat16)
    errors = dict(zip(NAMES, map(relative_rms, reference, want), strict=True)) | {
        "h.grad": relative_rms(reference[2], want[2])
    }
    for name, g, w in zip(NAMES, got, want, strict=True):
        assert relative_rms(g, w) <= 2 * errors[name], name


def test_repeats_bitwise():
    with backend.use("triton"):
        for first, second in zip(run(mixture), run(mixture), strict=True):
            assert torch.equal(first, second)


def test_experts_may_be_permuted():
    """Rank rows in another order give the same output."""
    low, _ = tensors()
    x, w, a, b, _ = low
    with backend.use("triton"):
        (y,), s, _ = lowrank.linear_shrink(x, [(w, None)], a)
        want = lowrank.expand_add_(y, [(s, b)])
        order = torch.tensor([5, 2, 7, 0, 1, 6, 4, 3])
        (y,), s, _ = lowrank.linear_shrink(x, [(w, None)], a[order])
        assert_near("y", lowrank.expand_add_(y, [(s, b[:, order])]), want, 1e-6)


def test_weight_zero_gives_the_base_bitwise():
    low, _ = tensors()
    with backend.use("triton"):
        (y,), s, _ = lowrank.linear_shrink(low[0], [(low[1], None)], low[2])
        assert torch.equal(lowrank.expand_add_(y, [(s * 0, low[3])]), F.linear(low[0], low[1]))


@pytest.mark.parametrize("kernels_", ["torch", "triton"])
def test_compiled_without_a_graph_break(kernels_):
    with backend.use(kernels_):
        want = run(mixture)
        got = run(torch.compile(mixture, backend="aot_eager", fullgraph=True))
    for name, g, w in zip(NAMES, got, want, strict=True):
        assert_near(name, g, w, 1e-6)


@pytest.mark.parametrize("kernels_", ["torch", "triton"])
def test_recomputed_under_checkpointing(kernels_):
    with backend.use(kernels_):
        want = run(mixture)
        got = run(lambda *low: checkpoint(mixture, *low, use_reentrant=False))
    for name, g, w in zip(NAMES, got, want, strict=True):
        assert torch.equal(g, w), name


@pytest.mark.parametrize("op", ["shrink", "expand_add_", "outer"])
def test_registrations(op):
    """Schema, fake implementation and mutation marks, as torch checks them."""
    x, a, h, y, s = (randn(*n, dtype=torch.float32) for n in ((9, 12), (5, 12), (3, 12), (9, 7), (9, 5)))
    arguments = {
        "shrink": (x, a, h),
        "expand_add_": (y, s, randn(7, 5, dtype=torch.float32)),
        "outer": (s, y),
    }[op]
    torch.library.opcheck(getattr(kernels, op), arguments, test_utils=("test_schema", "test_faketensor"))
