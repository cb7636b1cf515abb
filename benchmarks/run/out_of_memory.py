"""What ended a run, by its plain name; and out of memory, which need not end it (`train.halve`)."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

from moabench.benchmarks.config.run import RunConfig
from moabench.benchmarks.machine import files
from moabench.benchmarks.machine.files import RunError
from moabench.methods.spec import ConfigError


class OutOfMemory(RunError):
    """The run needs more memory than there is; recorded by this name, and a sweep goes on."""

    training = False
    """Met in training, not in evaluation."""


def explained(error: Exception, path: Path) -> Exception:
    """The error as it is, but a full disk or memory by its plain name, whichever library met it."""
    text = " ".join(str(error).split())
    if isinstance(error, ConfigError | RunError):
        return error
    if isinstance(error, OSError) and error.errno in files.ADVICE:
        return files.storage_error(error, error.filename or path)
    # safetensors, torch.save and pyarrow each have their own words for ENOSPC; torch's does not even say so.
    if (
        "No space left on device" in text
        or "os error 28" in text
        or "inline_container" in text
        or shutil.disk_usage(path).free == 0
    ):
        return files.StorageError(
            f"cannot write {path}: the disk is full; free space or choose another runs_dir."
        )
    # The CPU's allocator has words of its own.
    if isinstance(error, MemoryError) or any(
        words in text.lower() for words in ("out of memory", "can't allocate memory")
    ):
        hint = (
            "a smaller train.batch_size with more train.accumulation, or train.halve=true, which finds them"
        )
        return OutOfMemory(f"out of memory ({text[:200]}). Expected less: {hint}.")
    return error


def halved(cfg: RunConfig, training: bool) -> RunConfig | None:
    """With passes of half the size (an odd one goes down by its least divisor), in training as many sequences
    in a step; None where they are of one sequence."""
    t = cfg.train
    size = t.batch_size if training else t.eval_batch_size
    factor = next((k for k in range(2, size + 1) if size % k == 0), None)
    if factor is None:
        return None
    smaller = (
        {"batch_size": size // factor, "accumulation": t.accumulation * factor}
        if training
        else {"eval_batch_size": size // factor}
    )
    return dataclasses.replace(cfg, train=dataclasses.replace(t, **smaller))
