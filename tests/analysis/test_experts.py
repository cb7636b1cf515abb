"""Measures of experts: rank space against explicit outputs and updates, loops over definitions, invariances,
values by chance.

pytest tests/analysis/test_experts.py
"""

import math

import pytest
import torch

from moabench.analysis.measures import experts

N, D_IN, D_OUT = 200, 24, 20
RANKS = (3, 5, 4)
OWNER = torch.tensor([e for e, r in enumerate(RANKS) for _ in range(r)])


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def owned(p, owner):
    """[E, N, R]: projections p [N, R] where the expert owns the rank row, 0 elsewhere."""
    return torch.stack([p * (owner == e) for e in range(int(owner.max()) + 1)])


@pytest.fixture
def pairs():
    """x [N, D_IN], a [R, D_IN], b [D_OUT, R] of three experts of different ranks, and their explicit outputs
    [E, N, D_OUT]."""
    x, a, b = drawn(N, D_IN), drawn(sum(RANKS), D_IN, seed=1), drawn(D_OUT, sum(RANKS), seed=2)
    outputs = torch.stack([x @ a[e == OWNER].T @ b[:, e == OWNER].T for e in range(3)])
    return x, a, b, outputs


def test_rank_space_is_the_explicit_one(pairs):
    x, a, b, outputs = pairs
    coordinates = experts.rank_coordinates(owned(x @ a.T, OWNER), b)
    assert coordinates.shape == (3, N, sum(RANKS))
    torch.testing.assert_close(coordinates @ coordinates.mT, outputs @ outputs.mT)
    torch.testing.assert_close(experts.output_cosine(coordinates), experts.output_cosine(outputs))
    torch.testing.assert_close(experts.norms(coordinates), experts.norms(outputs))
    for debiased in (False, True):
        torch.testing.assert_close(experts.cka(coordinates, debiased), experts.cka(outputs, debiased))
    ranks = [experts.effective_rank(experts.spectrum(o)) for o in (coordinates, outputs)]
    torch.testing.assert_close(*ranks)


def test_more_rank_rows_than_outputs():
    """A down-projection narrower than all ranks together."""
    x, a, b = drawn(N, D_IN), drawn(12, D_IN, seed=1), drawn(6, 12, seed=2)
    owner = torch.arange(12) // 4
    outputs = torch.stack([x @ a[e == owner].T @ b[:, e == owner].T for e in range(3)])
    coordinates = experts.rank_coordinates(owned(x @ a.T, owner), b)
    assert coordinates.shape == (3, N, 6)
    torch.testing.assert_close(experts.cka(coordinates), experts.cka(outputs))


def test_cosine_by_a_loop_that_skips_zero_outputs():
    outputs = drawn(3, 10, 4)
    outputs[0, :4] = 0
    found = experts.output_cosine(outputs)
    for i in range(3):
        for j in range(3):
            kept = [t for t in range(10) if outputs[i, t].norm() > 0 and outputs[j, t].norm() > 0]
            by_hand = sum(torch.cosine_similarity(outputs[i, t], outputs[j, t], 0) for t in kept) / len(kept)
            assert found[i, j].item() == pytest.approx(by_hand.item())
    assert experts.zero_share(outputs).tolist() == [0.4, 0, 0]
    assert experts.off_diagonal(experts.output_cosine(torch.zeros(2, 5, 3))).isnan()


def hsic_by_loops(k, m):
    """Unbiased HSIC as a sum over tuples of different tokens: (ij,ij) + (ij,qr) - 2 (ij,iq)."""
    n = len(k)
    from itertools import permutations

    one = sum(k[i, j] * m[i, j] for i, j in permutations(range(n), 2)) / (n * (n - 1))
    two = sum(k[i, j] * m[q, r] for i, j, q, r in permutations(range(n), 4)) / math.perm(n, 4)
    three = sum(k[i, j] * m[i, q] for i, j, q in permutations(range(n), 3)) / math.perm(n, 3)
    return one + two - 2 * three


def test_debiased_cka_by_sums_over_tuples():
    x, y = drawn(7, 3), drawn(7, 3, seed=1) + 2
    k, m = (x @ x.T).tolist(), (y @ y.T).tolist()
    k, m = torch.tensor(k), torch.tensor(m)
    by_hand = hsic_by_loops(k, m) / (hsic_by_loops(k, k) * hsic_by_loops(m, m)).sqrt()
    assert experts.cka(torch.stack([x, y]))[0, 1].item() == pytest.approx(by_hand.item(), rel=1e-4)


def test_plain_cka_by_its_definition_in_both_forms():
    for n in (9, 200):  # fewer and more tokens than width
        x, y = drawn(n, 12), drawn(n, 12, seed=1)
        cx, cy = x - x.mean(0), y - y.mean(0)
        by_hand = (cy.T @ cx).norm() ** 2 / ((cx.T @ cx).norm() * (cy.T @ cy).norm())
        assert experts.cka(torch.stack([x, y]), debiased=False)[0, 1].item() == pytest.approx(by_hand.item())


def test_cka_ignores_rotation_scale_and_shift(pairs):
    outputs = pairs[-1]
    rotation = torch.linalg.qr(drawn(D_OUT, D_OUT, seed=5)).Q
    moved = outputs.clone()
    moved[0] = 3 * outputs[0] @ rotation + 7
    for debiased in (False, True):
        torch.testing.assert_close(experts.cka(moved, debiased), experts.cka(outputs, debiased))
        assert experts.cka(torch.stack([outputs[0], moved[0]]), debiased)[0, 1].item() == pytest.approx(1)


