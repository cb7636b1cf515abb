"""Load measures against their definitions: closed forms, bounds, invariance under permutation of experts,
simulation of the sampling floor.

pytest tests/analysis/test_balance.py
"""

import math

import pytest
import torch

from moabench.analysis.measures import balance
from moabench.analysis.measures.base import DECLARED

E = 8
UNIFORM = torch.full((E,), 1 / E, dtype=torch.float64)
ONE_HOT = torch.eye(E, dtype=torch.float64)[3]
SKEWED = torch.tensor([1.0, 2, 3, 4, 0, 0, 0, 0]).double() / 10
SHARE = {
    name.removeprefix("load/"): measure.function
    for name, measure in DECLARED.items()
    if measure.of == ("share",)
}
"""Every measure of one load share."""

EXTREMES = {  # measure: (uniform, all on one expert), from the ranges in the definitions
    "cv": (0, math.sqrt(E - 1)),
    "max_vio": (0, E - 1),
    "max_share": (1 / E, 1),
    "gini": (0, (E - 1) / E),
    "entropy": (1, 0),
    "effective_experts": (E, 1),
    "rare_share": (0, (E - 1) / E),
}


@pytest.mark.parametrize("name", SHARE)
def test_balance_at_its_extremes(name):
    uniform, collapsed = EXTREMES[name]
    assert SHARE[name](UNIFORM).item() == pytest.approx(uniform, abs=1e-12)
    assert SHARE[name](ONE_HOT).item() == pytest.approx(collapsed, abs=1e-12)


def test_balance_of_a_skewed_share_by_hand():
    found = balance.measures(SKEWED)
    assert found["cv"].item() == pytest.approx(
        math.sqrt(sum((x - 1 / 8) ** 2 for x in SKEWED.tolist()) / 8) * 8
    )
    assert found["max_vio"].item() == pytest.approx(0.4 * 8 - 1)
    pairs = sum(abs(a - b) for a in SKEWED.tolist() for b in SKEWED.tolist()) / (
        2 * 8
    )  # Gini as mean absolute difference
    assert found["gini"].item() == pytest.approx(pairs)
    entropy = -sum(p * math.log(p) for p in (0.1, 0.2, 0.3, 0.4))
    assert found["entropy"].item() == pytest.approx(entropy / math.log(8))
    assert found["effective_experts"].item() == pytest.approx(math.exp(entropy))
    assert found["rare_share"].item() == 0.5


@pytest.mark.parametrize("name", SHARE)
def test_balance_ignores_the_order_of_experts_and_keeps_leading_axes(name):
    share = torch.rand(3, 2, E, dtype=torch.float64)
    share /= share.sum(-1, keepdim=True)
    value = SHARE[name](share)
    assert value.shape == (3, 2)
    torch.testing.assert_close(SHARE[name](share[..., torch.randperm(E)]), value)
    torch.testing.assert_close(SHARE[name](share[1, 1]), value[1, 1])


def test_shares_of_a_variable_number_of_experts():
    """Three tokens use 1, 2 and 0 of three experts."""
    chosen = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 0, 0]])
    tokens = torch.tensor(3)
    counts = chosen.sum(0)
    torch.testing.assert_close(balance.assignment_share(counts), torch.tensor([2 / 3, 1 / 3, 0]).double())
    torch.testing.assert_close(balance.usage(counts, tokens), torch.tensor([2 / 3, 1 / 3, 0]).double())
    assert balance.mean_active(counts, tokens).item() == 1.0
    assert balance.dead_share(counts, tokens).item() == pytest.approx(1 / 3)
    assert balance.activated_parameters(
        balance.usage(counts, tokens), torch.tensor([30, 60, 90])
    ).item() == pytest.approx(40)


def test_soft_unnormalised_gates_count_by_their_share_of_the_row():
    """A token with gates (0.9, 0.1) and one with (0.01, 0.09): by weight the first dominates, by membership
    both count equally."""
    weights = torch.tensor([[0.9, 0.1], [0.01, 0.09]])
    torch.testing.assert_close(balance.importance(weights.sum(0)), torch.tensor([0.91, 0.19]).double() / 1.1)
    torch.testing.assert_close(
        balance.importance(balance.membership(weights).sum(0)), torch.tensor([0.5, 0.5]).double()
    )
    assert balance.membership(torch.zeros(1, 2)).tolist() == [[0, 0]]


