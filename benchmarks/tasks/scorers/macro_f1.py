"""Macro-F1: every right answer counts alike, however rare it is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from . import Scorer


def score(rows: Sequence[dict[str, Any]]) -> float:
    """Mean over the labels c that occur of `F1_c = 2 TP_c / (2 TP_c + FP_c + FN_c)`; an answer that names no
    choice is wrong for its label and right for none. NaN without rows."""
    labels = sorted({row["label"] for row in rows})
    values = []
    for c in labels:
        hit = sum(row["label"] == c and row["prediction"] == c for row in rows)
        named = sum(row["prediction"] == c for row in rows)
        there = sum(row["label"] == c for row in rows)
        values.append(2 * hit / (named + there))
    return sum(values) / len(values) if values else math.nan


def chance(rows: Sequence[dict[str, Any]]) -> float:
    """Of guessing each of K choices as often: `F1_c = 2 s_c / K / (s_c + 1 / K)`, s_c the share of label
    c."""
    labels = [row["label"] for row in rows]
    shares = [labels.count(c) / len(labels) for c in sorted(set(labels))]
    k = max(len(row["choices"]) for row in rows)
    return sum(2 * s / k / (s + 1 / k) for s in shares) / len(shares)


SCORER = Scorer("macro_f1", "macro-F1", "run", score, chance)
