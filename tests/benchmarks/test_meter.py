"""The meter against counts by hand and against the measures of all tokens at once: padding, variable numbers
of experts, batches of unequal length, sequence routers, soft mixtures, several processes, checkpoints of
older versions.

pytest tests/benchmarks/test_meter.py
"""

import pytest
import torch
import torch.multiprocessing

from moabench.analysis.measures import catalog as measures
from moabench.analysis.measures import optimisation, specialisation
from moabench.analysis.measures import routing as measure
from moabench.benchmarks.observing import load_measures
from moabench.benchmarks.observing.load import LoadCounts, fetch, sequence_counts
from moabench.benchmarks.observing.training_log import TrainingLog
from moabench.methods import Routing


def routing(weights, chosen=None, mask=None, **kwargs):
    return Routing(
        torch.as_tensor(weights), None if chosen is None else torch.as_tensor(chosen), mask=mask, **kwargs
    )


def test_the_meter_counts_real_tokens_only():
    weights = torch.tensor([[0.5, 0.5, 0], [1, 0, 0], [0, 0, 1], [0, 0, 0]])
    meter, mask = LoadCounts(), torch.tensor([True, True, False, True])
    meter.update({"a": routing(weights, weights > 0, mask), "b": routing(weights, weights > 0)}, (2, 2))
    a, b = ([row for row in load_measures.rows(meter, "train", "t") if row["site"] == site] for site in "ab")
    assert [row["assignments"] for row in a] == [2, 1, 0]
    assert [row["usage"] for row in a] == pytest.approx([2 / 3, 1 / 3, 0])
    assert [row["share"] for row in a] == pytest.approx([2 / 3, 1 / 3, 0])
    assert [row["importance"] for row in a] == pytest.approx([0.75, 0.25, 0])
    assert {(row["tokens"], row["dropped_share"]) for row in a} == {(3, 1 / 3)}
    assert [row["assignments"] for row in b] == [2, 1, 1] and b[0]["tokens"] == 4
    assert load_measures.measures(meter)["load/mean_active"] == pytest.approx((1 + 1) / 2)
    assert load_measures.measures(meter)["load/dead_share_worst"] == pytest.approx(1 / 3)


def test_the_meter_sums_before_it_divides_and_merging_is_counting_on():
    generator = torch.Generator().manual_seed(0)
    passes = []
    for length in (3, 50, 7):  # ratios of batches of unequal length must not be averaged
        probs = torch.randn(length, 4, generator=generator).softmax(-1)
        passes.append(routing(probs, probs > 0.2, probs=probs))
    whole, one, two = LoadCounts(), LoadCounts(), LoadCounts()
    joined = Routing(*(torch.cat([getattr(r, k) for r in passes]) for k in ("weights", "chosen", "probs")))
    whole.update({"s": joined}, (1, 60))
    for meter, part in ((one, passes[:1]), (two, passes[1:])):
        for r in part:
            meter.update({"s": r}, (1, len(r.weights)))
    one.merge(two)
    measures, expected = load_measures.measures(one), load_measures.measures(whole)
    for key in expected.keys() - {"load/max_vio_batch", "load/max_vio_batch_worst"}:
        assert measures[key] == pytest.approx(expected[key], rel=1e-6), key
    assert (
        measures["load/max_vio_batch"] > expected["load/max_vio"]
    )  # small batches are less balanced than their union
    restored = LoadCounts.from_state(one.state())
    assert load_measures.rows(restored, "a", "b") == load_measures.rows(one, "a", "b")


def test_no_gradient_reaches_the_meter():
    weights = torch.rand(4, 3, requires_grad=True)
    meter = LoadCounts()
    meter.update({"s": routing(weights)}, (1, 4))
    assert not any(v.requires_grad for sums in meter.groups.values() for v in sums.values.values())


def test_a_router_that_decides_once_a_sequence_is_counted_once_a_sequence():
    """Two sequences of three tokens, the first padded on the left, the second on the right, and a third that
    is all padding."""
    gates = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.5, 0.5]])
    mask = torch.tensor([[False, True, True], [True, False, False], [False, False, False]])
    meter = LoadCounts()
    meter.update(
        {"s": routing(gates.repeat_interleave(3, 0), mask=mask.flatten(), granularity="sequence")}, (3, 3)
    )
    rows = load_measures.rows(meter, "test", "t")
    assert [row["mean_weight"] for row in rows] == pytest.approx([0.55, 0.45])
    assert {(row["tokens"], row["unit"]) for row in rows} == {(2, "sequence")}


def test_a_soft_mixture_reports_no_assignment_share():
    meter = LoadCounts()
    meter.update({"s": routing([[0.9, 0.1], [0.8, 0.0]])}, (1, 2))
    rows = load_measures.rows(meter, "test", "t")
    assert {(row["share"], row["usage"], row["assignments"]) for row in rows} == {(None, None, None)}
    assert [row["soft_share"] for row in rows] == pytest.approx([0.95, 0.05])
    assert [row["importance"] for row in rows] == pytest.approx([1.7 / 1.8, 0.1 / 1.8])
    assert (
        not {"load/mean_active", "load/dead_share", "load/dropped_share"}
        & load_measures.measures(meter).keys()
    )
    assert load_measures.measures(meter)["load/gate_mass"] == pytest.approx(0.9)


