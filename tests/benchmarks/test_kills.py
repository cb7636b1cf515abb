"""kill -9 at random moments of a study: nothing is lost, nothing done twice, no half-written file is read as
whole.

In CI a few kills; `MOABENCH_KILLS=100 python -m pytest tests/benchmarks/test_kills.py` makes more, and with
`MOABENCH_STUDY=large MOABENCH_KILLS=2` the study is one of 8 methods x 2 tasks x 3 seeds in the built-in
world, on two joblib workers.
"""

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time

import pandas as pd
import yaml
from test_cli import REPOSITORY

from moabench.benchmarks.command.runs import unequal
from moabench.benchmarks.machine.files import read_json
from moabench.benchmarks.run.folder import find

KILLS = int(os.environ.get("MOABENCH_KILLS", 4))
COMMON = [
    "task=arc_easy", "data.eval_limit=8", "data.train_limit=64", "train.batch_size=4", "forgetting=none",
    "logger=none", "device=cpu",
    "quiet=true", "threads=1", "probe.times=2", "keep=adapter",
]  # fmt: skip
STUDIES = {
    "small": [
        "method=lora,moa_sparse",
        "seed=0,1",
        "model=random_tiny",
        *COMMON,
        "train.steps=60",
        "train.save_every=5",
    ],
    "large": [
        "hydra/launcher=joblib",
        "hydra.launcher.n_jobs=2",
        "method=none,lora,molora,moe_lora_topk,adamole,mixlora,moa_soft,moa_sparse",
        *COMMON,
        "task=arc_easy,arc_challenge",
        "seed=0,1,2",
        "data.train_limit=null",
        "data.eval_limit=100",
        "train.steps=60",
        "train.save_every=20",
    ],
}
NAME = os.environ.get("MOABENCH_STUDY", "small")
STUDY, RUNS = ["-m", *STUDIES[NAME]], {"small": 4, "large": 48}[NAME]


def readable(folder) -> None:
    """Every file with a final name is whole."""
    for file in folder.rglob("*"):
        if file.suffix == ".json":
            json.loads(file.read_text())
        elif file.suffix == ".yaml":
            yaml.safe_load(file.read_text())
        elif file.suffix == ".parquet":
            pd.read_parquet(file)


def study(cwd) -> subprocess.CompletedProcess:
    """The study, undisturbed."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, str(REPOSITORY / "run.py"), *STUDY],
        cwd=cwd,
        env=environment,
        stderr=subprocess.DEVNULL,
    )


def killed_after(seconds: float, cwd) -> bool:
    """Starts the study and kills it; False if it was done before."""
    command = [sys.executable, str(REPOSITORY / "run.py"), *STUDY]
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        process.wait(timeout=seconds)
        return False
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return True


def disturbed(folder, whole: float, chance: random.Random, most: int) -> int:
    """Starts the study in `folder` again and again and kills it at moments within the `whole` seconds that it
    takes, at least once in the middle of a run and at most about `most` times; how often."""
    finished, kills, hit = {}, 0, False
    while (kills < most or not hit) and len(finished) < RUNS:
        kills += killed_after(chance.uniform(0.1, 0.8) * whole, folder)
        readable(folder / "runs")
        for path in find(folder / "runs"):
            status = read_json(path / "status.json")
            hit |= status["state"] == "running"
            if path.name in finished:
                assert status == finished[path.name], "a finished run was touched again"
            elif status["state"] == "finished":
                finished[path.name] = status
    return kills


def test_a_study_survives_being_killed_at_any_moment(tmp_path):
    alone = tmp_path / "alone"
    alone.mkdir()
    start = time.monotonic()
    assert study(alone).returncode == 0
    whole, chance, kills = time.monotonic() - start, random.Random(0), 0
    theirs = find(alone / "runs")
    assert len(theirs) == RUNS
    for attempt in itertools.count():
        often = tmp_path / f"often{attempt}"
        often.mkdir()
        more = disturbed(often, whole, chance, KILLS - kills)
        kills, whole = (
            kills + more,
            whole if more else 0.7 * whole,
        )  # the machine may have been slower in the beginning
        assert study(often).returncode == 0
        ours = find(often / "runs")
        assert [path.name for path in ours] == [path.name for path in theirs]
        for a, b in zip(theirs, ours, strict=True):
            assert read_json(b / "status.json")["state"] == "finished"
            assert list(unequal(a, b)) == []
            assert sorted(p.name for p in a.iterdir()) == sorted(p.name for p in b.iterdir()), (
                "something was left over"
            )
        print(f"{kills} kills")
        if kills >= KILLS:
            return
