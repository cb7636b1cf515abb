"""Which GPU a process takes where there are several: the first that no other run of this user on this machine holds.

A lock file a GPU, held by flock until the process ends, however it ends. Workers of `hydra/launcher=joblib`, and commands started side
by side, so spread over the GPUs; more processes than GPUs share them.
"""

from __future__ import annotations

import fcntl
import functools
import os
import tempfile
from pathlib import Path


@functools.cache
def own_gpu() -> str:
    """`cuda`, or where there are several GPUs `cuda:<i>` with that of this process."""
    import torch

    count = torch.cuda.device_count()
    return f"cuda:{claim(count, Path(tempfile.gettempdir()) / f'moabench-gpus-{os.getuid()}')}" if count > 1 else "cuda"


_HELD: list[int] = []
"""Descriptors of the locks that this process holds."""


def claim(count: int, folder: Path) -> int:
    """The first of `count` GPUs whose lock in `folder` is free, now held by this process; where none is, one by the process's number."""
    folder.mkdir(mode=0o700, exist_ok=True)
    for index in range(count):
        descriptor = os.open(folder / f"cuda-{index}.lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            continue
        _HELD.append(descriptor)
        return index
    return os.getpid() % count
