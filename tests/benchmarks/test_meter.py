"""The meter against counts by hand: padding, variable numbers of experts, batches of unequal length, sequence routers, soft mixtures.

pytest tests/benchmarks/test_meter.py
"""

import pytest
import torch

from moabench.benchmarks.meter import Meter
from moabench.methods import Routing


def routing(weights, chosen=None, mask=None, **kwargs):
    return Routing(torch.as_tensor(weights), None if chosen is None else torch.as_tensor(chosen), mask=mask, **kwargs)


def test_the_meter_counts_real_tokens_only():
    weights = torch.tensor([[0.5, 0.5, 0], [1, 0, 0], [0, 0, 1], [0, 0, 0]])
    meter, mask = Meter(), torch.tensor([True, True, False, True])
    meter.update({"a": routing(weights, weights > 0, mask), "b": routing(weights, weights > 0)}, (2, 2))
    a, b = ([row for row in meter.rows("train", "t") if row["site"] == site] for site in "ab")
    assert [row["assignments"] for row in a] == [2, 1, 0]
    assert [row["usage"] for row in a] == pytest.approx([2 / 3, 1 / 3, 0])
    assert [row["share"] for row in a] == pytest.approx([2 / 3, 1 / 3, 0])
    assert [row["importance"] for row in a] == pytest.approx([0.75, 0.25, 0])
    assert {(row["tokens"], row["dropped_share"]) for row in a} == {(3, 1 / 3)}
    assert [row["assignments"] for row in b] == [2, 1, 1] and b[0]["tokens"] == 4
    assert meter.measures()["mean_active"] == pytest.approx((1 + 1) / 2)
    assert meter.measures()["dead_share_worst"] == pytest.approx(1 / 3)


def test_the_meter_sums_before_it_divides_and_merging_is_counting_on():
    generator = torch.Generator().manual_seed(0)
    passes = []
    for length in (3, 50, 7):  # ratios of batches of unequal length must not be averaged
        probs = torch.randn(length, 4, generator=generator).softmax(-1)
        passes.append(routing(probs, probs > 0.2, probs=probs))
    whole, one, two = Meter(), Meter(), Meter()
    joined = Routing(*(torch.cat([getattr(r, k) for r in passes]) for k in ("weights", "chosen", "probs")))
    whole.update({"s": joined}, (1, 60))
    for meter, part in ((one, passes[:1]), (two, passes[1:])):
        for r in part:
            meter.update({"s": r}, (1, len(r.weights)))
    one.merge(two)
    measures, expected = one.measures(), whole.measures()
    for key in expected.keys() - {"max_vio_batch", "max_vio_batch_worst"}:
        assert measures[key] == pytest.approx(expected[key], rel=1e-6), key
    assert measures["max_vio_batch"] > expected["max_vio"]  # small batches are less balanced than their union
    restored = Meter.from_state(one.state())
    assert restored.rows("a", "b") == one.rows("a", "b")


def test_no_gradient_reaches_the_meter():
    weights = torch.rand(4, 3, requires_grad=True)
    meter = Meter()
    meter.update({"s": routing(weights)}, (1, 4))
    assert not any(v.requires_grad for sums in meter.groups.values() for v in sums.values.values())


def test_a_router_that_decides_once_a_sequence_is_counted_once_a_sequence():
    """Two sequences of three tokens, the first padded on the left, the second on the right, and a third that is all padding."""
    gates = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.5, 0.5]])
    mask = torch.tensor([[False, True, True], [True, False, False], [False, False, False]])
    meter = Meter()
    meter.update({"s": routing(gates.repeat_interleave(3, 0), mask=mask.flatten(), granularity="sequence")}, (3, 3))
    rows = meter.rows("test", "t")
    assert [row["mean_weight"] for row in rows] == pytest.approx([0.55, 0.45])
    assert {(row["tokens"], row["unit"]) for row in rows} == {(2, "sequence")}


def test_a_soft_mixture_reports_no_assignment_share():
    meter = Meter()
    meter.update({"s": routing([[0.9, 0.1], [0.8, 0.0]])}, (1, 2))
    rows = meter.rows("test", "t")
    assert {(row["share"], row["usage"], row["assignments"]) for row in rows} == {(None, None, None)}
    assert [row["soft_share"] for row in rows] == pytest.approx([0.95, 0.05])
    assert [row["importance"] for row in rows] == pytest.approx([1.7 / 1.8, 0.1 / 1.8])
    assert not {"mean_active", "dead_share", "dropped_share"} & meter.measures().keys()
    assert meter.measures()["gate_mass"] == pytest.approx(0.9)
