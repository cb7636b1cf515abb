"""What a training step needs, before there is a GPU to run out of memory on.

The step is run on fake tensors (nothing is computed, nothing allocated) while every storage that comes to
life and dies is counted; that finds activations, gradients and passing tensors of any method as it is.
Batches are full: `train.max_length` tokens without padding, and logits of all of them, which is the worst
that can come. Not counted: what the CUDA context and the allocator's gaps take (about 1 GB), and evaluation.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moabench.methods.tuner.architecture import decoder_layers

from . import step

NF4_BYTES = 1 / 2 + 1 / 64 + 4 / (64 * 256)
"""A weight in 4 bits with double quantisation: its half byte, a byte of scale for 64 of them, a float for 256
such scales (2305.14314)."""


QUANTISED = {8: 1.0, 4: NF4_BYTES}
"""Bytes of a weight of a quantised linear, by `model.quantize`; those of rows' and columns' scales at 8 bits
do not count."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one device. frozen: the base's weights; trained: of what trains, with optimiser: its two
    moments; step: the most that gradients, activations and passing tensors take together; gathered: weights
    of other processes and unpacked ones, while in use."""

    frozen: float
    trained: float
    optimiser: float
    step: float
    gathered: float

    @property
    def total(self) -> float:
        return self.frozen + self.trained + self.optimiser + self.step + self.gathered


def estimate(
    model: nn.Module,
    batch: int,
    length: int,
    checkpointing: bool = False,
    quantize: int | None = None,
    processes: int = 1,
) -> Memory:
    """Of a training step of `model`, an adapted model on the meta device, on `batch` sequences of `length`
    tokens.

    processes: over how many the frozen base is sharded.
    """
    return with_weights(model, peak_of(model, batch, length, checkpointing), quantize, processes)


def with_weights(model: nn.Module, passing: int, quantize: int | None, processes: int) -> Memory:
    """A step of so many bytes, and the weights."""
    decoder = {id(layer) for layer in decoder_layers(model).values()}
    inside = [f"{name}." for name, module in model.named_modules() if id(module) in decoder]
    linears = {
        f"{name}.weight": module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and not module.weight.requires_grad
        and name.startswith(tuple(inside))
    }
    packed = linears if quantize else {}  # bitsandbytes leaves what lies outside of the layers as it is
    frozen = {
        name: p.numel() * (QUANTISED[quantize] if name in packed else p.element_size())
        for name, p in model.named_parameters()
        if not p.requires_grad
    }
    whole, gathered = sum(frozen.values()), 0.0
    # FSDP holds the layer that runs and the next one, and what lies outside of the layers all the time
    if processes > 1:
        layers = [sum(size for name, size in frozen.items() if name.startswith(layer)) for layer in inside]
        gathered = (1 - 1 / processes) * (whole - sum(layers) + 2 * max(layers))
    if packed:  # one linear at a time is unpacked
        gathered += max(weight.numel() * weight.element_size() for weight in packed.values())
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return Memory(whole / processes, trained, 2 * trained, passing, gathered)


class Peak(TorchDispatchMode):
    """Bytes of the storages that come to life inside: `now`, and `most` of them at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._seen: set[int] = set()

    def ignore(self, tensors: Iterator[Tensor]) -> None:
        """Storages that were there before."""
        self._seen |= {t.untyped_storage()._cdata for t in tensors}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for t in tree_leaves(found):
            if isinstance(t, Tensor) and t.untyped_storage()._cdata not in self._seen:
                self._counted(t.untyped_storage())
        return found

    def _counted(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._seen.add(key)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


def peak_of(model: nn.Module, batch: int, length: int, checkpointing: bool) -> int:
    """Of a forward and backward pass, gradients included. The model is left on fake tensors, for one use."""
    model.train()
    if checkpointing:
        checkpoint(model.get_base_model() if hasattr(model, "get_base_model") else model)
    with fake(model), Peak() as peak:
        ids = torch.zeros(batch, length, dtype=torch.long)
        peak.ignore(t for t in (ids, *model.parameters(), *model.buffers()))
        peak.now = peak.most = 0
        step.full(model, ids).backward()
    return peak.most


def checkpoint(base: nn.Module) -> None:
    """Gradient checkpointing of a transformers model as the Trainer switches it on; by its older name where
    there is no newer one."""
    enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
    enable({"use_reentrant": False})


@contextmanager
def fake(model: nn.Module) -> Iterator[None]:
    """A model on the meta device with fake tensors in place of its own, inside a mode that makes only such.
    transformers asks a mask for its values where it is a meta tensor, and does not where it is a fake one."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        _materialise(model)
        yield


def _materialise(model: nn.Module) -> None:
    """Not with `to`, which fake tensors do not bear."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, t in held.items():
                if t is not None and id(t) not in made:
                    empty = torch.empty(t.shape, dtype=t.dtype)
                    made[id(t)] = (
                        nn.Parameter(empty, requires_grad=t.requires_grad)
                        if isinstance(t, nn.Parameter)
                        else empty
                    )
                if t is not None:
                    held[name] = made[id(t)]
