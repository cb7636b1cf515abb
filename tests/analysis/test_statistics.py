"""Tests of tests: error rates and coverage by simulation with fixed seeds, closed forms, scipy and hand
examples.

The simulated study: question q has a difficulty that both methods share, a method may have questions of its
own it is good at, and each training run (seed) is better or worse as a whole.
"""

import math

import numpy as np
import pytest
from scipy import stats
from synthetic import write_run

from moabench.analysis import load
from moabench.analysis import statistics as st
from moabench.analysis.comparing import problems
from moabench.analysis.plots import pareto
from moabench.analysis.tables import leaderboard


def answers(rng, seeds, ease, spread):
    """[S, Q] right or wrong; `spread`: standard deviation of the seeds' effect on every question's
    probability."""
    return rng.random((seeds, len(ease))) < np.clip(ease + spread * rng.standard_normal((seeds, 1)), 0, 1)


def a_a_rate(test, seeds, questions, spread, studies=800):
    rng = np.random.default_rng(0)
    called = 0
    for _ in range(studies):
        ease = rng.uniform(0.3, 0.7, questions)
        called += test(answers(rng, seeds, ease, spread), answers(rng, seeds, ease, spread)) < 0.05
    return called / studies


@pytest.mark.parametrize(
    ("seeds", "questions", "spread"), [(3, 200, 0.05), (5, 200, 0.0), (5, 100, 0.1), (8, 50, 0.05)]
)
def test_the_same_method_is_called_different_in_about_one_case_in_twenty(seeds, questions, spread):
    rate = a_a_rate(lambda a, b: st.compare(a, b).p, seeds, questions, spread)
    assert 0.02 < rate < 0.065, rate  # 5 % within two standard errors above; a little conservative below


def test_a_test_over_questions_alone_would_call_the_same_method_different_far_more_often():
    """Why one seed never says anything about methods."""
    rate = a_a_rate(lambda a, b: st.mcnemar(a[0], b[0]), 1, 500, 0.05, 300)
    assert rate > 0.25, rate
    assert (
        a_a_rate(lambda a, b: st.mcnemar(a[0], b[0]), 1, 500, 0.0, 300) < 0.06
    )  # it is right about two models


def coverage(interval, seeds=3, questions=60, spread=0.03, studies=800):
    """How often the interval holds the true difference (0.1) over all questions that could have been
    asked."""
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(studies):
        ease = rng.uniform(0.3, 0.6, questions)
        other = np.clip(ease + 0.1 + 0.25 * rng.choice([-1, 1], questions), 0.0, 1.0)
        low, high = interval(answers(rng, seeds, other, spread), answers(rng, seeds, ease, spread))
        held += low <= 0.1 <= high
    return held / studies


def test_intervals_cover_what_they_claim_over_seeds_and_questions():
    assert 0.935 < coverage(lambda a, b: st.compare(a, b).difference[1:], seeds=4) < 0.98


def test_seeds_alone_would_not_cover_other_questions():
    """What the second source of variance is for."""

    def welch(a, b):
        found = stats.ttest_ind(a.mean(1), b.mean(1), equal_var=False).confidence_interval(0.95)
        return found.low, found.high

    both = coverage(lambda a, b: st.compare(a, b).difference[1:], seeds=10, spread=0.01, studies=400)
    assert coverage(welch, seeds=10, spread=0.01, studies=400) < 0.9 < both


def test_passages_with_many_questions_are_one_piece_of_evidence():
    """Ten questions a passage, of which a method knows all or none: without clusters the interval is far too
    narrow."""
    rng = np.random.default_rng(2)
    clusters = np.repeat(np.arange(30), 10)
    held = {True: 0, False: 0}
    for _ in range(400):
        knows = np.repeat(rng.random(30) < 0.5, 10)
        a = np.where(knows, 0.9, 0.1) > rng.random((4, 300))
        b = rng.random((4, 300)) < 0.5
        for clustered in held:
            low, high = st.compare(a, b, clusters=clusters if clustered else None).difference[1:]
            held[clustered] += low <= 0.0 <= high
    assert held[True] / 400 > 0.93 and held[False] / 400 < 0.75


