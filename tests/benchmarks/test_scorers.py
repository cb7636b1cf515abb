"""Scorers against values by hand; each says what tables need of it.

Run: python -m pytest tests/benchmarks/test_scorers.py
"""

from __future__ import annotations

import math

import pytest

from moabench.benchmarks import tasks
from moabench.benchmarks.tasks import scorers
from moabench.methods.spec import ConfigError


def rows(pairs):
    return [{"label": label, "prediction": given, "choices": ["no", "yes"]} for label, given in pairs]


def test_macro_f1_by_hand():
    """Labels 1 1 1 0, answers 1 1 0 0: F1 of yes 2*2/(2+3) = 0.8, of no 2*1/(2+1) = 2/3."""
    f1 = scorers.get("macro_f1")
    assert f1.score(rows([(1, 1), (1, 1), (1, 0), (0, 0)])) == pytest.approx((0.8 + 2 / 3) / 2)
    always = rows([(1, 1)] * 62 + [(0, 1)] * 38)
    assert f1.score(always) == pytest.approx(2 * 62 / 162 / 2), "accuracy would be 0.62"
    assert f1.score(rows([(1, None), (0, None)])) == 0 and math.isnan(f1.score([]))


def test_macro_f1_of_guessing():
    """Half of each label is hit, half of all answers name it: F1 = 2 s/2 / (s + 1/2)."""
    many = rows([(1, 1), (1, 0)] * 30 + [(0, 0), (0, 1)] * 20)
    f1 = scorers.get("macro_f1")
    assert f1.chance(many) == pytest.approx(f1.score(many)) == pytest.approx((0.6 / 1.1 + 0.4 / 0.9) / 2)


def test_consistency_by_hand():
    """Three seeds: of three pairs a question has 3, 1, 0 alike."""
    score = scorers.get("consistency").score
    assert score([["a", "a", "a"], ["a", "a", "b"], ["a", "b", "c"]]) == pytest.approx((3 + 1 + 0) / 9)
    assert score([[1, 2], [1, 2]]) == 1 and score([[1], [2]]) == 0
    assert score([[None], [None]]) == 0, "two that answer nothing do not agree on an answer"
    assert math.isnan(score([[1, 2]])) and math.isnan(score([[], []]))


def test_what_a_scorer_says_of_itself():
    for name, scorer in scorers.all().items():
        assert scorer.name == name and scorer.title and scorer.low < scorer.high
    assert [s.name for s in scorers.over("run")] == ["macro_f1"]
    assert [s.name for s in scorers.over("seeds")] == ["consistency"]
    with pytest.raises(ConfigError, match="Did you mean 'macro_f1'"):
        scorers.get("macro_f")


def test_tasks_name_scorers_that_there_are():
    for task in tasks.names():
        for name in tasks.get(task).scorers:
            assert scorers.get(name, f"task {task}: scorers").over == "run"
    assert tasks.get("boolq").scorers == tasks.get("boolq_passage").scorers == ("macro_f1",)
