"""Whether two methods differ, and how well it is known. Pure functions of arrays of right and wrong answers
(S seeds, Q questions).

A seed is one training run, so seeds are what a claim about *methods* rests on: two runs of one method differ
in accuracy for reasons that no number of questions removes. A test over questions alone (McNemar, paired
bootstrap) is about two trained *models*; used for methods it calls the same method, trained twice, different
from itself far more often than in 5 % of cases (tested).

`compare` therefore adds both sources of variance. With y_sq the answer of seed s to question q, and weights
that sum to one,

    Var(difference) = V_seeds + max(0, V_questions - V_cells),    V_seeds = sum over both methods of
                                                                  Var_s(mean_q y_sq) / S

where V_questions is the variance over questions (clusters of questions that share a passage) of the
difference of seed means, and V_cells the part of it that is seed-by-question noise, which V_seeds holds
already. Two-way clustering: Cameron, Gelbach, Miller 2011, doi 10.1198/jbes.2010.07136; degrees of freedom by
Satterthwaite, as in Welch's test, which this is when V_questions = V_cells.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

LEVEL = 0.95
"""Confidence level of intervals; differences are called shown below 1 - LEVEL."""

POWER = 0.8
"""Power at which a detectable difference is stated."""


class Interval(NamedTuple):
    """An estimate with the ends of its confidence interval, NaN where none can be had (one seed)."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """`a` minus `b`, in shares (0.02: two points)."""

    difference: Interval
    p: float
    """Two-sided."""
    effect: float
    """Hedges' g over seeds; NaN with one seed, or against something that has none."""
    detectable: float
    """Difference that this design finds with probability `POWER`; NaN where no test of methods was
    possible."""
    seeds: tuple[int, int]
    questions: int
    about: str
    """`methods`, or `models` where one side has one seed and the test is over questions alone."""


def t_interval(values: Sequence[float], level: float = LEVEL) -> Interval:
    """Mean over seeds with Student's interval; none from one seed, nor from seeds that tie exactly, whose
    spread is unknown, not 0."""
    values = np.asarray(values, float)
    mean, n = values.mean(), len(values)
    if n < 2 or np.ptp(values) == 0:
        return Interval(float(mean), math.nan, math.nan)
    half = stats.t.ppf((1 + level) / 2, n - 1) * values.std(ddof=1) / math.sqrt(n)
    return Interval(float(mean), float(mean - half), float(mean + half))


def iqm(scores: np.ndarray, axis: int | None = None) -> Any:
    """Interquartile mean: the mean of what remains when the lowest and the highest quarter (rounded down) are
    cut. arXiv 2108.13264."""
    return stats.trim_mean(np.asarray(scores, float), 0.25, axis=axis)


def stratified_bootstrap(
    scores: np.ndarray,
    statistic: Callable[..., Any] = iqm,
    level: float = LEVEL,
    samples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Percentile interval of a statistic of scores [S, T]: seeds are drawn again within each task. arXiv
    2108.13264.

    statistic: takes an array and the `axis` to reduce, as `iqm` and `np.mean` do.
    """
    scores = np.asarray(scores, float)
    runs, tasks = scores.shape
    value = float(statistic(scores, axis=None))
    if runs < 2:
        return Interval(value, math.nan, math.nan)
    drawn = np.random.default_rng(seed).integers(runs, size=(samples, runs, tasks))
    found = statistic(scores[drawn, np.arange(tasks)].reshape(samples, -1), axis=1)
    return Interval(value, *_percentiles(found, level))


def mcnemar(a: Sequence[bool], b: Sequence[bool]) -> float:
    """Exact two-sided p of two models on the same questions: of the questions that one alone answers rightly,
    as many for each."""
    a, b = np.asarray(a, bool), np.asarray(b, bool)
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    return float(stats.binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


def paired_bootstrap(
    a: np.ndarray,
    b: np.ndarray,
    strata: Sequence,
    clusters: Sequence,
    level: float = LEVEL,
    samples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Percentile interval of the difference of two models [Q]: clusters of questions are drawn again, within
    each stratum (task).

    Strata have equal weight. A cluster is drawn whole; its stratum's mean is over the questions drawn.
    """
    difference = np.asarray(a, float) - np.asarray(b, float)
    rng, drawn, value = np.random.default_rng(seed), 0.0, 0.0
    groups = _positions(strata)
    for rows in groups:
        of = np.unique(np.asarray(clusters)[rows], return_inverse=True)[1]
        sums, sizes = np.bincount(of, difference[rows]), np.bincount(of)
        pick = rng.integers(len(sums), size=(samples, len(sums)))
        drawn = drawn + sums[pick].sum(1) / sizes[pick].sum(1) / len(groups)
        value += difference[rows].mean() / len(groups)
    return Interval(value, *_percentiles(drawn, level))


def compare(
    a: np.ndarray,
    b: np.ndarray,
    strata: Sequence | None = None,
    clusters: Sequence | None = None,
    fixed: tuple[bool, bool] = (False, False),
) -> Comparison:
    """Two methods on the same questions, a [S, Q] against b [S', Q], accuracy averaged over strata (tasks)
    with equal weight.

    clusters: questions of equal value share a passage and are no independent evidence. fixed: this side has
    no seeds (a frozen base).
    """
    a, b = np.atleast_2d(np.asarray(a, float)), np.atleast_2d(np.asarray(b, float))
    questions = a.shape[1]
    strata = np.zeros(questions, int) if strata is None else np.asarray(strata)
    clusters = np.arange(questions) if clusters is None else np.asarray(clusters)
    if any(len(side) < 2 and not known for side, known in zip((a, b), fixed, strict=True)):
        return _compare_models(a[0], b[0], strata, clusters, (len(a), len(b)))
    layout = _Layout(strata, clusters)
    means = [side @ layout.weights for side in (a, b)]
    seeds = [_variance(mean) / len(mean) for mean in means]
    cells = sum(layout.cells(side) for side in (a, b))
    beyond = max(0.0, layout.between(a.mean(0) - b.mean(0)) - cells)
    # Seeds that tie to the last question say nothing of their variance; it is at least that of the cells.
    variance = (sum(seeds) or cells) + beyond
    parts = [(s, len(m) - 1) for s, m in zip(seeds, means, strict=True)] + [(beyond, layout.freedom)]
    effect = math.nan if any(fixed) else _hedges(*means)
    return _tested(
        float(means[0].mean() - means[1].mean()),
        variance,
        _satterthwaite(parts),
        effect,
        (len(a), len(b)),
        questions,
    )


def holm(p: Sequence[float]) -> np.ndarray:
    """Adjusted p values, in the order given; NaN (not tested) stays and is not counted. Holm 1979."""
    p = np.asarray(p, float)
    order = [i for i in np.argsort(p) if not math.isnan(p[i])]
    adjusted, highest = np.full(len(p), math.nan), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, p[i] * (len(order) - rank)))
        adjusted[i] = highest
    return adjusted


