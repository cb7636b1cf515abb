"""Several processes train what one does with the same batch, write one run folder, and fail together. On a
CPU, over gloo.

Run: python -m pytest tests/benchmarks/test_processes.py
"""

import functools
import os
import subprocess
import sys

import pandas as pd
import pytest
import safetensors.torch
import torch
from test_cli import REPOSITORY, moabench
from test_config import composed

from moabench.benchmarks.command.runs import unequal
from moabench.benchmarks.machine.files import read_json
from moabench.benchmarks.run import several
from moabench.benchmarks.run.folder import find
from moabench.methods.spec import ConfigError

SMALL = [
    "model=random_tiny", "task=arc_easy", "train.steps=4", "train.log_every=1", "data.eval_limit=8",
    "data.train_limit=64",
    "forgetting=none", "logger=none", "device=cpu", "threads=1", "quiet=true", "probe.times=1",
]  # fmt: skip


def together(*args: str, cwd, script=REPOSITORY / "run.py") -> subprocess.CompletedProcess:
    """`torchrun` with two processes, as users type it."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(script),
        *args,
    ]
    return subprocess.run(
        command,
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


SHARE = [*SMALL, "train.batch_size=4"]
"""Of each of two processes."""
LOSS = {"moe_lora_topk": ["method.losses.switch_balance.coef=0.5"]}
"""By method: a loss that is no mean over tokens, and yet is that of the joint batch."""
CUT = {"moe_lora_topk": ["train.batch_size=2", "train.accumulation=2"]}
"""By method: the share of a process in two passes."""


def arguments(method):
    return [f"method={method}", *LOSS.get(method, ()), *SHARE, *CUT.get(method, ())]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """two(method) -> the folder in which two processes ran it."""

    @functools.cache
    def run(method):
        folder = tmp_path_factory.mktemp(method)
        done = together(*arguments(method), cwd=folder)
        assert done.returncode == 0, done.stderr[-3000:]
        return folder

    return run


@pytest.mark.parametrize("method", ["moe_lora_topk", "moa_sparse", "moe_lora_bias"])
def test_two_processes_train_what_one_does_with_their_batches(method, two, tmp_path):
    """Losses, expert load and weights; moa_sparse has a threshold head without a gradient, which DDP has to
    bear."""
    (joint,) = find(two(method) / "runs")
    given = [f"method={method}", *LOSS.get(method, ()), *SMALL, "train.batch_size=8"]
    assert moabench(*given, cwd=tmp_path).returncode == 0
    (one,) = find(tmp_path / "runs")
    assert read_json(joint / "status.json")["state"] == "finished" and one.name != joint.name
    histories = [pd.read_parquet(folder / "history.parquet") for folder in (one, joint)]
    columns = [
        "step",
        "tokens",
        "loss/task",
        "loss/total",
        *(["loss/switch_balance"] if method in LOSS else []),
        "load/cv",
        "load/max_vio",
        "load/mean_active",
        "load/gate_mass",
    ]
    pd.testing.assert_frame_equal(histories[0][columns], histories[1][columns], rtol=1e-5, atol=1e-5)
    weights = [
        safetensors.torch.load_file(folder / "adapter" / "adapter_model.safetensors")
        for folder in (one, joint)
    ]
    for key, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][key], tensor, rtol=1e-3, atol=1e-5)
    assert sorted(p.name for p in one.iterdir()) == sorted(p.name for p in joint.iterdir())


def test_a_run_of_several_processes_is_found_again(two):
    again = together(*arguments("moe_lora_topk"), cwd=two("moe_lora_topk"))
    (joint,) = find(two("moe_lora_topk") / "runs")
    assert again.returncode == 0, again.stderr[-2000:]
    assert read_json(joint / "status.json")["attempt"] == 1


def test_a_failure_ends_all_processes(tmp_path):
    done = together(
        "-m", "method=lora", "seed=0,1", *SMALL, "train.lr=1e30", "train.max_grad_norm=0", cwd=tmp_path
    )
    assert done.returncode != 0 and "expected a finite loss" in done.stderr
    states = [read_json(folder / "status.json")["state"] for folder in find(tmp_path / "runs")]
    assert states in (["failed"], ["interrupted"]), (
        "the second run must not begin with the processes out of step"
    )


def test_a_sharded_base_changes_no_result(two, tmp_path):
    """FSDP: every metric, table and weight as with whole bases, through probes that run parts of a layer
    alone."""
    done = together("method=mixlora", *SHARE, "shard=true", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    (whole,), (sharded,) = find(two("mixlora") / "runs"), find(tmp_path / "runs")
    assert whole.name == sharded.name
    assert list(unequal(whole, sharded)) == []
    weights = [
        safetensors.torch.load_file(folder / "adapter" / "adapter_model.safetensors")
        for folder in (whole, sharded)
    ]
    assert weights[0].keys() == weights[1].keys()
    for key, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][key], tensor, rtol=0, atol=0)


SHARDED = """
import torch
from moabench import methods
from moabench.benchmarks.machine import processes
from moabench.benchmarks.config.sections import ModelConfig, RandomModel
from moabench.benchmarks.bases.loading import load_model
from moabench.methods import catalog
torch.distributed.init_process_group("gloo")
model, tokenizer = load_model(ModelConfig("random_tiny", kind="random", random=RandomModel()), 0, "cpu")
whole = sum(p.numel() for p in model.parameters())
processes.shard(model, "cpu")
model = methods.attach(model, catalog.raw("moe_lora_topk"))
wrapped = processes.wrapped(model)
ids = torch.randint(len(tokenizer), (2, 8))
wrapped(input_ids=ids, labels=ids).loss.backward()
with torch.no_grad():
    model(input_ids=ids)
frozen = [p for p in model.parameters() if not p.requires_grad]
held = sum(p.to_local().numel() for p in frozen)
assert sum(p.numel() for p in frozen) == whole and held <= 0.51 * whole, (held, whole)
assert all(p.grad is None for p in frozen) and any(p.grad is not None for p in model.parameters())
"""


def test_each_process_holds_its_part_of_a_sharded_base(tmp_path):
    script = tmp_path / "sharded.py"
    script.write_text(SHARDED)
    done = together(cwd=tmp_path, script=script)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["shard=true"], "shard=true: expected several processes"),
        (["--use_fsdp"], "expected shard=true"),
    ],
)
def test_a_base_that_cannot_be_sharded_is_refused(given, message, tmp_path, monkeypatch):
    if given == ["--use_fsdp"]:
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
        given = []
    done = moabench("method=lora", *SMALL, *given, cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr
    assert not find(tmp_path / "runs")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["method=full"], "another method than full, which trains the base itself"),
        (["method=dora"], "another method than dora"),
        (["+model.quantize=4"], "expected model.quantize=null, not 4"),
        (["train.halve=true"], "expected false in a run of several processes"),
    ],
)
def test_what_several_processes_cannot_do(given, message, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError) as caught:
        several.check(composed(*given, f"shard={given != ['train.halve=true']}"))
    assert message in str(caught.value)