def test_without_question_variance_it_is_welchs_test():
    """Every question has the same answers within a seed: nothing but seeds varies."""
    rng = np.random.default_rng(3)
    a, b = (
        np.repeat(rng.normal(mean, sd, (n, 1)), 40, 1) for mean, sd, n in ((0.7, 0.05, 4), (0.6, 0.01, 6))
    )
    found, reference = st.compare(a, b), stats.ttest_ind(a[:, 0], b[:, 0], equal_var=False)
    assert found.p == pytest.approx(reference.pvalue, rel=1e-9)
    assert found.difference[1:] == pytest.approx(tuple(reference.confidence_interval(0.95)), rel=1e-9)


def test_against_a_frozen_base_it_is_the_one_sample_test():
    rng = np.random.default_rng(4)
    a = np.repeat(rng.normal(0.6, 0.05, (5, 1)), 40, 1)
    base = np.full((1, 40), 0.5)
    found = st.compare(a, base, fixed=(False, True))
    assert found.about == "methods"
    assert found.p == pytest.approx(stats.ttest_1samp(a[:, 0], 0.5).pvalue, rel=1e-9)


def test_seeds_that_tie_are_no_proof():
    """Two seeds each with equal accuracies: the variance over seeds is 0 by luck, and the difference must not
    become certain."""
    a = np.array([[1, 1, 1, 0, 0, 1] * 5, [1, 0, 1, 1, 0, 1] * 5], float)
    b = np.array([[1, 1, 0, 0, 0, 1] * 5, [0, 1, 1, 0, 0, 1] * 5], float)
    assert a.mean(1).var() == b.mean(1).var() == 0
    assert st.compare(a, b).p > 0.05


def test_tasks_have_equal_weight():
    a, b = np.ones((2, 110)), np.zeros((2, 110))
    a[:, :100] = 0.0  # right on the ten questions of the second task only
    found = st.compare(a, b, strata=[0] * 100 + [1] * 10)
    assert found.difference.value == pytest.approx(0.5)
    one = st.compare(a[:1], b[:1], strata=[0] * 100 + [1] * 10)
    assert one.about == "models" and one.difference.value == pytest.approx(0.5)


def test_the_detectable_difference_is_detected_at_its_power():
    """80 % of studies whose truth is the difference that the design says it can find do find it."""
    rng = np.random.default_rng(5)
    error = 0.04 * math.sqrt(2 / 6)
    truth = st.detectable(error, 10)
    found = (
        stats.ttest_ind(rng.normal(truth, 0.04, (3000, 6)), rng.normal(0, 0.04, (3000, 6)), axis=1).pvalue
        < 0.05
    )
    assert np.mean(found) == pytest.approx(st.POWER, abs=0.03)


def test_one_seed_is_about_models():
    a, b = np.zeros((1, 40)), np.zeros((1, 40))
    a[0, :20] = 1
    found = st.compare(a, b)
    assert found.about == "models" and math.isnan(found.detectable) and math.isnan(found.effect)
    assert found.p == pytest.approx(stats.binomtest(20, 20).pvalue)
    assert found.difference.low < 0.5 < found.difference.high


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 0), (1, 0), (7, 2), (30, 30), (3, 15)])
def test_mcnemar_is_the_binomial_test_of_the_discordant_questions(only_a, only_b):
    a = [True] * only_a + [False] * only_b + [True] * 5 + [False] * 4
    b = [False] * only_a + [True] * only_b + [True] * 5 + [False] * 4
    n = only_a + only_b
    tail = sum(math.comb(n, k) for k in range(min(only_a, only_b) + 1)) / 2**n
    assert st.mcnemar(a, b) == pytest.approx(min(1.0, 2 * tail))