def detectable(error: float, freedom: float, level: float = LEVEL, power: float = POWER) -> float:
    """Difference found with probability `power` at standard error `error`: `(t_level + t_power) error`."""
    return float((stats.t.ppf((1 + level) / 2, freedom) + stats.t.ppf(power, freedom)) * error)


class _Layout:
    """Which questions stand together: weights [Q] that give strata equal weight, clusters within strata."""

    def __init__(self, strata: np.ndarray, clusters: np.ndarray):
        groups = _positions(strata)
        self.weights = np.zeros(len(strata))
        self.groups = []
        for rows in groups:
            self.weights[rows] = 1 / len(rows) / len(groups)
            self.groups.append((rows, np.unique(clusters[rows], return_inverse=True)[1]))
        self.freedom = sum(of.max() for _, of in self.groups)

    def between(self, values: np.ndarray) -> float:
        """Variance of the weighted mean of values [Q] that comes from which questions (clusters) were
        asked."""
        total = 0.0
        for rows, of in self.groups:
            count = of.max() + 1
            sums = np.bincount(of, self.weights[rows] * (values[rows] - values[rows].mean()))
            total += count / (count - 1) * float(sums @ sums) if count > 1 else 0.0
        return total

    def cells(self, answers: np.ndarray) -> float:
        """The part of `between(answers.mean(0))` that seed-by-question noise makes, from answers [S, Q]; 0
        with one seed."""
        count = len(answers)
        return (
            sum(self.between(row) for row in answers - answers.mean(0)) / (count * (count - 1))
            if count > 1
            else 0.0
        )


def _compare_models(
    a: np.ndarray, b: np.ndarray, strata: np.ndarray, clusters: np.ndarray, seeds: tuple[int, int]
) -> Comparison:
    """Over questions alone: exact McNemar, or where questions share passages a t-test with clustered
    errors."""
    interval = paired_bootstrap(a, b, strata, clusters)
    layout = _Layout(strata, clusters)
    if all(np.bincount(of).max() == 1 for _, of in layout.groups):
        p = mcnemar(a, b)
    else:
        error = math.sqrt(layout.between(a - b))
        p = (
            2 * float(stats.t.sf(abs(interval.value) / error, layout.freedom))
            if error
            else float(interval.value == 0)
        )
    return Comparison(interval, p, math.nan, math.nan, seeds, len(a), "models")


def _tested(
    difference: float, variance: float, freedom: float, effect: float, seeds: tuple[int, int], questions: int
) -> Comparison:
    error = math.sqrt(variance)
    half = stats.t.ppf((1 + LEVEL) / 2, freedom) * error
    p = 2 * float(stats.t.sf(abs(difference) / error, freedom)) if error else float(difference == 0)
    interval = Interval(difference, float(difference - half), float(difference + half))
    return Comparison(interval, p, effect, detectable(error, freedom), seeds, questions, "methods")


def _satterthwaite(parts: Sequence[tuple[float, float]]) -> float:
    """Degrees of freedom of a sum of variances; parts are (variance, its degrees of freedom)."""
    below = sum(variance**2 / freedom for variance, freedom in parts if freedom > 0)
    if below:
        return max(1.0, sum(variance for variance, _ in parts) ** 2 / below)
    return max(1.0, sum(freedom for _, freedom in parts[:2]))


def _hedges(a: np.ndarray, b: np.ndarray) -> float:
    """Standardised difference of seeds, corrected for small samples: `g = (1 - 3 / (4 df - 1)) (mean a - mean
    b) / pooled sd`."""
    freedom = len(a) + len(b) - 2
    if min(len(a), len(b)) < 2:
        return math.nan
    pooled = math.sqrt(((len(a) - 1) * a.var(ddof=1) + (len(b) - 1) * b.var(ddof=1)) / freedom)
    return float((1 - 3 / (4 * freedom - 1)) * (a.mean() - b.mean()) / pooled) if pooled else math.nan


def _variance(values: np.ndarray) -> float:
    return float(values.var(ddof=1)) if len(values) > 1 else 0.0


def _positions(labels: Sequence) -> list[np.ndarray]:
    """Positions of each label."""
    of = np.unique(np.asarray(labels), return_inverse=True)[1]
    return [np.flatnonzero(of == group) for group in range(of.max() + 1)]


def _percentiles(found: Sequence[float], level: float) -> tuple[float, float]:
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
