"""The overhead of counting is a positive share of a step of which routing was recorded."""

import pytest

from moabench.benchmarks import overhead

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def test_counting_takes_a_share_of_a_step():
    (share, step, count), *_ = overhead.shares(1, ("moe_lora_topk",), batch=2, length=6).values()
    assert share >= count / step >= 0 and step > 0
