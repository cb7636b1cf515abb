"""Every Triton kernel compiles for sm_80 and sm_90 within the gates; no GPU is needed. The compiler runs in a
process of its own, since here the kernels are made for the interpreter.

Run: python -m pytest tests/kernels/test_offline.py
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from moabench.kernels import offline


@pytest.mark.parametrize("file", offline.FILES)
def test_within_the_gates(file):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "moabench.kernels.offline", file]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all within the gates" in done.stdout


def test_the_gate_can_fail():
    one = offline.Compiled("k", 90, 255, 8, 300_000, (), ())
    assert offline.failures(one, True, "bf16") == (
        "spills 8 bytes",
        f"shared memory 300000 > {offline.SHARED[90]}",
        "no tensor-core instruction",
    )
    assert offline.failures(offline.Compiled("k", 80, 64, 0, 1000, ("mma.sync",), ()), True, "bf16") == ()
    assert offline.failures(offline.Compiled("k", 80, 64, 64, 1000, ()), True, "fp32") == ()


def test_the_interpreter_is_refused():
    if torch.cuda.is_available():
        pytest.skip("kernels are compiled here")
    done = subprocess.run([sys.executable, "-m", "moabench.kernels.offline"], capture_output=True, text=True)
    assert done.returncode == 2 and "TRITON_INTERPRET" in done.stderr
