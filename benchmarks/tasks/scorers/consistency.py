"""Consistency: whether seeds answer a question alike, right or wrong (arXiv 2503.07329)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from . import Scorer


def score(answers: Sequence[Sequence[Any]]) -> float:
    """Share of pairs of seeds that give the same answer, mean over questions; an answer that names nothing
    (None) is like no other. NaN with fewer than two seeds or no question."""
    seeds = len(answers)
    if seeds < 2 or not len(answers[0]):
        return math.nan
    alike = [
        sum(n * (n - 1) for answer, n in Counter(question).items() if answer is not None)
        for question in zip(*answers, strict=True)
    ]
    return sum(alike) / len(alike) / (seeds * (seeds - 1))


SCORER = Scorer("consistency", "consistency", "seeds", score)
