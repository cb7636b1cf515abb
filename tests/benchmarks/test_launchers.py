"""Sweeps through Hydra's launchers: the same results, failures that are seen.

Run: python -m pytest tests/benchmarks/test_launchers.py
"""

import importlib.util

import pytest
from test_cli import moabench

from moabench.benchmarks.files import read_json
from moabench.benchmarks.housekeeping import unequal
from moabench.benchmarks.runs import find

SWEEP = [
    "method=lora,molora", "seed=0,1", "model=random_tiny", "task=arc_easy", "train=smoke", "data.eval_limit=8",
    "data.train_limit=32", "forgetting=none", "logger=none", "device=cpu", "quiet=true", "threads=1",
]  # fmt: skip
PLUGINS = {"joblib": "hydra_joblib_launcher", "submitit_local": "hydra_submitit_launcher", "ray": "hydra_ray_launcher"}
OPTIONS = {"joblib": ["hydra.launcher.n_jobs=2"]}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The sweep in one process, one run after the other."""
    folder = tmp_path_factory.mktemp("basic")
    done = moabench("-m", *SWEEP, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "runs"


@pytest.mark.parametrize("launcher", PLUGINS)
def test_a_launcher_changes_no_result(launcher, alone, tmp_path):
    if importlib.util.find_spec("hydra_plugins") is None or importlib.util.find_spec(f"hydra_plugins.{PLUGINS[launcher]}") is None:
        pytest.skip(f"{PLUGINS[launcher]} is not installed")
    done = moabench("-m", f"hydra/launcher={launcher}", *OPTIONS.get(launcher, []), *SWEEP, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    ours, theirs = find(tmp_path / "runs"), find(alone)
    assert [path.name for path in ours] == [path.name for path in theirs] and len(ours) == 4
    assert [line for pair in zip(theirs, ours, strict=True) for line in unequal(*pair)] == []


def test_a_failure_in_a_worker_is_seen_and_the_sweep_goes_on(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    words = [word for word in SWEEP if not word.startswith(("method", "seed"))]
    words += ["method=lora", "train.lr=1e30,1e-3", "train.max_grad_norm=0"]
    done = moabench("-m", "hydra/launcher=joblib", *OPTIONS["joblib"], *words, cwd=tmp_path)
    assert done.returncode == 1 and "not finite" in done.stderr
    assert sorted(read_json(path / "status.json")["state"] for path in find(tmp_path / "runs")) == ["failed", "finished"]
