"""Specialisation against closed forms, a loop over its definition, and simulation of what chance alone shows.

pytest tests/analysis/test_specialisation.py
"""

import math

import pytest
import torch

from moabench.analysis.measures import specialisation as spec

E, C = 8, 4


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_counts_by_class_are_sums_over_its_sequences():
    counts = torch.rand(20, 3, E, generator=generator())
    labels = torch.randint(C, (20,), generator=generator())
    found = spec.class_counts(counts, labels, C)
    assert found.shape == (3, C, E)
    for c in range(C):
        torch.testing.assert_close(found[:, c], counts[labels == c].double().sum(0))


def test_information_by_its_definition():
    table = torch.rand(C, E, generator=generator(), dtype=torch.float64)
    table /= table.sum()
    rows, columns = table.sum(1), table.sum(0)
    by_loop = sum(
        table[c, e] * math.log(table[c, e] / (rows[c] * columns[e])) for c in range(C) for e in range(E)
    )
    assert spec.mutual_information(table).item() == pytest.approx(by_loop.item())


def test_the_ends_of_information():
    perfect = torch.eye(C).repeat_interleave(2, 1)  # two experts a class
    assert spec.mutual_information(spec.joint_table(perfect)).item() == pytest.approx(math.log(C))
    assert spec.information_share(spec.joint_table(perfect)).item() == pytest.approx(1)
    assert spec.information_share(spec.joint_table(torch.ones(C, E))).item() == pytest.approx(0, abs=1e-12)
    collapsed = torch.zeros(C, E)
    collapsed[:, 2] = 5
    assert spec.information_share(spec.joint_table(collapsed)).item() == 0
    assert spec.information_share(spec.joint_table(torch.zeros(C, E))).isnan()


def test_a_big_task_does_not_rule():
    counts = torch.rand(C, E, generator=generator())
    scaled = counts * torch.tensor([[1.0], [10], [100], [1000]])
    torch.testing.assert_close(spec.joint_table(scaled), spec.joint_table(counts))
    torch.testing.assert_close(spec.joint_table(counts).sum(-1), torch.full((C,), 1 / C).double())


def test_information_ignores_the_order_of_experts_and_classes():
    table = spec.joint_table(torch.rand(2, C, E, generator=generator()))
    moved = table[:, torch.randperm(C)][..., torch.randperm(E)]
    torch.testing.assert_close(spec.information_share(moved), spec.information_share(table))


def test_chance_is_what_miller_and_madow_say():
    """8 experts, 8 classes, 2,000 sequences of one token: (E - 1)(C - 1) / 2N = 0.01225."""
    n, found = 2000, []
    for seed in range(200):
        draws = torch.stack([torch.randint(8, (n,), generator=generator(2 * seed + i)) for i in range(2)])
        joint = torch.zeros(8, 8).index_put_(tuple(draws), torch.ones(n), accumulate=True)
        found.append(spec.mutual_information(joint.double() / n).item())
    assert spec.miller_madow(8, 8, n) == pytest.approx(0.01225)
    assert sum(found) / len(found) == pytest.approx(0.01225, rel=0.05)


def test_the_shuffled_value_is_that_of_chance_and_keeps_sequences_whole():
    """Each sequence sends all its 50 tokens to one expert: by tokens the null would be 50 times too small."""
    experts = torch.randint(E, (600,), generator=generator())
    counts = 50 * torch.nn.functional.one_hot(experts, E)
    labels = torch.randint(C, (600,), generator=generator(1))
    measured = spec.information_share(spec.joint_table(spec.class_counts(counts, labels, C))).item()
    null = spec.shuffled_information(counts, labels, C).item()
    expected = spec.miller_madow(E, C, 600) / math.log(C)
    assert null == pytest.approx(expected, rel=0.15)
    assert measured == pytest.approx(null, abs=0.01)
    told = 50 * torch.nn.functional.one_hot(2 * labels + (experts > 3), E)
    assert spec.information_share(
        spec.joint_table(spec.class_counts(told, labels, C))
    ).item() == pytest.approx(1)
    assert spec.shuffled_information(told, labels, C).item() == pytest.approx(null, rel=0.3)


def test_domain_and_vocabulary_specialisation_by_counting():
    assignments, tokens = torch.tensor([[6, 2, 0], [1, 1, 8]]), torch.tensor([4, 10])
    torch.testing.assert_close(
        spec.domain_specialisation(assignments, tokens),
        torch.tensor([[1.5, 0.5, 0], [0.1, 0.1, 0.8]]).double(),
    )
    ids = torch.tensor([3] * 8 + [1] * 10 + [0])
    weights = torch.zeros(19, 2)
    weights[:6, 0], weights[6:8, 1], weights[8:, 1] = 1, 1, 1
    counts = spec.token_counts(weights, ids, 5)
    assert counts[3].tolist() == [6, 2] and counts[1].tolist() == [0, 10]
    assert spec.vocabulary_specialisation(counts).item() == pytest.approx((6 / 8 + 1) / 2), (
        "id 0 was seen once only"
    )
    assert spec.vocabulary_specialisation(counts, at_least=11).isnan()


def test_a_hash_of_the_token_has_all_its_information_and_a_coin_none():
    ids = torch.randint(50, (100_000,), generator=generator())
    hashed = torch.nn.functional.one_hot(ids * 7 % 8, 8)
    assert spec.token_id_share(spec.token_counts(hashed, ids, 60)).item() == pytest.approx(1)
    coin = torch.nn.functional.one_hot(torch.randint(8, (100_000,), generator=generator(1)), 8)
    assert spec.token_id_share(spec.token_counts(coin, ids, 60)).item() < 0.003
    constant = torch.nn.functional.one_hot(torch.zeros(100, dtype=torch.long), 8)
    assert spec.token_id_share(spec.token_counts(constant, ids[:100], 60)).item() == 0
