"""One GPU for a process where there are several: the first that no other run of this user on this machine
holds.

A lock file a place, held by flock until the process ends, however it ends. Workers of
`hydra/launcher=joblib`, and commands started side by side, so spread over the GPUs; where there are more
processes than GPUs, each GPU takes a second one before any takes a third.
"""

from __future__ import annotations

import fcntl
import functools
import itertools
import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

from .files import RunError


@functools.cache
def take_gpu() -> None:
    """Leave this process one of the GPUs that it sees, which then is its first: the Trainer takes no other.
    Before CUDA is asked for anything; torch counts GPUs without that. Raises RunError where it was too
    late."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    visible = (
        [str(i) for i in range(torch.cuda.device_count())]
        if named is None
        else [name.strip() for name in named.split(",")]
    )
    if len(visible) < 2 or not torch.cuda.device_count():
        return
    os.environ["CUDA_VISIBLE_DEVICES"] = chosen = claim(
        visible, Path(tempfile.gettempdir()) / f"moabench-gpus-{os.getuid()}"
    )
    if torch._C._cuda_getDeviceCount() != 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(
            visible
        )  # so that the next run of this process does not go on with another GPU
        os.close(_HELD.pop())
        raise RunError(
            f"CUDA was in use before this run chose GPU {chosen}; expected CUDA_VISIBLE_DEVICES={chosen} "
            "from the outside."
        )


_HELD: list[int] = []
"""Descriptors of the locks that this process holds."""


def claim(gpus: Sequence[str], folder: Path) -> str:
    """The first of the GPUs with the fewest holders; this process holds it from now on."""
    folder.mkdir(mode=0o700, exist_ok=True)
    for place in itertools.count():
        for gpu in gpus:
            descriptor = os.open(
                folder / f"{re.sub('[^A-Za-z0-9-]', '_', gpu)}.{place}.lock", os.O_RDWR | os.O_CREAT, 0o600
            )
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                continue
            _HELD.append(descriptor)
            return gpu
