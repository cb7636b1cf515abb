"""mix_ffn against an fp64 loop over tokens and selected experts: outputs and every gradient, from random
cotangents, on both backends.

Run: python -m pytest tests/kernels/test_mix_ffn.py
"""

from __future__ import annotations

import math

import pytest
import torch
from compare import assert_near, relative_rms

from moabench.kernels import backend
from moabench.kernels.mix_ffn import ACTIVATIONS, mix_ffn

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RUNS = [("torch", torch.float64), ("torch", torch.float32), ("triton", torch.float32)]
NAMES = ("gate", "up", "s_gate", "s_up", "b_gate", "b_up", "a_down", "weights")
BOUND = {torch.float64: 1e-13, torch.float32: 3e-6}
SHAPES = [  # tokens, inner width, experts, rank, selected (0: all, without ids)
    (1, 5, 1, 1, 1),  # one of everything
    (3, 7, 5, 2, 2),  # prime number of experts
    (70, 9, 4, 3, 1),  # k = 1
    (3, 8, 4, 2, 4),  # k = E
    (5, 11, 3, 4, 0),  # a soft router
    (2, 6, 8, 1, 3),  # more experts than assignments: some have no token
]
FORMULAS = {
    "silu": lambda a: a / (1 + torch.exp(-a)),
    "relu": lambda a: torch.where(a > 0, a, 0.0),
    "gelu": lambda a: a * 0.5 * (1 + torch.erf(a / math.sqrt(2))),
    "gelu_tanh": lambda a: 0.5 * a * (1 + torch.tanh(math.sqrt(2 / math.pi) * (a + 0.044715 * a**3))),
}


def inputs(tokens, f, experts, rank, k, dtype=torch.float64, ids=None):
    rows = experts * rank
    shapes = ((tokens, f), (tokens, f), (tokens, rows), (tokens, rows), (f, rows), (f, rows), (rows, f))
    tensors = [torch.randn(*s, dtype=torch.float64) for s in shapes]
    if ids is None and k:
        ids = torch.stack([torch.randperm(experts)[:k] for _ in range(tokens)])
    weights = torch.rand(tokens, experts, dtype=torch.float64)
    if ids is not None:
        weights = torch.zeros_like(weights).scatter(1, ids, weights.gather(1, ids))
    return [t.to(dtype).requires_grad_() for t in (*tensors, weights)], ids


def loop(gate, up, s_gate, s_up, b_gate, b_up, a_down, weights, ids, act, keep=None):
    """hbar[t] = sum_e w_te h_te and z[t, rows of e] = w_te A_e (h_te * keep[t]), expert by expert."""
    tokens, experts = weights.shape
    rank = s_gate.shape[1] // experts
    hbar, z = [], []
    for t in range(tokens):
        h_t, z_t = torch.zeros_like(gate[t]), [torch.zeros(rank, dtype=gate.dtype) for _ in range(experts)]
        for e in range(experts) if ids is None else ids[t].tolist():
            rows = slice(e * rank, (e + 1) * rank)
            a = gate[t] + b_gate[:, rows] @ s_gate[t, rows]
            b = up[t] + b_up[:, rows] @ s_up[t, rows]
            h = FORMULAS[act](a) * b
            h_t = h_t + weights[t, e] * h
            z_t[e] = weights[t, e] * (a_down[rows] @ (h if keep is None else h * keep[t]))
        hbar.append(h_t)
        z.append(torch.cat(z_t))
    return torch.stack(hbar), torch.stack(z)


def compare(tensors, ids, act, dtype, dropout=0.0, keep=None, kernels="torch"):
    want = loop(*tensors, ids, act, keep)
    cotangents = [torch.randn_like(t) for t in want]
    expected = torch.autograd.grad(want, tensors, cotangents)
    device = DEVICE if kernels == "triton" else "cpu"
    low = [t.detach().to(device, dtype).requires_grad_() for t in tensors]
    torch.manual_seed(7)
    with backend.use(kernels):
        got = mix_ffn(*low, None if ids is None else ids.to(device), act=act, dropout=dropout)
    for name, g, w in zip(("hbar", "z"), got, want, strict=True):
        assert_near(name, g, w, BOUND[dtype])
    grads = torch.autograd.grad(got, low, [c.to(low[0]) for c in cotangents])
    for name, g, w in zip(NAMES, grads, expected, strict=True):
        assert_near(f"{name}.grad", g, w, BOUND[dtype])