def test_contribution_is_the_share_of_output_norms():
    norms = torch.tensor([3.0, 1.0])
    torch.testing.assert_close(balance.contribution(norms), torch.tensor([0.75, 0.25]).double())


def test_nothing_counted_is_nan_not_zero():
    share = balance.assignment_share(torch.zeros(2, E))
    assert all(value.isnan().all() for value in balance.measures(share).values())


def test_uniform_routing_by_chance_reaches_the_floor():
    generator = torch.Generator().manual_seed(0)
    counts = torch.stack(
        [torch.randint(E, (1000,), generator=generator).bincount(minlength=E) for _ in range(4000)]
    )
    found = (
        balance.cv(balance.assignment_share(counts)).square().mean().sqrt().item()
    )  # the mean of CV^2 is (E-1)/N exactly
    assert found == pytest.approx(balance.cv_floor(E, 1000), rel=0.02)


@pytest.mark.parametrize("k", [1, 2, 4, 8])
def test_k_distinct_experts_a_token_are_more_even_by_chance(k):
    """By sqrt((E-k)/(E-1)), 0.756 at E 8, k 4; with k = E there is nothing left to chance."""
    generator, tokens, draws = torch.Generator().manual_seed(k), 100, 4000
    distinct = torch.rand(draws, tokens, E, generator=generator).argsort(-1) < k
    found = balance.cv(balance.assignment_share(distinct.sum(1))).square().mean().sqrt().item()
    assert found == pytest.approx(balance.cv_floor(E, k * tokens, k), rel=0.03, abs=1e-9)
    ratio = balance.cv_floor(E, 1000, k) / balance.cv_floor(E, 1000)
    assert ratio == pytest.approx(math.sqrt((E - k) / (E - 1)))
    floors = balance.floors(E, k * tokens, k, draws=1000)
    assert floors["max_vio"] == pytest.approx(
        balance.max_vio(balance.assignment_share(distinct.sum(1))).mean().item(), rel=0.05, abs=1e-9
    )
    if 1 < k < E:  # as many independent draws are further from even
        assert floors["max_vio"] < 0.97 * balance.floors(E, k * tokens, draws=1000)["max_vio"]


def test_max_vio_of_batches_is_another_number_than_that_of_their_tokens():
    """By chance alone, E 8, top-1: 0.09 to 0.1 over 2,048 tokens, 0.5 to 0.55 as the mean over 32 batches of
    64; each has a floor of its own."""
    generator = torch.Generator().manual_seed(0)
    counts = torch.stack(
        [torch.randint(E, (64,), generator=generator).bincount(minlength=E) for _ in range(32 * 200)]
    ).view(200, 32, E)
    batch = balance.max_vio(balance.assignment_share(counts)).mean().item()
    whole = balance.max_vio(balance.assignment_share(counts.sum(1))).mean().item()
    assert batch > 5 * whole
    assert batch == pytest.approx(balance.floors(E, 64)["max_vio"], rel=0.03)
    assert whole == pytest.approx(balance.floors(E, 2048, draws=300)["max_vio"], rel=0.08)
    about = {name: DECLARED[f"load/{name}"].about for name in ("max_vio", "max_vio_batch")}
    assert about["max_vio"].startswith("global") and about["max_vio_batch"].startswith("batch")


def test_simulated_floors():
    """Values of the measures' source for 8 experts: CV .081, MaxVio .13, Gini .044 at 1,000 assignments, and
    .025, .040, .014 at 10,000."""
    few, many = (balance.floors(E, n, draws=200) for n in (1000, 10_000))
    assert [few[name] for name in ("cv", "max_vio", "gini")] == pytest.approx([0.081, 0.13, 0.044], rel=0.05)
    assert [many[name] for name in ("cv", "max_vio", "gini")] == pytest.approx(
        [0.025, 0.040, 0.014], rel=0.06
    )
