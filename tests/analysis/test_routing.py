"""Routing measures against loops over tokens, closed forms and chance levels.

pytest tests/analysis/test_routing.py
"""

import math

import pytest
import torch

from moabench.analysis.measures import routing
from moabench.analysis.measures.balance import entropy

E = 8
SKEWED = torch.tensor([1.0, 2, 3, 4, 0, 0, 0, 0]).double() / 10


def drawn(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def top(scores, k):
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, scores.topk(k, -1).indices, True)


def test_decisiveness_is_zero_for_a_constant_router_and_ln_e_for_a_specialised_one():
    constant = SKEWED.expand(100, E)
    assert routing.decisiveness(constant.mean(0), entropy(constant).mean()).item() == pytest.approx(
        0, abs=1e-12
    )
    specialised = torch.eye(E, dtype=torch.float64).repeat(10, 1)
    assert routing.decisiveness(specialised.mean(0), entropy(specialised).mean()).item() == pytest.approx(
        math.log(E)
    )
    torch.testing.assert_close(routing.router_entropy(specialised), torch.zeros(80).double())


def test_quantiles_from_a_histogram_are_those_of_the_values():
    values = drawn(3, 5000) ** 2
    real = drawn(3, 5000, seed=1) > 0.3
    counts = routing.histogram(values, real.long())
    assert counts.shape == (3, routing.BINS) and torch.equal(counts.sum(-1), real.sum(-1))
    for q in (0.1, 0.5, 0.9):
        for row in range(3):
            exact = values[row][real[row]].quantile(q).item()
            assert routing.quantile(counts[row], q).item() == pytest.approx(exact, abs=1 / routing.BINS)


def test_a_histogram_holds_its_ends_and_adds_up_over_batches():
    values = torch.tensor([[0.0, 1.0, 0.5, 1.0]])
    ones = torch.ones(1, 4, dtype=torch.long)
    counts = routing.histogram(values, ones)
    assert (counts[0, 0], counts[0, 32], counts[0, 63]) == (1, 1, 2)
    parts = routing.histogram(values[:, :1], ones[:, :1]) + routing.histogram(values[:, 1:], ones[:, 1:])
    assert torch.equal(parts, counts)
    assert routing.quantile(torch.zeros(2, routing.BINS), 0.1).isnan().all()


def test_the_margin_is_the_gap_at_the_cut():
    scores = torch.tensor([[0.1, 0.7, 0.4, 0.0], [1.0, 1.0, 1.0, 0.0]])
    torch.testing.assert_close(routing.margin(scores, 2), torch.tensor([0.3, 0.0]))
    torch.testing.assert_close(routing.margin(scores, 3), torch.tensor([0.1, 1.0]))


def test_active_experts_of_real_tokens():
    chosen = torch.tensor([[1, 1, 0], [0, 0, 0], [1, 1, 1], [1, 0, 0]]).bool()
    assert routing.active_histogram(chosen, torch.tensor([1, 1, 0, 1])).tolist() == [1, 1, 1, 0]


def test_coactivation_by_counting():
    chosen = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 1, 0]]).double()
    counts = routing.together(chosen)
    assert counts[0].tolist() == [3, 2, 1, 0]
    found = routing.coactivation(counts)
    torch.testing.assert_close(found[0], torch.tensor([1, 2 / 3, 1 / 3, 0]).double())
    assert found[3].isnan().all(), "expert 3 is never used"
    assert routing.coactivation_peak(counts).item() == pytest.approx((2 / 3 + 1 + 1 / 2) / 3)
    usage = [3 / 4, 2 / 4, 2 / 4]
    by_hand = (
        max(2 / 3 - usage[1], 1 / 3 - usage[2], 0 - 0)
        + (1 - usage[0])
        + max(1 / 2 - usage[0], 0 - usage[1], 0)
    ) / 3
    assert routing.coactivation_excess(counts, torch.tensor(4)).item() == pytest.approx(by_hand)


def test_independent_experts_have_no_excess_coactivation():
    chosen = (drawn(200_000, 4) < torch.tensor([0.2, 0.4, 0.6, 0.8])).double()
    assert abs(routing.coactivation_excess(routing.together(chosen), torch.tensor(200_000)).item()) < 0.01
    assert routing.coactivation_peak(routing.together(chosen)).item() == pytest.approx(
        (0.8 * 3 + 0.6) / 4, abs=0.01
    )


def test_soft_coactivation_is_the_cosine_of_weight_columns():
    w = drawn(50, E)
    expected = torch.nn.functional.cosine_similarity(w.T.unsqueeze(0), w.T.unsqueeze(1), dim=-1)
    torch.testing.assert_close(routing.coactivation_cosine(routing.together(w)), expected)


def test_fluctuation_of_top_k_and_its_chance_level():
    before, after = top(drawn(20_000, E), 2), top(drawn(20_000, E, seed=1), 2)
    assert routing.fluctuation(before, before).item() == 0
    assert routing.fluctuation(before, after).item() == pytest.approx(1 - 2 / E, abs=0.01)
    assert routing.agreement(before, after).item() == pytest.approx(2 / E, abs=0.01)
    one, other = top(drawn(500, E), 1), top(drawn(500, E, seed=1), 1)
    changed = (one.int().argmax(-1) != other.int().argmax(-1)).double().mean()
    assert routing.fluctuation(one, other).item() == pytest.approx(changed.item())


def test_total_variation_of_soft_and_one_hot_rows():
    before, after = torch.tensor([[0.5, 0.5], [2.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 0.3]])
    assert routing.total_variation(before, after).item() == pytest.approx((0.5 + 1) / 2)
    one, other = (torch.nn.functional.one_hot(torch.randint(E, (300,))) for _ in range(2))
    assert routing.total_variation(one, other).item() == pytest.approx(
        routing.fluctuation(one.bool(), other.bool()).item()
    )


def test_consistency_finds_renamed_experts_only_when_it_matches_them():
    tables = drawn(1, E, 5)
    order = torch.randperm(E, generator=torch.Generator().manual_seed(3))
    tables = torch.cat([tables, tables[:, order]])
    loads = tables.sum(-1)
    assert routing.consistency(loads, tables) == pytest.approx(1)
    assert routing.consistency(loads) < 0.9
    assert torch.equal(tables[1][routing.match(tables[0], tables[1])], tables[0])
    assert routing.consistency(torch.stack([loads[0], -loads[0], loads[0]])) == pytest.approx(-1 / 3)


def test_affinity_of_a_copied_and_of_an_unrelated_layer():
    w = torch.nn.functional.one_hot(torch.randint(4, (4000,), generator=torch.Generator().manual_seed(0)), 4)
    torch.testing.assert_close(routing.affinity(w, w.roll(1, -1)), torch.eye(4).double().roll(1, -1))
    assert routing.affinity_information(w, w.roll(1, -1)).item() == pytest.approx(1, abs=0.01)
    other = torch.nn.functional.one_hot(
        torch.randint(4, (4000,), generator=torch.Generator().manual_seed(1)), 4
    )
    assert routing.affinity_information(w, other).item() < 0.005
    assert routing.affinity_information(w, torch.full((4000, 4), 0.25)).item() == pytest.approx(0, abs=1e-12)
