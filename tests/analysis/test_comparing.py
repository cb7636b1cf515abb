"""What may be compared with what, what is flagged, and that the words say no more than the test."""

import math
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from synthetic import write_run

from moabench.analysis import load
from moabench.analysis.comparing import Entry, Pair, Problem, problems
from moabench.analysis.statistics import Comparison, Interval
from moabench.benchmarks.machine import files
from moabench.benchmarks.tasks import scorers
from moabench.methods.spec import ConfigError


def problem_of(folder):
    (problem,) = problems(load(folder))
    return problem


def test_runs_that_differ_in_the_seed_alone_are_one_entry(runs_dir):
    problem = problem_of(runs_dir)
    assert {e.label: len(e.finished) for e in problem.entries} == {
        "lora": 3,
        "molora": 3,
        "mixlora": 3,
        "dora": 0,
        "rslora": 0,
    }
    assert problem.finished[0].label == "molora"


def test_variants_of_a_method_are_told_apart_by_what_differs(tmp_path):
    write_run(tmp_path, "molora", method__router__kind="softmax")
    write_run(tmp_path, "molora", method__router__kind="topk", method__router__k=2)
    write_run(tmp_path, "lora", logger__kind="wandb", threads=2)
    write_run(tmp_path, "lora", seed=1)
    labels = {e.label for e in problem_of(tmp_path).entries}
    assert labels == {"molora (router.kind=softmax)", "molora (router.kind=topk, router.k=2)", "lora"}


@pytest.mark.parametrize(
    "change", [{"protocol": "label"}, {"data__eval_limit": 10}, {"model__name": "other"}]
)
def test_other_questions_models_and_protocols_are_other_problems(tmp_path, change):
    write_run(tmp_path, "lora")
    write_run(tmp_path, "lora", **change)
    names = [problem.name for problem in problems(load(tmp_path))]
    assert len(set(names)) == 2


def test_questions_that_changed_under_the_same_config_are_another_problem(tmp_path):
    for seed in (0, 1):
        run = write_run(tmp_path, "lora", seed)
        about = files.read_json(run / "environment.json")
        files.write_json(
            run / "environment.json", about | {"inputs": {"evaluation": {"arc_easy": f"print{seed}"}}}
        )
    names = [problem.name for problem in problems(load(tmp_path))]
    assert len(set(names)) == 2 and all("questions or weights" in name for name in names)


def test_unequal_terms_are_remarked(runs_dir):
    problem = problem_of(runs_dir)
    remarks = {e.label: problem.remarks(e) for e in problem.entries}
    assert remarks["lora"] == []
    assert remarks["molora"] == ["1.5 x the parameters of lora"]
    assert remarks["mixlora"] == ["train.lr=0.001"]
    assert "out of memory" in remarks["dora"][0] and remarks["rslora"] == ["interrupted, seed 0"]


def test_other_machines_commits_and_missing_seeds_are_remarked(tmp_path):
    for seed in (0, 1):
        write_run(tmp_path, "lora", seed)
    run = write_run(tmp_path, "molora", 0)
    code = {"commit": "f00" * 13, "dirty": True}
    files.write_json(run / "environment.json", {"code": code, "device_name": "a GPU", "threads": 1})
    problem = problem_of(tmp_path)
    found = problem.remarks(problem.entry("molora"))
    assert found == [
        "1 of 2 seeds",
        "other machine than lora",
        "other commit than lora",
        "code with uncommitted changes",
    ]


def test_a_seed_that_was_run_twice_is_remarked(tmp_path):
    """The same config on training rows that changed: two runs of one seed in one entry."""
    run = write_run(tmp_path, "lora", 0)
    run.rename(tmp_path / "arc-lora-tiny-s0-other"), write_run(tmp_path, "lora", 0)
    problem = problem_of(tmp_path)
    assert problem.remarks(problem.entry("lora")) == ["seed 0 more than once, which is no further evidence"]


