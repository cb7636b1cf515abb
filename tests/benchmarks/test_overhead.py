"""The overhead of counting is a positive share of a step of which routing was recorded."""

import pytest

from moabench.benchmarks.speed import overhead

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def test_counting_takes_a_share_of_a_step():
    (share, step, count), *_ = overhead.shares(1, ("moe_lora_topk",), sequences=2, length=6).values()
    assert share >= count / step >= 0 and step > 0


def test_a_run_is_cut_into_its_parts():
    parts = overhead.of_run(
        [
            "model=random_tiny",
            "train=smoke",
            "task=arc_easy",
            "data.eval_limit=4",
            "forgetting=none",
            "device=cpu",
        ]
    )
    assert all(seconds >= 0 for seconds in parts.values()) and parts["evaluation"] > 0 and parts["probes"] > 0
    assert parts["before"] + parts["after"] + parts["evaluation"] < parts["whole"]
