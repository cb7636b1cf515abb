"""Processes spread over the GPUs that they see, and each then sees one.

Run: python -m pytest tests/benchmarks/test_devices.py
"""

import subprocess
import sys

import pytest
import torch

from moabench.benchmarks.machine import devices
from moabench.benchmarks.machine.files import RunError

HOLD = """
import sys
from pathlib import Path
from moabench.benchmarks.machine.devices import claim
print(claim(["4", "GPU-6/x"], Path(sys.argv[1])), flush=True)
input()
"""


def holder(folder):
    return subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def test_processes_spread_evenly_and_a_dead_one_frees_its_own(tmp_path):
    running = []
    try:
        for expected in ("4", "GPU-6/x", "4", "GPU-6/x"):
            running.append(holder(tmp_path / "locks"))
            assert running[-1].stdout.readline().strip() == expected
        running[1].kill()
        running[1].wait()
        running.append(holder(tmp_path / "locks"))
        assert running[-1].stdout.readline().strip() == "GPU-6/x", "the freed place comes before a third one"
    finally:
        for process in running:
            process.kill()
            process.wait()


@pytest.fixture
def gpus(monkeypatch, tmp_path):
    """gpus(count, seen) pretends that torch finds `count` GPUs, and `seen` once one was chosen."""

    def pretend(count, seen=1, visible=None):
        devices.take_gpu.cache_clear()
        monkeypatch.setattr(devices.tempfile, "gettempdir", lambda: str(tmp_path))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch._C, "_cuda_getDeviceCount", lambda: seen, raising=False)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        devices.take_gpu()
        return devices.os.environ.get("CUDA_VISIBLE_DEVICES")

    yield pretend
    devices.take_gpu.cache_clear()
    while devices._HELD:
        devices.os.close(devices._HELD.pop())


def test_a_process_is_left_one_gpu(gpus):
    assert [gpus(2), gpus(2), gpus(2)] == ["0", "1", "0"]
    assert gpus(2, visible="GPU-a, GPU-b") == "GPU-a"


def test_what_is_chosen_already_is_left_alone(gpus):
    assert gpus(0) is None and gpus(1) is None
    assert gpus(1, visible="3") == "3" and gpus(0, visible="") == "" and gpus(0, visible="0,1") == "0,1"


def test_too_late_is_said(gpus):
    with pytest.raises(RunError, match="expected CUDA_VISIBLE_DEVICES=0 from the outside"):
        gpus(2, seen=2)
    assert devices.os.environ["CUDA_VISIBLE_DEVICES"] == "0,1"
    with pytest.raises(RunError, match="expected CUDA_VISIBLE_DEVICES=0"):
        devices.take_gpu()  # nor does the next run of a sweep go on
