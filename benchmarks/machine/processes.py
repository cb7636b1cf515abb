"""The processes of one run: `torchrun --nproc-per-node 2 run.py ...` or `accelerate launch run.py ...` trains
one model on several devices (DDP).

Every process holds the model, takes its share of each step (`train.batch_size` is that of one process), and
evaluates everything, so that all of them agree on what comes next. The first one holds the run folder and
writes it. A balance loss is that of the tokens of all processes (`batch=global` of its options), or the mean
of each one's own (`micro`).

With `shard=true` each process keeps only its part of the frozen base (FSDP2): a decoder layer's weights are
gathered when the layer runs, forward and backward, and let go afterwards. What is trained, a small part, is
whole everywhere and averaged as in DDP, so optimiser, checkpoints and adapter are those of any other run.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


def count() -> int:
    """Processes of this run."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    """Which of them this is, from 0."""
    return int(os.environ.get("RANK", 0)) if count() > 1 else 0


def device(kind: str) -> str:
    """The GPU of this process: each one on a machine has one of its own."""
    return f"{kind}:{os.environ.get('LOCAL_RANK', 0)}"


def join(wanted: str) -> None:
    """Join the others; nothing alone. wanted: `device` of the config."""
    if count() == 1:
        return
    import torch

    if not torch.distributed.is_initialized():
        gpu = wanted.startswith("cuda") or (wanted == "auto" and torch.cuda.is_available())
        if gpu:
            torch.cuda.set_device(device("cuda"))
        torch.distributed.init_process_group("nccl" if gpu else "gloo")


def shard(model: nn.Module, device: str) -> None:
    """Split the weights of a frozen base on the CPU over the processes and put the parts on `device`, a layer
    at a time. Adapters that are attached later stay whole."""
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from moabench.methods.tuner.architecture import decoder_layers

    mesh = init_device_mesh(torch.device(device).type, (count(),))
    model.requires_grad_(False)  # before: FSDP keeps no gradients of what needs none when it is told
    for part in (*decoder_layers(model).values(), model):
        fully_shard(part, mesh=mesh, reshard_after_forward=True)


def wrapped(model: nn.Module) -> nn.Module:
    """A model with a sharded base in DDP, which sees what is trained alone. accelerate refuses any model that
    holds DTensors."""
    from torch.nn.parallel import DistributedDataParallel

    model._ddp_params_and_buffers_to_ignore = [
        name for name, p in model.named_parameters() if not p.requires_grad
    ]
    return DistributedDataParallel(model, find_unused_parameters=True)


def told(value: Any = None) -> Any:
    """The first process's value, in all of them."""
    if count() == 1:
        return value
    import torch

    found = [value]
    torch.distributed.broadcast_object_list(found, src=0)
    return found[0]


def leave() -> None:
    """At the end of all runs: wait for the others. One that is gone while they still read from it breaks
    their connection."""
    if count() == 1:
        return
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


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
