"""kill -9 at random moments of a study: nothing is lost, nothing done twice, no half-written file is read as whole.

In CI a few kills; `MOABENCH_KILLS=100 python -m pytest tests/benchmarks/test_kills.py` makes more.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pandas as pd
import yaml
from test_cli import REPOSITORY, moabench

from moabench.benchmarks.files import read_json
from moabench.benchmarks.housekeeping import unequal
from moabench.benchmarks.runs import find

KILLS = int(os.environ.get("MOABENCH_KILLS", 4))
STUDY = [
    "-m", "method=lora,moa_sparse", "seed=0,1", "model=random_tiny", "task=arc_easy", "train.steps=60", "train.save_every=5",
    "train.batch_size=4", "data.eval_limit=8", "data.train_limit=64", "forgetting=none", "logger=none", "device=cpu", "quiet=true",
    "threads=1", "probe.times=2", "keep=adapter",
]  # fmt: skip


def readable(folder) -> None:
    """Every file with a final name is whole."""
    for file in folder.rglob("*"):
        if file.suffix == ".json":
            json.loads(file.read_text())
        elif file.suffix == ".yaml":
            yaml.safe_load(file.read_text())
        elif file.suffix == ".parquet":
            pd.read_parquet(file)


def killed_after(seconds: float, cwd) -> bool:
    """Starts the study and kills it; False if it was done before."""
    command = [sys.executable, str(REPOSITORY / "run.py"), *STUDY]
    process = subprocess.Popen(
        command, cwd=cwd, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        process.wait(timeout=seconds)
        return False
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return True


def test_a_study_survives_being_killed_at_any_moment(tmp_path):
    alone, often = tmp_path / "alone", tmp_path / "often"
    alone.mkdir()
    often.mkdir()
    start = time.monotonic()
    assert moabench(*STUDY, cwd=alone).returncode == 0
    whole = time.monotonic() - start
    chance, finished, kills, hit = random.Random(0), {}, 0, False
    while (kills < KILLS or not hit) and len(finished) < 4:
        kills += killed_after(chance.uniform(0.1, 0.8) * whole, often)
        readable(often / "runs")
        for path in find(often / "runs"):
            status = read_json(path / "status.json")
            hit |= status["state"] == "running"
            if path.name in finished:
                assert status == finished[path.name], "a finished run was touched again"
            elif status["state"] == "finished":
                finished[path.name] = status
    assert moabench(*STUDY, cwd=often).returncode == 0
    ours, theirs = find(often / "runs"), find(alone / "runs")
    assert [path.name for path in ours] == [path.name for path in theirs] and len(ours) == 4
    for a, b in zip(theirs, ours, strict=True):
        assert read_json(b / "status.json")["state"] == "finished"
        assert list(unequal(a, b)) == []
        assert sorted(p.name for p in a.iterdir()) == sorted(p.name for p in b.iterdir()), "something was left over"