@pytest.mark.parametrize(("kernels", "dtype"), RUNS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_outputs_and_gradients(shape, kernels, dtype):
    torch.manual_seed(0)
    tensors, ids = inputs(*shape)
    compare(tensors, ids, "silu", dtype, kernels=kernels)


@pytest.mark.parametrize(("kernels", "dtype"), RUNS[::2])
@pytest.mark.parametrize("k", [0, 2])
@pytest.mark.parametrize("act", sorted(ACTIVATIONS))
def test_activations(act, k, kernels, dtype):
    torch.manual_seed(0)
    tensors, ids = inputs(6, 7, 3, 2, k)
    compare(tensors, ids, act, dtype, kernels=kernels)


@pytest.mark.parametrize(("kernels", "dtype"), RUNS[::2])
@pytest.mark.parametrize("k", [1, 2])
def test_all_tokens_to_the_same_experts(k, kernels, dtype):
    torch.manual_seed(0)
    ids = torch.tensor([[3, 1][:k]] * 9)
    tensors, _ = inputs(9, 5, 5, 2, k, ids=ids)
    compare(tensors, ids, "silu", dtype, kernels=kernels)
    low = [t.detach().to(dtype).requires_grad_() for t in tensors]
    with backend.use(kernels):
        got = mix_ffn(*low, ids)
    grad = torch.autograd.grad(got[0].sum() + got[1].sum(), low[4])[0].unflatten(1, (5, 2))
    idle = [e for e in range(5) if e not in ids[0]]
    assert not grad[:, idle].count_nonzero(), "an expert without a token got a gradient"


@pytest.mark.parametrize(("kernels", "dtype"), RUNS[::2])
@pytest.mark.parametrize("k", [0, 1, 2])
def test_dropout_is_one_seeded_mask_on_the_input_of_a_down(k, kernels, dtype):
    torch.manual_seed(0)
    tensors, ids = inputs(8, 7, 3, 2, k)
    torch.manual_seed(7)
    keep = torch.empty(8, 7, dtype=dtype).bernoulli_(0.6).div_(0.6).double()
    assert 0 < (keep == 0).sum() < keep.numel()
    compare(tensors, ids, "silu", dtype, dropout=0.4, keep=keep, kernels=kernels)


@pytest.mark.parametrize("output", [0, 1])
def test_one_output_used(output):
    torch.manual_seed(0)
    tensors, ids = inputs(6, 5, 4, 2, 2)
    want = loop(*tensors, ids, "silu")[output]
    cotangent = torch.randn_like(want)
    expected = torch.autograd.grad(want, tensors, cotangent, allow_unused=True, materialize_grads=True)
    got = torch.autograd.grad(
        mix_ffn(*tensors, ids)[output], tensors, cotangent, allow_unused=True, materialize_grads=True
    )
    for name, g, w in zip(NAMES, got, expected, strict=True):
        assert_near(f"{name}.grad", g, w, 1e-13)


def test_dense_masked_equals_selected():
    """Passing all experts with zero weights for the unselected ones is the same mixture."""
    torch.manual_seed(0)
    tensors, ids = inputs(9, 6, 5, 2, 2)
    for name, sparse, dense in zip(
        ("hbar", "z"), mix_ffn(*tensors, ids), mix_ffn(*tensors, None), strict=True
    ):
        assert_near(name, sparse, dense, 1e-13)


@pytest.mark.parametrize("k", [0, 1, 2])
def test_gradcheck(k):
    torch.manual_seed(0)
    tensors, ids = inputs(3, 4, 3, 2, k)
    weights = tensors[-1]
    # a weight that is not selected is no input of the mixture: the loop above has its gradient
    if ids is not None:
        weights = weights.detach()
    assert torch.autograd.gradcheck(lambda *t: mix_ffn(*t, ids), [*tensors[:-1], weights])


@pytest.mark.parametrize("k", [0, 2])
def test_bf16_is_as_good_as_the_plain_form(k):
    """fp32 adapters over a bf16 base: error against fp64 at most twice that of the same sums in plain bf16
    torch."""
    torch.manual_seed(0)
    tensors, ids = inputs(40, 32, 4, 4, k)
    cotangents = [torch.randn(40, 32).double(), torch.randn(40, 16).double()]

    def plain(gate, up, s_gate, s_up, b_gate, b_up, a_down, weights, ids):
        split = lambda t: t.unflatten(-1, (4, 4))  # noqa: E731
        a = gate[:, None] + torch.einsum("ter,fer->tef", split(s_gate), split(b_gate))
        b = up[:, None] + torch.einsum("ter,fer->tef", split(s_up), split(b_up))
        h = torch.nn.functional.silu(a) * b
        z = torch.einsum("tef,erf->ter", h, a_down.unflatten(0, (4, 4))) * weights[..., None]
        return (h * weights[..., None]).sum(1), z.flatten(1)

    def run(form, dtype):
        low = [t.detach().to(dtype).requires_grad_() for t in tensors]
        got = form(*low, ids)
        return [*got, *torch.autograd.grad(got, low, [c.to(dtype) for c in cotangents])]

    exact, ours, theirs = run(plain, torch.float64), run(mix_ffn, torch.bfloat16), run(plain, torch.bfloat16)
    for name, got, reference, want in zip(("hbar", "z", *NAMES), ours, theirs, exact, strict=True):
        # the plain form also has the gradient of weights that are not selected
        if name == "weights" and ids is not None:
            got, reference, want = (t.gather(1, ids) for t in (got, reference, want))
        assert relative_rms(got, want) <= 2 * relative_rms(reference, want), name


def test_repeats_bitwise_and_has_no_gradient_in_no_grad_mode():
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        tensors, ids = inputs(9, 6, 5, 2, 2, dtype=torch.float32)
        got = mix_ffn(*tensors, ids, dropout=0.3)
        results.append([*got, *torch.autograd.grad(got[0].sum() + got[1].square().sum(), tensors)])
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)
    with torch.no_grad():
        assert not any(t.requires_grad for t in mix_ffn(*tensors, ids))
