"""Which backend runs: what `auto` takes, what is refused, what is recorded. Run: python -m pytest
tests/kernels/test_backend.py"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from moabench.kernels import backend, lowrank


def test_auto_takes_torch_on_a_cpu_even_with_an_interpreter():
    with backend.use("auto"):
        assert not backend.triton_for(torch.empty(1))
        assert backend.describe("cpu") == "torch (auto: device cpu)"


def test_a_demanded_backend_never_gives_way(monkeypatch):
    x = torch.ones(2, 3)
    with backend.use("triton"):
        with pytest.raises(
            RuntimeError,
            match=r"backend='triton': cannot run on cpu in float64; expected .*float32, bfloat16 or float16",
        ):
            lowrank.linear_shrink(x.double(), [], x.double())
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError, match="under autocast"):
            lowrank.linear_shrink(x, [], x)
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        with pytest.raises(RuntimeError, match="cannot run on cpu in float32"):
            lowrank.linear_shrink(x, [], x)
    monkeypatch.setattr(backend, "installed", lambda: False)
    with pytest.raises(RuntimeError, match="Triton is not installed"):
        backend.select("triton")


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="backend='cuda': expected one of auto, torch, triton"):
        backend.select("cuda")


def test_use_restores_what_was_demanded():
    before = backend.select("torch")
    try:
        with pytest.raises(KeyError), backend.use("auto"):
            raise KeyError
        assert backend.select("torch") == "torch"
    finally:
        backend.select(before)


def test_triton_is_not_imported_before_it_runs():
    code = (
        "import sys, torch; from moabench.kernels import lowrank; lowrank.linear_shrink(torch.ones(2, "
        "3), [], torch.ones(1, 3))"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; assert 'triton' not in sys.modules"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
