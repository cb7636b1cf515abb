"""Sweeps through Hydra's launchers: the same results, failures that are seen. A search by Optuna: for
accuracy, on held-out rows.

Run: python -m pytest tests/benchmarks/test_launchers.py
"""

import importlib.util

import pytest
import yaml
from test_cli import moabench

from moabench.benchmarks.command import cli
from moabench.benchmarks.command.runs import unequal
from moabench.benchmarks.config import overrides
from moabench.benchmarks.config.choices import CONF
from moabench.benchmarks.machine.files import read_json, write_json
from moabench.benchmarks.run.folder import find
from moabench.methods.spec import ConfigError

SWEEP = [
    "method=lora,molora", "seed=0,1", "model=random_tiny", "task=arc_easy", "train=smoke",
    "data.eval_limit=8",
    "data.train_limit=32", "forgetting=none", "logger=none", "device=cpu", "quiet=true", "threads=1",
]  # fmt: skip
PLUGINS = {
    "workers": "hydra_joblib_launcher",
    "submitit_local": "hydra_submitit_launcher",
    "ray": "hydra_ray_launcher",
}
SHIPPED = sorted(path.stem for path in (CONF / "hydra" / "launcher").glob("*.yaml"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The sweep in one process, one run after the other."""
    folder = tmp_path_factory.mktemp("basic")
    done = moabench("-m", *SWEEP, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "runs"


@pytest.mark.parametrize("launcher", PLUGINS)
def test_a_launcher_changes_no_result(launcher, alone, tmp_path):
    if (
        importlib.util.find_spec("hydra_plugins") is None
        or importlib.util.find_spec(f"hydra_plugins.{PLUGINS[launcher]}") is None
    ):
        pytest.skip(f"{PLUGINS[launcher]} is not installed")
    done = moabench("-m", f"hydra/launcher={launcher}", *SWEEP, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    ours, theirs = find(tmp_path / "runs"), find(alone)
    assert [path.name for path in ours] == [path.name for path in theirs] and len(ours) == 4
    assert [line for pair in zip(theirs, ours, strict=True) for line in unequal(*pair)] == []


def test_a_failure_in_a_worker_is_seen_and_the_sweep_goes_on(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    words = [word for word in SWEEP if not word.startswith(("method", "seed"))]
    words += ["method=lora", "train.lr=1e30,1e-3", "train.max_grad_norm=0"]
    done = moabench("-m", "hydra/launcher=workers", *words, cwd=tmp_path)
    assert done.returncode == 1 and "not finite" in done.stderr
    assert sorted(read_json(path / "status.json")["state"] for path in find(tmp_path / "runs")) == [
        "failed",
        "finished",
    ]


def test_a_sweep_passes_over_what_failed_until_told(tmp_path):
    words = [word for word in SWEEP if not word.startswith(("method", "seed"))]
    sweep = ["-m", *words, "method=lora", "probe.times=0", "train.max_grad_norm=0", "train.lr=1e30"]
    assert moabench(*sweep, cwd=tmp_path).returncode == 1
    again = moabench(*sweep, cwd=tmp_path)
    assert (
        again.returncode == 1
        and "failed before and is passed over (RunError:" in again.stderr
        and "retry=true" in again.stderr
    )
    (failed,) = find(tmp_path / "runs")
    assert read_json(failed / "status.json")["attempt"] == 1
    assert moabench(*sweep, "retry=true", cwd=tmp_path).returncode == 1
    assert read_json(failed / "status.json")["attempt"] == 2


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_launcher_composes_or_says_what_is_missing(name, tmp_path):
    done = moabench(f"hydra/launcher={name}", "--cfg", "hydra", "-p", "hydra.launcher", cwd=tmp_path)
    if done.returncode:
        assert "not installed; pip install hydra-" in done.stderr
        pytest.skip(done.stderr.strip())
    assert {"workers": "n_jobs: 2", "slurm": "max_num_timeout: 100"}[name] in done.stdout


SEARCH = [
    "-m", "hydra/sweeper=optuna", "hydra.sweeper.n_trials=5", "hydra/sweeper/sampler=random",
    "hydra.sweeper.sampler.seed=0",
    "train.lr=choice(1e-2,1e30)", "train.max_grad_norm=0", "method=lora", "probe.times=0",
    *(word for word in SWEEP if not word.startswith(("method", "seed"))),
]  # fmt: skip


def test_a_search_finds_the_most_accurate_and_passes_over_failures(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    done = moabench(*SEARCH, "data.held_out=true", cwd=tmp_path)
    assert done.returncode == 1 and "not numbers" in done.stderr, "a failed trial shows in the exit code"
    states = {
        yaml.safe_load((p / "config.yaml").read_text())["train"]["lr"]: read_json(p / "status.json")
        for p in find(tmp_path / "runs")
    }
    assert {rate: status["state"] for rate, status in states.items()} == {1e-2: "finished", 1e30: "failed"}
    assert "best: train.lr=0.01 " in done.stdout and "% on the held-out rows" in done.stdout


def test_a_search_on_the_reported_rows_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(overrides, "installed", lambda module: True)
    with pytest.raises(ConfigError, match=r"expected data\.held_out=true too"):
        overrides.prepare(SEARCH)
    prepared = overrides.prepare([*SEARCH, "data.held_out=true", "hydra.sweeper.max_failure_rate=0.2"])
    assert (
        prepared[-1] == "hydra.sweeper.direction=maximize"
        and "hydra.sweeper.max_failure_rate=1.0" not in prepared
    )


def test_a_worker_that_is_killed_is_named_by_what_it_ran(tmp_path, monkeypatch, capsys):
    loky = pytest.importorskip("joblib.externals.loky.process_executor")

    def killed(argv):
        for name, state in (("a", "running"), ("b", "finished")):
            status = {"state": state, "started": "2999-01-01T00:00:00Z"}
            write_json(tmp_path / "runs" / name / "status.json", status)
        write_json(tmp_path / "runs/c/status.json", {"state": "running", "started": "2000-01-01T00:00:00Z"})
        raise loky.TerminatedWorkerError("A worker process managed by the executor was unexpectedly ...")

    monkeypatch.setattr(cli, "_compose_and_run", killed)
    assert cli.main(["-m", "seed=0,1", f"runs_dir={tmp_path / 'runs'}"]) == 1
    error = capsys.readouterr().err
    assert "while these ran: a. The same command goes on" in error and error.count("\n") == 1