def test_unrelated_outputs_have_no_debiased_cka_where_the_plain_one_is_biased():
    """n = 2 d: the plain value of independent outputs is far from 0."""
    values = [
        experts.cka(drawn(2, 64, 32, seed=s), debiased)[0, 1].item()
        for debiased in (False, True)
        for s in range(40)
    ]
    assert sum(values[:40]) / 40 > 0.3
    assert abs(sum(values[40:]) / 40) < 0.01


def test_cka_of_nothing_is_undefined():
    outputs = torch.cat([drawn(1, 30, 4), torch.zeros(1, 30, 4)])
    assert experts.cka(outputs)[0, 1].isnan() and experts.cka(outputs)[0, 0].item() == pytest.approx(1)
    assert experts.cka(drawn(2, 3, 4)).isnan().all(), "the debiased one needs four tokens"


def test_cosine_of_updates_is_that_of_explicit_ones(pairs):
    _, a, b, _ = pairs
    updates = torch.stack([(b[:, e == OWNER] @ a[e == OWNER]).flatten() for e in range(3)])
    torch.testing.assert_close(experts.weight_products(a, b, OWNER), updates @ updates.T)
    expected = torch.cosine_similarity(updates.unsqueeze(0), updates.unsqueeze(1), dim=-1)
    torch.testing.assert_close(experts.weight_cosine(a, b, OWNER), expected)
    assert experts.weight_cosine(a, torch.zeros_like(b), OWNER).isnan().all()


def test_directions_are_those_of_the_explicit_update(pairs):
    _, a, b, _ = pairs
    s, left, right = experts.directions(a[:5], b[:, :5], energy=1.0)
    u, exact, v = torch.linalg.svd(b[:, :5] @ a[:5])
    torch.testing.assert_close(s, exact[:5])
    torch.testing.assert_close(left @ left.T, u[:, :5] @ u[:, :5].T)
    torch.testing.assert_close(right @ right.T, v[:5].T @ v[:5])


def test_unused_rank_rows_are_no_directions():
    a, b = torch.eye(4, 10).double(), torch.eye(12, 4).double() * torch.tensor([3.0, 1.0, 1e-3, 0.0])
    _, left, right = experts.directions(a, b, energy=0.89)
    assert left.shape == (12, 1) and right.shape == (10, 1)  # 90 % of the energy is in the first
    assert experts.directions(a, b, energy=0.95)[1].shape == (12, 2)
    assert experts.directions(a, 0 * b)[1].shape == (12, 0)
    assert experts.overlap(left[:, :0], left).isnan()


def test_overlap_and_distance_at_their_ends_and_by_chance():
    basis = torch.linalg.qr(drawn(60, 9)).Q
    u, v = basis[:, :4], basis[:, 4:9]
    assert experts.overlap(u, basis[:, :2]).item() == pytest.approx(1)
    assert experts.overlap(u, v).item() == pytest.approx(0, abs=1e-12)
    assert experts.grassmann_distance(u, v).item() == pytest.approx(1)
    assert experts.grassmann_distance(u, u).item() == pytest.approx(0, abs=1e-6)
    mean = sum(
        experts.overlap(
            torch.linalg.qr(drawn(60, 3, seed=2 * s)).Q, torch.linalg.qr(drawn(60, 6, seed=2 * s + 1)).Q
        )
        for s in range(200)
    )
    assert mean.item() / 200 == pytest.approx(experts.overlap_by_chance(3, 6, 60), rel=0.05)
    torch.testing.assert_close(experts.overlaps([u, v]), torch.eye(2).double(), atol=1e-12, rtol=0)


@pytest.mark.parametrize("shape", [(50, 7), (7, 50)])
def test_the_spectrum_is_that_of_an_svd(shape):
    x = drawn(*shape) + 3
    for centre in (False, True):
        exact = torch.linalg.svdvals(x - x.mean(0) if centre else x)
        torch.testing.assert_close(experts.spectrum(x, centre), exact, atol=1e-6, rtol=1e-6)


def test_ranks_in_closed_form_and_of_a_gaussian():
    flat = torch.ones(6).double()
    one = torch.tensor([5.0, 0, 0])
    for rank in (experts.effective_rank, experts.stable_rank, experts.participation_ratio):
        assert rank(flat).item() == pytest.approx(6)
        assert rank(one).item() == pytest.approx(1)
    s = torch.tensor([2.0, 1.0]).double()
    assert experts.effective_rank(s).item() == pytest.approx(
        math.exp(-(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3)))
    )
    assert experts.stable_rank(s).item() == pytest.approx(5 / 4)
    assert experts.participation_ratio(s).item() == pytest.approx(25 / 17)
    gaussian = experts.spectrum(drawn(200, 64), centre=False)
    found = [
        f(gaussian).item() for f in (experts.effective_rank, experts.stable_rank, experts.participation_ratio)
    ]
    assert found == pytest.approx(
        [61.1, 26.6, 48.0], rel=0.07
    )  # another draw of the same shape, by the measures' source


def test_redundant_experts_cost_less_than_a_hundredth_of_the_gain():
    without = torch.tensor([1.0, 1.004, 1.02, 1.5])
    assert experts.redundant(without, whole=1.0, base=2.0).item() == 2
    assert experts.redundant(without, whole=1.0, base=0.9).isnan()