def test_a_difference_that_is_there_is_shown_and_one_that_is_not_is_not(runs_dir):
    pairs = {frozenset((p.a.label, p.b.label)): p for p in problem_of(runs_dir).pairs()}
    shown = pairs[frozenset(("molora", "lora"))]
    assert shown.shown and shown.found.seeds == (3, 3) and shown.found.questions == 200 and shown.family == 3
    assert "molora is better than lora by" in shown.words() and "Holm over 3" in shown.words()
    same = pairs[frozenset(("mixlora", "lora"))]
    assert not same.shown and "No difference shown" in same.words() and "n = 3 and 3 seeds" in same.words()


def test_differences_are_those_of_the_answers(runs_dir):
    problem = problem_of(runs_dir)
    a, b = problem.entry("molora"), problem.entry("lora")
    found = problem.compare(a, b)
    assert found.difference.value == pytest.approx(a.mean("accuracy") - b.mean("accuracy"))


def test_one_seed_is_said_to_be_about_models(tmp_path):
    write_run(tmp_path, "lora", chance=0.3)
    write_run(tmp_path, "molora", chance=0.9)
    (pair,) = problem_of(tmp_path).pairs()
    assert not pair.shown and pair.family == 0
    assert pair.words().startswith("One seed: the two trained models molora and lora differ")
    assert pair.words().endswith("nothing is shown about the methods.")


def test_the_frozen_base_has_no_seeds_and_can_be_compared(tmp_path):
    write_run(tmp_path, "none", chance=0.25, method__tuner="none")
    for seed in range(4):
        write_run(tmp_path, "lora", seed, chance=0.7)
    (pair,) = problem_of(tmp_path).pairs()
    assert pair.found.about == "methods" and pair.shown


def test_passages_are_clusters(tmp_path):
    """Ten questions each about twenty passages: the interval is wider than of two hundred passages."""
    folders = {"alone": tmp_path / "alone", "shared": tmp_path / "shared"}
    widths = {}
    for name, folder in folders.items():
        for method in ("lora", "molora"):
            knows = np.repeat(np.random.default_rng(len(method)).random(20) < 0.5, 10)
            for seed in range(3):
                run = write_run(folder, method, seed)
                rows = [
                    {"task": "boolq@builtin:loglikelihood", "doc_id": str(i), "correct": bool(knows[i]),
                     "context": f"passage {i // 10}" if name == "shared" else None}
                    for i in range(200)
                ]  # fmt: skip
                files.write_parquet(run / "samples.parquet", rows)
        (pair,) = problem_of(folder).pairs()
        widths[name] = pair.found.difference.high - pair.found.difference.low
    assert widths["shared"] > 2.5 * widths["alone"]


def test_runs_without_samples_are_not_compared(tmp_path):
    for method in ("lora", "molora"):
        (write_run(tmp_path, method) / "samples.parquet").unlink()
    assert problem_of(tmp_path).pairs() == []


def test_an_entry_by_name(runs_dir):
    with pytest.raises(ConfigError, match=r"Did you mean 'molora'\?"):
        problem_of(runs_dir).entry("moloraa")


def test_words_turn_the_interval_with_the_difference(runs_dir):
    problem = problem_of(runs_dir)
    a, b = problem.entry("lora"), problem.entry("molora")
    found = Comparison(Interval(-0.05, -0.08, -0.02), 0.001, -1.0, 0.03, (3, 3), 100, "methods")
    assert (
        "molora is better than lora by 5.0 points, 95 % interval 2.0 to 8.0"
        in Pair(a, b, found, 0.001, 1).words()
    )


def test_answers_alike_over_seeds():
    """Two seeds that agree on one question of two; a question may be asked of two tasks, and answered by a
    text."""
    samples = pd.DataFrame(
        {
            "run": ["a", "a", "b", "b"],
            "task": "t",
            "doc_id": ["1", "2", "1", "2"],
            "prediction": [0, None, 0, None],
            "extracted": [None, "5", None, "6"],
        }
    )
    runs = pd.DataFrame({"run": ["a", "b"], "state": "finished", "accuracy": 0.5})
    entry = Entry("x", "x", {}, runs, {})
    problem = Problem("p", (entry,), SimpleNamespace(samples=samples, finished=runs))
    consistency = scorers.get("consistency")
    assert problem.over_seeds(entry, consistency) == 0.5
    assert math.isnan(problem.over_seeds(Entry("x", "x", {}, runs.iloc[:1], {}), consistency))
