"""The Triton kernels of mix_ffn: ragged tiles and ranks, bf16, what is saved, compiled and checkpointed.

tests/kernels/test_mix_ffn.py compares both backends with a loop. Run: python -m pytest
tests/kernels/test_triton_mix_ffn.py (in Triton's interpreter where there is no GPU)
"""

from __future__ import annotations

import pytest
import torch
from compare import assert_near, relative_rms
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton", reason="Triton is not installed")

from moabench.kernels import backend
from moabench.kernels.mix_ffn import mix_ffn
from moabench.kernels.triton import mix_ffn as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("hbar", "z", "gate", "up", "s_gate", "s_up", "b_gate", "b_up", "a_down", "weights")
SHAPES = [  # tokens, inner width, experts, rank, selected (0: all)
    (33, 65, 8, 8, 2),  # one more than a tile, both ways
    (17, 40, 5, 16, 1),
    (40, 33, 4, 32, 3),
    (5, 70, 2, 64, 2),
    (9, 34, 3, 1, 0),
    (0, 12, 3, 2, 1),  # no token
]


def inputs(tokens, f, experts, r, k, dtype=torch.float32):
    torch.manual_seed(0)
    rows = experts * r
    shapes = ((tokens, f), (tokens, f), (tokens, rows), (tokens, rows), (f, rows), (f, rows), (rows, f))
    tensors = [torch.randn(*s).to(DEVICE, dtype) for s in shapes]
    tensors[4:] = [t / r**0.5 for t in tensors[4:]]
    weights = torch.rand(tokens, experts).to(DEVICE)
    ids = (
        torch.stack([torch.randperm(experts)[:k] for _ in range(tokens)]).to(DEVICE) if k and tokens else None
    )
    if k and not tokens:
        ids = torch.zeros(0, k, dtype=torch.int64, device=DEVICE)
    if ids is not None:
        weights = torch.zeros_like(weights).scatter(1, ids, weights.gather(1, ids))
    return [t.requires_grad_() for t in (*tensors, weights)], ids


def run(form, tensors, ids, **options):
    torch.manual_seed(3)
    got = form(*tensors, ids, **options)
    cotangents = [torch.randn(t.shape).to(t) for t in got]
    return [*got, *torch.autograd.grad(got, tensors, cotangents)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equal_to_torch(shape):
    tensors, ids = inputs(*shape)
    with backend.use("torch"):
        want = run(mix_ffn, tensors, ids)
    with backend.use("triton"):
        got = run(mix_ffn, tensors, ids)
    for name, g, w in zip(NAMES, got, want, strict=True):
        assert_near(name, g, w, 5e-6)


@pytest.mark.parametrize("k", [0, 2])
def test_bf16_is_as_good_as_torch(k):
    """Error against fp64 at most twice that of the torch backend in bf16; truncation to bf16 in the
    interpreter costs another factor."""
    tensors, ids = inputs(24, 34, 4, 8, k, torch.bfloat16)
    fine = [t.detach().double().requires_grad_() for t in tensors]
    exact = run(mix_ffn, fine, ids)
    with backend.use("torch"):
        reference = run(mix_ffn, tensors, ids)
    with backend.use("triton"):
        got = run(mix_ffn, tensors, ids)
    for name, g, r, w in zip(NAMES, got, reference, exact, strict=True):
        assert relative_rms(g, w) <= 2 * max(relative_rms(r, w), 2**-9 if DEVICE == "cuda" else 2**-8), name


def test_an_expert_without_tokens_is_skipped_not_wrong():
    tensors, _ = inputs(20, 33, 4, 4, 1)
    ids = torch.ones(20, 1, dtype=torch.int64, device=DEVICE)
    tensors[-1] = torch.rand(20, 4, device=DEVICE).mul(torch.eye(4, device=DEVICE)[1]).requires_grad_()
    with backend.use("triton"):
        got = run(mix_ffn, tensors, ids)
    for name, g in list(zip(NAMES, got, strict=True))[4:9]:
        by_expert = (
            g.unflatten(1, (4, 4)) if name != "a_down" else g.unflatten(0, (4, 4)).transpose(0, 1)[None]
        )
        idle = by_expert[:, [0, 2, 3]] if name != "a_down" else g.unflatten(0, (4, 4))[[0, 2, 3]]
        assert not idle.count_nonzero(), name
        assert g.isfinite().all(), name


def test_experts_may_be_permuted():
    tensors, ids = inputs(20, 33, 4, 4, 2)
    order = torch.tensor([2, 0, 3, 1])
    places = order.argsort()
    columns = lambda t: t.unflatten(1, (4, 4))[:, order].flatten(1)  # noqa: E731
    moved = [
        *tensors[:2],
        *(columns(t) for t in tensors[2:6]),
        tensors[6].unflatten(0, (4, 4))[order].flatten(0, 1),
        tensors[7][:, order],
    ]
    with backend.use("triton"):
        hbar, z = mix_ffn(*tensors, ids)
        hbar_moved, z_moved = mix_ffn(*moved, places[ids])
    assert_near("hbar", hbar_moved, hbar, 1e-6)
    assert_near("z", z_moved, columns(z), 1e-6)


def test_saves_nothing_of_inner_width_but_gate_and_up():
    tensors, ids = inputs(33, 65, 4, 8, 2)
    saved: list[torch.Tensor] = []
    with (
        backend.use("triton"),
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
    ):
        mix_ffn(*tensors, ids)
    wide = {t.untyped_storage().data_ptr() for t in saved if t.shape == (33, 65)}
    assert wide <= {t.untyped_storage().data_ptr() for t in tensors[:2]}


def test_repeats_bitwise_compiles_and_is_recomputed():
    tensors, ids = inputs(20, 33, 4, 4, 2)
    with backend.use("triton"):
        want, again = run(mix_ffn, tensors, ids, dropout=0.3), run(mix_ffn, tensors, ids, dropout=0.3)
        kept = run(
            lambda *t, **o: checkpoint(mix_ffn, *t, use_reentrant=False, **o), tensors, ids, dropout=0.3
        )
        plain = run(mix_ffn, tensors, ids)
        compiled = run(torch.compile(mix_ffn, backend="aot_eager", fullgraph=True), tensors, ids)
    for name, w, a, c in zip(NAMES, want, again, kept, strict=True):
        assert torch.equal(w, a) and torch.equal(w, c), name
    for name, w, c in zip(NAMES, plain, compiled, strict=True):
        assert_near(name, c, w, 1e-6)


def test_registrations():
    tensors, ids = inputs(9, 20, 3, 2, 2)
    chosen = torch.zeros(9, 3, dtype=torch.bool, device=DEVICE).scatter_(1, ids, True)
    torch.library.opcheck(
        kernels.mix_ffn,
        (*tensors, chosen, None, "silu"),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


def test_more_experts_than_the_kernels_hold():
    tensors, ids = inputs(3, 5, 32, 17, 2)
    with (
        backend.use("triton"),
        pytest.raises(ValueError, match="32 experts of rank 17 have more than the 256 rank rows"),
    ):
        mix_ffn(*tensors, ids)
