"""Several processes train what one does with the same batch, write one run folder, and fail together. On a CPU, over gloo.

Run: python -m pytest tests/benchmarks/test_processes.py
"""

import os
import subprocess
import sys

import pandas as pd
import pytest
import safetensors.torch
import torch
from test_cli import REPOSITORY, moabench

from moabench.benchmarks.files import read_json
from moabench.benchmarks.runs import find

SMALL = [
    "model=random_tiny", "task=arc_easy", "train.steps=4", "train.log_every=1", "data.eval_limit=8", "data.train_limit=64",
    "forgetting=none", "logger=none", "device=cpu", "threads=1", "quiet=true", "probe.times=1",
]  # fmt: skip


def together(*args: str, cwd) -> subprocess.CompletedProcess:
    """`torchrun` with two processes, as users type it."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(REPOSITORY / "run.py"), *args]
    return subprocess.run(command, cwd=cwd, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("method", ["moe_lora_topk", "moa_sparse"])
def test_two_processes_train_what_one_does_with_their_batches(method, tmp_path):
    """Losses, expert load and weights; moa_sparse has a threshold head without a gradient, which DDP has to bear."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    done = together(f"method={method}", *SMALL, "train.batch_size=4", cwd=tmp_path / "two")
    assert done.returncode == 0, done.stderr[-3000:]
    assert moabench(f"method={method}", *SMALL, "train.batch_size=8", cwd=tmp_path / "one").returncode == 0
    (one,), (two,) = (find(tmp_path / name / "runs") for name in ("one", "two"))
    assert read_json(two / "status.json")["state"] == "finished" and one.name != two.name
    histories = [pd.read_parquet(folder / "history.parquet") for folder in (one, two)]
    columns = ["step", "tokens", "loss/task", "loss/total", "load/cv", "load/max_vio", "load/mean_active", "load/gate_mass"]
    pd.testing.assert_frame_equal(histories[0][columns], histories[1][columns], rtol=1e-5, atol=1e-5)
    weights = [safetensors.torch.load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (one, two)]
    for key, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][key], tensor, rtol=1e-3, atol=1e-5)
    assert sorted(p.name for p in one.iterdir()) == sorted(p.name for p in two.iterdir())
    again = together(f"method={method}", *SMALL, "train.batch_size=4", cwd=tmp_path / "two")
    assert again.returncode == 0 and read_json(two / "status.json")["attempt"] == 1, "found finished"


def test_a_failure_ends_all_processes(tmp_path):
    done = together("-m", "method=lora", "seed=0,1", *SMALL, "train.lr=1e30", "train.max_grad_norm=0", cwd=tmp_path)
    assert done.returncode != 0 and "expected a finite loss" in done.stderr
    states = [read_json(folder / "status.json")["state"] for folder in find(tmp_path / "runs")]
    assert states in (["failed"], ["interrupted"]), "the second run must not begin with the processes out of step"
