"""Measures of hidden states against d x d definitions, pairwise loops, invariances and random directions.

pytest tests/analysis/test_representation.py
"""

import math

import pytest
import torch

from moabench.analysis.measures import representation as rep

T, D, K = 300, 12, 4


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_definition(x, membership):
    """tr(S_W S_B^+) from d x d covariances, by a loop over classes."""
    total = membership.sum()
    centre = (membership.sum(0) / total) @ torch.stack([(m @ x) / m.sum() for m in membership.T])
    within, between = torch.zeros(D, D).double(), torch.zeros(D, D).double()
    for m in membership.T:
        mean = (m @ x) / m.sum()
        within += (m.unsqueeze(-1) * (x - mean)).T @ (x - mean) / total
        between += m.sum() / total * torch.outer(mean - centre, mean - centre)
    return torch.trace(within @ torch.linalg.pinv(between, rtol=1e-10))


def one_hot(seed=0):
    return torch.nn.functional.one_hot(
        torch.randint(K, (T,), generator=torch.Generator().manual_seed(seed)), K
    ).double()


@pytest.mark.parametrize("kind", ["hard", "soft", "two of four"])
def test_the_cheap_form_is_the_definition(kind):
    x = drawn(T, D)
    membership = one_hot() if kind == "hard" else drawn(T, K, seed=1).softmax(-1)
    if kind == "two of four":
        membership = torch.zeros(T, K).double().scatter_(-1, membership.topk(2).indices, 0.5)
    assert rep.within_between(x, membership).item() == pytest.approx(
        by_definition(x, membership).item(), rel=1e-6
    )


def test_collapse_ignores_rotation_scale_shift_and_empty_experts():
    x, membership = drawn(T, D), one_hot()
    rotation = torch.linalg.qr(drawn(D, D, seed=3)).Q
    value = rep.within_between(x, membership)
    torch.testing.assert_close(rep.within_between(5 * x @ rotation - 2, membership), value)
    torch.testing.assert_close(rep.within_between(x, torch.cat([membership, torch.zeros(T, 2)], -1)), value)
    torch.testing.assert_close(rep.within_between(x, membership[:, torch.randperm(K)]), value)


def test_tokens_pulled_to_their_expert_are_collapsed():
    membership = one_hot()
    centres = 3 * membership @ drawn(K, D, seed=4)
    values = [rep.within_between(centres + noise * drawn(T, D), membership) for noise in (1.0, 0.1, 0.01)]
    assert values[0] > 50 * values[1] > 2500 * values[2]
    shuffled = rep.shuffled_within_between(centres + 0.1 * drawn(T, D), membership)
    assert rep.clustering(values[1], shuffled) > 5


def test_unrelated_routing_is_at_the_shuffled_value_which_grows_with_the_number_of_tokens():
    """The cause of absolute RC being useless: measured in metrics notes as 118, 539, 2,004 for d 64, K 8 and
    N 1k, 4k, 16k."""
    found = []
    for n in (1000, 4000):
        x = drawn(n, 64)
        membership = torch.nn.functional.one_hot(
            torch.randint(8, (n,), generator=torch.Generator().manual_seed(n)), 8
        )
        found.append(rep.within_between(x, membership).item())
        shuffled = rep.shuffled_within_between(x, membership)
        assert abs(rep.clustering(torch.tensor(found[-1]), shuffled).item()) < 0.35
    assert 3 < found[1] / found[0] < 6


def test_a_constant_router_has_no_classes():
    x = drawn(T, D)
    assert rep.within_between(x, torch.full((T, K), 0.25)).isnan()
    assert rep.within_between(x, torch.nn.functional.one_hot(torch.zeros(T, dtype=torch.long), K)).isnan()


def test_drift_of_an_unchanged_a_scaled_and_an_unrelated_state():
    x = drawn(T, D)
    assert rep.drift_norm(x, x).item() == 0 and rep.drift_cka(x, x).item() == pytest.approx(1)
    assert rep.drift_norm(1.5 * x, x).item() == pytest.approx(0.5) and rep.drift_cka(
        1.5 * x, x
    ).item() == pytest.approx(1)
    assert abs(rep.drift_cka(drawn(T, D, seed=1), x).item()) < 0.05


def test_a_flattened_space_has_a_lower_effective_rank():
    x = drawn(2000, D)
    assert rep.erank(x).item() == pytest.approx(D, rel=0.01)
    assert rep.erank(x[:, :3] @ drawn(3, D, seed=1) + 4).item() <= 3 + 1e-6


def test_token_similarity_by_a_loop_over_pairs():
    x = drawn(15, D) + 1
    pairs = [torch.cosine_similarity(x[i], x[j], 0) for i in range(15) for j in range(15) if i != j]
    assert rep.token_similarity(x).item() == pytest.approx((sum(pairs) / len(pairs)).item())


def test_over_smoothing_by_a_loop_without_padding():
    x, real = drawn(3, 6, D) + 1, torch.arange(6) < torch.tensor([[6], [2], [4]])
    found = [
        torch.cosine_similarity(x[b, t], x[b][real[b]].mean(0), 0)
        for b in range(3)
        for t in range(6)
        if real[b, t]
    ]
    assert rep.over_smoothing(x, real).item() == pytest.approx((sum(found) / len(found)).item())


def test_the_share_within_the_routers_span():
    w = drawn(3, D)
    inside, outside = drawn(50, 3) @ w, drawn(50, D)
    outside = outside - outside @ torch.linalg.pinv(w) @ w
    assert rep.span_share(inside, w).item() == pytest.approx(1)
    assert rep.span_share(outside, w).item() == pytest.approx(0, abs=1e-12)
    assert rep.span_share(drawn(20_000, D, seed=1), w).item() == pytest.approx(3 / D, rel=0.03)
    assert rep.span_share(inside, torch.cat([w, w[:1]])).item() == pytest.approx(1), "equal rows span no more"


def test_rows_of_a_router():
    w = torch.tensor([[1.0, 0], [0, 2], [1, 1]])
    assert rep.row_cosine(w).item() == pytest.approx((0 + 2 * math.sqrt(0.5)) / 3)
    assert rep.row_cosine(-w).item() == pytest.approx(rep.row_cosine(w).item())
