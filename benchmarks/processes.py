"""The processes of one run: `torchrun --nproc-per-node 2 run.py ...` or `accelerate launch run.py ...` trains one model on several
devices (DDP).

Every process holds the model, takes its share of each step (`train.batch_size` is that of one process), and evaluates everything, so
that all of them agree on what comes next. The first one holds the run folder and writes it. An auxiliary loss that is no mean over
tokens, as the balance loss, is taken for the tokens of each process and averaged.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def count() -> int:
    """Processes of this run."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    """Which of them this is, from 0."""
    return int(os.environ.get("RANK", 0)) if count() > 1 else 0


def device(kind: str) -> str:
    """The GPU of this process: each one on a machine has one of its own."""
    return f"{kind}:{os.environ.get('LOCAL_RANK', 0)}"


def start(kind: str) -> None:
    """Join the others; nothing alone. kind: `cpu`, `cuda` or `auto`, as in the config."""
    if count() == 1:
        return
    import torch

    if not torch.distributed.is_initialized():
        gpu = kind.startswith("cuda") or (kind == "auto" and torch.cuda.is_available())
        if gpu:
            torch.cuda.set_device(device("cuda"))
        torch.distributed.init_process_group("nccl" if gpu else "gloo")


def told(value: Any = None) -> Any:
    """The first process's value, in all of them."""
    if count() == 1:
        return value
    import torch

    found = [value]
    torch.distributed.broadcast_object_list(found, src=0)
    return found[0]


@contextmanager
def first_alone() -> Iterator[None]:
    """The first process goes through the block before the others do."""
    if count() == 1:
        yield
        return
    import torch

    if rank() > 0:
        torch.distributed.barrier()
    yield
    if rank() == 0:
        torch.distributed.barrier()