def test_the_interval_of_two_models_has_the_analytic_width():
    rng = np.random.default_rng(6)
    a, b = rng.random((1, 400)) < 0.7, rng.random((1, 400)) < 0.6
    found, difference = st.compare(a, b).difference, a.astype(float) - b.astype(float)
    half = stats.t.ppf(0.975, 399) * difference.std(ddof=1) / 20
    assert found == pytest.approx((difference.mean(), difference.mean() - half, difference.mean() + half))


def test_clusters_are_one_piece_of_evidence():
    """Each answer four times: the interval is that of the quarter that is evidence."""
    rng = np.random.default_rng(7)
    a, b = (rng.random((1, 100)) < 0.7).astype(float), (rng.random((1, 100)) < 0.5).astype(float)
    once = st.compare(a, b).difference
    four = st.compare(a.repeat(4, 1), b.repeat(4, 1), clusters=np.arange(100).repeat(4)).difference
    assert four == pytest.approx(once)


def test_few_passages_are_little_evidence():
    """Five passages of eight questions: percentiles of a bootstrap over them hold the truth in 85 %."""
    rng, clusters, held = np.random.default_rng(0), np.repeat(np.arange(5), 8), []
    for _ in range(600):
        easy = np.repeat(rng.normal(0, 0.2, 5), 8)
        a, b = rng.random((1, 40)) < np.clip(0.6 + easy, 0, 1), rng.random((1, 40)) < 0.5
        _, low, high = st.compare(a, b, clusters=clusters).difference
        held.append(low <= 0.1 <= high)
    assert 0.925 < np.mean(held) < 0.975


def test_holm_by_hand():
    assert st.holm([0.01, 0.04, 0.03, 0.005]).tolist() == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert st.holm([0.9, 0.8]).tolist() == [1.0, 1.0]
    found = st.holm([math.nan, 0.02, 0.03])  # what was not tested is no comparison
    assert math.isnan(found[0]) and found[1:].tolist() == pytest.approx([0.04, 0.04])


def bootstrap(values):
    """The interval that is not used: percentiles of the mean of seeds drawn again."""
    drawn = np.random.default_rng(0).choice(values, (400, len(values))).mean(1)
    return np.quantile(drawn, [0.025, 0.975])


@pytest.mark.parametrize("seeds", [3, 5, 8])
def test_the_interval_over_seeds_holds_its_level(seeds):
    """Accuracies of runs on a test set of 200: a seed is better or worse as a whole, and answers vary. By
    simulation, 2,000 studies. A percentile bootstrap does not hold it."""
    rng = np.random.default_rng(9)
    true = np.clip(rng.normal(0.6, 0.04, (2000, seeds)), 0, 1)
    studies = rng.binomial(200, true) / 200
    held = [low <= 0.6 <= high for _, low, high in map(st.t_interval, studies) if not math.isnan(low)]
    assert len(held) > 1990 and np.mean(held) == pytest.approx(st.LEVEL, abs=0.015)
    if seeds == 3:
        ends = [bootstrap(study) for study in studies[:500]]
        assert np.mean([low <= 0.6 <= high for low, high in ends]) < 0.82


def test_no_interval_from_one_seed_nor_from_seeds_that_tie():
    assert math.isnan(st.t_interval([0.5]).low) and math.isnan(st.t_interval([0.5, 0.5]).low)


def test_every_interval_is_the_same(tmp_path):
    """Leaderboard, plot of costs and published table show one interval of the same three seeds."""
    for seed in range(3):
        write_run(tmp_path, "lora", seed)
    (problem,) = problems(load(tmp_path))
    accuracies = problem.finished[0].finished["accuracy"]
    mean = leaderboard(problem).rows[0]["mean"]
    assert mean == pytest.approx(st.t_interval(accuracies)) and not math.isnan(mean.low)
    bars = pareto.cost(problem)[0].figure.axes[0].containers[0].lines[2][0].get_segments()[0][:, 1]
    assert sorted(bars) == pytest.approx([100 * mean.low, 100 * mean.high])