def drawn(tokens, experts=4, k=None, seed=0, padded=True):
    """A top-k routing (soft without k) of random tokens, a fifth of them padding."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(tokens, experts, generator=generator)
    probs = logits.softmax(-1)
    ids = probs.topk(k).indices if k else None
    chosen = torch.zeros_like(probs, dtype=torch.bool).scatter(-1, ids, True) if k else None
    mask = torch.rand(tokens, generator=generator) > 0.2 if padded else None
    return Routing(probs if chosen is None else probs * chosen, chosen, probs, logits, ids, mask)


@pytest.mark.parametrize("k", [None, 2])
def test_streaming_agrees_with_all_tokens_at_once(k):
    """Quantiles, margins, co-activation and scale, over batches of unequal length, against the measures of
    the joined real tokens."""
    passes = [drawn(length, k=k, seed=length) for length in (30, 1200, 500)]
    meter = LoadCounts(pairs=True)
    for r in passes:
        meter.update({"s": r}, (1, len(r.weights)))
    found = load_measures.measures(meter)
    probs, logits = (torch.cat([getattr(r, name)[r.mask] for r in passes]) for name in ("probs", "logits"))
    entropy = measure.router_entropy(probs)
    assert found["load/router_entropy"] == pytest.approx(entropy.mean().item(), rel=1e-5)
    for q in (0.1, 0.9):
        assert found[f"routing/entropy_q{100 * q:.0f}"] == pytest.approx(
            entropy.quantile(q).item(), abs=1 / 64
        )
    assert found["routing/logsumexp"] == pytest.approx(optimisation.logsumexp(logits).mean().item(), rel=1e-5)
    assert ("routing/coactivation" in found) == ("routing/margin_q10" in found) == bool(k)
    if k:
        counts = measure.together(torch.cat([r.chosen[r.mask] for r in passes]).double())
        assert found["routing/coactivation"] == pytest.approx(measure.coactivation_peak(counts).item())
        expected = measure.coactivation_excess(counts, torch.tensor(len(probs))).item()
        assert found["routing/coactivation_excess"] == pytest.approx(expected)
        assert found["routing/margin_q10"] == pytest.approx(
            measure.margin(probs, k).quantile(0.1).item(), abs=1 / 64
        )
        rows = load_measures.coactivation(meter, step=3)
        assert {(row["step"], row["site"], row["name"]) for row in rows} == {
            (3, "s", "coactivation")
        } and len(rows) == 16
        assert rows[1]["value"] == pytest.approx((counts[0, 1] / counts[0, 0]).item())
    assert found.keys() - {f"{name}_worst" for name in found} <= measures.MEASURES.keys()


def test_training_leaves_out_what_costs_more():
    meter = LoadCounts()
    meter.update({"s": drawn(50, k=2)}, (1, 50))
    assert not {"together", "margin_bins"} & next(iter(meter.groups.values())).values.keys()
    assert "routing/entropy_q10" in load_measures.measures(meter)


def test_sums_reach_the_host_by_one_copy(monkeypatch):
    copies = []
    cpu = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: (copies.append(self), cpu(self))[1])
    meter = LoadCounts()
    meter.update({"a": drawn(50, k=2), "b": drawn(50), "c": drawn(50, experts=6)}, (1, 50))
    tensors = meter.tensors()
    found = fetch(tensors)
    assert len(copies) == 1 and len(tensors) > 20
    assert all(
        torch.equal(one, other) and one.dtype == other.dtype
        for one, other in zip(found, tensors, strict=True)
    )
    assert load_measures.rows(meter.holding(found), "a", "b") == load_measures.rows(meter, "a", "b")
    assert fetch([]) == []


@pytest.mark.parametrize("k", [None, 2])
def test_counting_never_waits_for_the_device(k):
    """On tensors without values: whatever asked for one would fail."""
    r = drawn(48, k=k)
    r = r.map(lambda t: t.to("meta"))
    r.mask = r.mask.to("meta")
    tally = TrainingLog(recent=LoadCounts(pairs=True))
    for _ in range(2):
        tally.add({"task": torch.ones((), device="meta")}, r.mask.view(6, 8), {"a": r, "b": r})
    assert all(t.device.type == "meta" for t in [*tally.recent.tensors(), tally.recent_tokens])


def test_counts_by_sequence_are_loops_over_sequences():
    sparse, soft = drawn(12, k=2), drawn(12, seed=1)
    counts = sequence_counts([sparse, soft], (3, 4))
    for b in range(3):
        part = slice(4 * b, 4 * b + 4)
        torch.testing.assert_close(counts[b, 0], sparse.chosen[part][sparse.mask[part]].sum(0).float())
        torch.testing.assert_close(counts[b, 1], soft.weights[part][soft.mask[part]].sum(0))
    gates = torch.tensor([[0.9, 0.3], [0.2, 0.2]]).repeat_interleave(3, 0)
    once = Routing(gates, mask=torch.tensor([1, 1, 0, 1, 0, 0]).bool(), granularity="sequence")
    torch.testing.assert_close(
        sequence_counts([once], (2, 3))[:, 0], torch.tensor([[0.75, 0.25], [0.5, 0.5]])
    )


def test_specialisation_is_that_of_the_counts_by_sequence():
    """The first site follows the skill, the second does not know it."""
    generator = torch.Generator().manual_seed(0)
    choices, whole, skills = load_measures.Choices(), [], []
    for _ in range(30):
        skill = torch.randint(3, (8,), generator=generator)
        told = torch.nn.functional.one_hot(skill.repeat_interleave(5), 4).bool()
        blind = torch.nn.functional.one_hot(torch.randint(4, (40,), generator=generator), 4).bool()
        routing = {site: Routing(chosen.float(), chosen) for site, chosen in (("a", told), ("b", blind))}
        choices.add(routing, (8, 5), ["t"] * 8, [f"skill {s}" for s in skill.tolist()])
        whole.append(blind.view(8, 5, 4).sum(1))
        skills.append(skill)
    found = choices.measures()
    table = specialisation.joint_table(specialisation.class_counts(torch.cat(whole), torch.cat(skills), 3))
    blind = specialisation.information_share(table).item()
    assert found["specialisation/skill_mi"] == pytest.approx((1 + blind) / 2)
    assert found["specialisation/skill_mi_null"] < 0.01
    least = found["specialisation/skill_mi_minus_null_worst"]
    assert abs(least) < 0.005 and least == pytest.approx(blind, abs=0.01)
    assert not any(name.startswith("specialisation/task") for name in found), "one task tells nothing"


def test_sequences_without_a_skill_are_left_out():
    chosen = torch.eye(2).bool()[torch.tensor([0, 1, 0, 1, 1, 1])]
    choices = load_measures.Choices()
    choices.add(
        {"a": Routing(chosen.float(), chosen)}, (6, 1), ["t", "u"] * 3, ["x", "y", "x", "y", None, None]
    )
    found = choices.measures()
    assert found["specialisation/skill_mi"] == pytest.approx(1)
    assert found["specialisation/task_mi"] < 1


def test_a_checkpoint_of_a_version_that_counted_less_still_loads():
    meter = LoadCounts()
    meter.update({"s": drawn(50, k=2)}, (1, 50))
    state = [
        entry
        | {"values": {k: v for k, v in entry["values"].items() if k not in ("entropy_bins", "logsumexp")}}
        for entry in meter.state()
    ]
    old, new = LoadCounts.from_state(state), LoadCounts()
    new.update({"s": drawn(70, k=2, seed=1)}, (1, 70))
    for one, other in ((old, new), (new, LoadCounts.from_state(state))):
        one.merge(other)
        found = load_measures.measures(one)
        assert "load/router_entropy" in found and "routing/entropy_q10" not in found, "half a count is none"


def _process(rank, folder, queue):
    """One of two processes: two steps and a row, a checkpoint after a third step, then the row of steps three
    and four."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    tally = TrainingLog()

    def step(number):
        r = drawn(20 + 10 * rank + number, k=2, seed=10 * number + rank)
        tally.add({"task": torch.tensor(1.0 + rank)}, r.mask.view(1, -1), {"s": r})

    step(1), step(2)
    rows = [tally.window(2)]
    step(3)
    tally.gather()
    states = [None, None]
    torch.distributed.all_gather_object(states, tally.state())
    tally = TrainingLog()
    tally.restore(states[0])  # what the first process saved is what all of them load
    step(4)
    rows.append(tally.window(4))
    queue.put((rank, rows, load_measures.rows(tally.load, "train", "t"), tally.tokens))
    torch.distributed.destroy_process_group()


def test_two_processes_count_what_one_would(tmp_path):
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    workers = [context.Process(target=_process, args=(rank, str(tmp_path), queue)) for rank in range(2)]
    for worker in workers:
        worker.start()
    results = {rank: found for rank, *found in (queue.get(timeout=120) for _ in workers)}
    for worker in workers:
        worker.join(timeout=60)
    single = LoadCounts()
    for number in (1, 2, 3, 4):
        for rank in range(2):
            r = drawn(20 + 10 * rank + number, k=2, seed=10 * number + rank)
            single.update({"s": r}, (1, len(r.weights)))
    expected = load_measures.rows(single, "train", "t")
    for rows, load, tokens in results.values():
        assert [r["assignments"] for r in load] == [r["assignments"] for r in expected]
        assert [r["importance"] for r in load] == pytest.approx([r["importance"] for r in expected])
        assert tokens == expected[0]["tokens"]
        assert [row["loss/task"] for row in rows] == pytest.approx([1.5, 1.5]), "the mean over processes"
    shared = [{k: v for k, v in row.items() if "second" not in k} for row in results[0][0]]
    assert shared == [{k: v for k, v in row.items() if "second" not in k} for row in results[1][0]]
