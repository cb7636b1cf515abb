"""What a process has once and a run sets anew: seeds, threads, determinism, the device; and passes that leave
the random states as they were."""

from __future__ import annotations

import os
import random
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from moabench.methods.spec import ConfigError

from . import devices, processes

if TYPE_CHECKING:
    from torch import nn


def set_globals(seed: int, threads: int | None, device: str, backend: str, dtype: str) -> str:
    """Seeds, threads and determinism, set anew for every run since sweeps reuse processes; returns the
    device."""
    import torch
    import transformers

    from moabench.kernels import backend as kernels

    seed_everything(seed)
    torch.set_num_threads(threads_of(threads))
    torch.set_default_dtype(torch.float32)
    torch.set_grad_enabled(True)
    torch.backends.cudnn.benchmark = False
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    # a debugging aid that costs a pass over every new tensor
    setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # noqa: B010, a property of the module
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Between libraries, not for the user.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft")
    # `cache`, its new name, is refused before transformers 5.24.
    warnings.filterwarnings("ignore", category=FutureWarning, message="`past_key_values` is deprecated")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if device in ("auto", "cuda") and processes.count() == 1:
        devices.take_gpu()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and processes.count() > 1:
        device = processes.device(device)
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if not available[device.partition(":")[0]]:
        there = ", ".join(name for name, present in available.items() if present)
        raise ConfigError(f"device={device!r}: not present on this machine. There: {there}.")
    try:
        kernels.select(backend)
        kernels.triton_for(torch.empty(0, dtype=getattr(torch, dtype), device=device))
    except RuntimeError as error:
        raise ConfigError(str(error)) from error
    return device


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch on every device."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


MOST_THREADS = 1024
"""Far more than that many stacks no process bears."""


def threads_of(wanted: int | None) -> int:
    """CPU threads: those wanted, else of OMP_NUM_THREADS (of a list, one number a level, the outermost), else
    every core. Raises ConfigError."""
    if wanted is not None:
        return wanted
    given = os.environ.get("OMP_NUM_THREADS", "").strip()
    if not given:
        return _cores()
    first = given.partition(",")[0].strip()
    if not re.fullmatch("[0-9]{1,4}", first) or not 1 <= int(first) <= MOST_THREADS:
        raise ConfigError(f"OMP_NUM_THREADS={given!r}: expected a number from 1 to {MOST_THREADS}.")
    return int(first)


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; random states and each module's own mode as before afterwards (lm-eval draws
    from them)."""
    import numpy as np
    import torch

    modes = {module: module.training for module in model.modules()}
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if cuda:
            torch.cuda.set_rng_state_all(cuda)
