"""`train.lr_grid`: equal trials on held-out training rows, the best rate then trains, and the reported split
is met once.

Run: python -m pytest tests/benchmarks/test_tuning.py
"""

from dataclasses import replace

import pytest
from test_config import composed

from moabench.benchmarks.command import runs as housekeeping
from moabench.benchmarks.fairness import tuning
from moabench.benchmarks.machine.files import RunError, read_json
from moabench.benchmarks.run import run as experiment
from moabench.benchmarks.run.prepared import Prepared
from moabench.benchmarks.tasks import rows as data
from moabench.benchmarks.tasks.rows import Reader, is_held_out, load_rows
from moabench.methods.spec import ConfigError

SMALL = [
    "model=random_tiny",
    "train=smoke",
    "task=arc_easy",
    "logger=none",
    "forgetting=none",
    "probe.times=0",
    "device=cpu",
]
OWN = (*housekeeping.MEASURED, "tuning/")


def small(tmp_path, *more):
    return composed(*SMALL, "data.eval_limit=8", "data.train_limit=200", *more, f"runs_dir={tmp_path}")


def test_a_tenth_of_the_training_rows_is_held_out_whatever_their_number():
    cfg = composed("task=arc").data
    few = [
        row["id"] for row in load_rows("arc_easy", "train", replace(cfg, train_limit=300)) if is_held_out(row)
    ]
    many = [row["id"] for row in load_rows("arc_easy", "train", cfg) if is_held_out(row)]
    rows = len(load_rows("arc_easy", "train", cfg))
    assert many[: len(few)] == few and 0.08 < len(many) / rows < 0.12


def test_held_out_rows_are_evaluated_and_not_trained_on(tmp_path):
    cfg = small(tmp_path, "data.held_out=true")
    rows = Prepared(replace(cfg, quiet=True)).training_rows(tmp_path).rows
    evaluated = Reader(cfg.data).reported("arc_easy")
    whole = {row["id"] for row in load_rows("arc_easy", "train", cfg.data)}
    assert len(evaluated) == 8 and {row["id"] for row in evaluated} < whole
    assert not any(is_held_out(row) for row in rows) and {row["id"] for row in rows} < whole
    outcome = experiment.run(cfg)
    assert "eval/arc_easy@builtin-held_out:loglikelihood/acc" in outcome.metrics


def test_the_best_rate_trains_and_the_test_split_is_met_once(tmp_path, monkeypatch):
    """The result is that of a run with this rate and no grid; before the last training nothing reads the test
    split but its fingerprint."""
    seen = []
    load = data.load_rows

    def watched(task, split, source):
        seen.append((split, source.held_out))
        return load(task, split, source)

    monkeypatch.setattr(data, "load_rows", watched)
    cfg = small(tmp_path / "grid", "train.lr_grid=[1e-4,1e-2]", "method=molora")
    outcome = experiment.run(cfg)
    assert all(split == "train" for split, held_out in seen if held_out)
    record = read_json(outcome.folder / "tuning.json")
    assert [trial["lr"] for trial in record["trials"]] == [1e-4, 1e-2] and record["tasks"] == ["arc_easy"]
    best = max(record["trials"], key=lambda trial: (trial["accuracy"], -trial["lr"]))
    assert record["chosen"] == best["lr"] == outcome.metrics["tuning/lr"]
    plain = experiment.run(small(tmp_path / "plain", f"train.lr={best['lr']}", "method=molora"))
    kept = {key: value for key, value in outcome.metrics.items() if not any(word in key for word in OWN)}
    assert kept == {
        key: value for key, value in plain.metrics.items() if not any(word in key for word in OWN)
    }
    assert not experiment.run(cfg).ran


def _fake(accuracies):
    def run(cfg):
        value = accuracies[cfg.train.lr]
        if value is None:
            raise RunError(f"loss is not finite at {cfg.train.lr:g}")
        return value

    return run


@pytest.mark.parametrize(
    ("accuracies", "chosen"),
    [
        ({1e-3: 0.3, 2e-3: 0.5, 4e-3: 0.4}, 2e-3),
        ({4e-3: 0.5, 1e-3: 0.5}, 1e-3),
        ({1e-3: 0.3, 2e-3: None}, 1e-3),
    ],
)
def test_which_rate_is_taken(accuracies, chosen, tmp_path):
    cfg = small(
        tmp_path, f"train.lr_grid={list(accuracies)}", "method=full", "train.lr=1e-3", "train.lr_full=2e-4"
    )
    after, metrics = tuning.tuned(cfg, tmp_path, _fake(accuracies))
    assert after.train.lr == chosen == metrics["tuning/lr"] and after.train.lr_full == pytest.approx(
        chosen / 5
    )
    reasons = [trial["reason"] for trial in read_json(tmp_path / "tuning.json")["trials"]]
    assert [reason is None for reason in reasons] == [value is not None for value in accuracies.values()]


def test_when_every_rate_fails_the_run_does(tmp_path):
    with pytest.raises(RunError, match=r"train\.lr=1: loss is not finite at 1; train\.lr=2"):
        tuning.tuned(small(tmp_path, "train.lr_grid=[1.0,2.0]"), tmp_path, _fake({1.0: None, 2.0: None}))


def test_tasks_without_training_rows_cannot_be_tuned_on(tmp_path, questions):
    for split in ("train",):
        (questions / "arc_easy" / f"{split}.jsonl").rename(questions / "arc_easy" / "kept.jsonl")
    try:
        cfg = small(tmp_path, "data=local", f"data.root={questions}", "train.lr_grid=[1e-3,2e-3]")
        with pytest.raises(ConfigError, match="none of arc_easy has a train split"):
            tuning.tuned(cfg, tmp_path, lambda cfg: None)
        with pytest.raises(ConfigError, match="has no train split to hold rows out of"):
            Reader(replace(cfg.data, held_out=True)).reported("arc_easy")
    finally:
        (questions / "arc_easy" / "kept.jsonl").rename(questions / "arc_easy" / "train.jsonl")


@pytest.mark.parametrize("grid", ["[1e-3]", "[1e-3,1e-3]", "[0.0,1e-3]"])
def test_bad_grids(grid, tmp_path):
    with pytest.raises(ConfigError, match="lr_grid"):
        small(tmp_path, f"train.lr_grid={grid}")
