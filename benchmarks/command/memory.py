"""`moabench memory ...`: what a training step needs, before there is a GPU to run out of memory on.

    moabench memory method=moa_soft model=llama3.1_8b train=paper train.gradient_checkpointing=true
    moabench memory --table                      the table of benchmarks/README.md

The step is run on fake tensors (nothing is computed, nothing allocated) while every storage that comes to
life and dies is counted; that finds activations, gradients and passing tensors of any method as it is.
Batches are full: `train.max_length` tokens without padding, and logits of all of them, which is the worst
that can come. Not counted: what the CUDA context and the allocator's gaps take (about 1 GB), and evaluation.
"""

from __future__ import annotations

import argparse
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moabench import methods
from moabench.benchmarks.config.run import composed
from moabench.benchmarks.training.trainer import answer_nll
from moabench.methods import catalog
from moabench.methods.spec import ConfigError
from moabench.methods.tuner.architecture import decoder_layers

if TYPE_CHECKING:
    from moabench.benchmarks.config.run import RunConfig

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
    return _with_weights(model, _peak(model, batch, length, checkpointing), quantize, processes)


def _with_weights(model: nn.Module, step: int, quantize: int | None, processes: int) -> Memory:
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
    if (
        processes > 1
    ):  # FSDP holds the layer that runs and the next one, and what lies outside of the layers all the time
        layers = [sum(size for name, size in frozen.items() if name.startswith(layer)) for layer in inside]
        gathered = (1 - 1 / processes) * (whole - sum(layers) + 2 * max(layers))
    if packed:  # one linear at a time is unpacked
        gathered += max(weight.numel() * weight.element_size() for weight in packed.values())
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return Memory(whole / processes, trained, 2 * trained, step, gathered)


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


def _peak(model: nn.Module, batch: int, length: int, checkpointing: bool) -> int:
    """Of a forward and backward pass, gradients included. The model is left on fake tensors, for one use."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    model.train()
    if checkpointing:
        checkpoint(model.get_base_model() if hasattr(model, "get_base_model") else model)
    with FakeTensorMode(), Peak() as peak:
        _materialise(model)
        ids = torch.zeros(batch, length, dtype=torch.long)
        peak.ignore(t for t in (ids, *model.parameters(), *model.buffers()))
        peak.now = peak.most = 0
        step(model, ids)
    return peak.most


def checkpoint(base: nn.Module) -> None:
    """Gradient checkpointing of a transformers model as the Trainer switches it on; by its older name where
    there is no newer one."""
    enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def step(model: nn.Module, ids: Tensor) -> None:
    """Forward and backward pass of a training step on full sequences [B, L], logits of every token."""
    from moabench.benchmarks.speed.whole import facts

    with methods.record(model) as recorder:
        logits = model(input_ids=ids, use_cache=False, **facts(model, ids)).logits
    loss = answer_nll(logits, ids) / ids.numel() + sum(recorder.losses.values())
    del logits
    loss.backward()


def _materialise(model: nn.Module) -> None:
    """Replace meta tensors by fake ones. Not with `to`, which fake tensors do not bear."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, t in held.items():
                if t is not None and id(t) not in made:
                    fake = torch.empty(t.shape, dtype=t.dtype)
                    made[id(t)] = (
                        nn.Parameter(fake, requires_grad=t.requires_grad)
                        if isinstance(t, nn.Parameter)
                        else fake
                    )
                if t is not None:
                    held[name] = made[id(t)]


# ---- the command


def main(argv: Sequence[str]) -> int:
    """Run `moabench memory <argv>`; returns the exit code. Raises ConfigError."""
    parser = argparse.ArgumentParser(
        prog="moabench memory", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--table", action="store_true", help="models of usual sizes under usual methods")
    parser.add_argument(
        "--processes",
        type=int,
        default=1,
        metavar="N",
        help="over which shard=true splits the base (default: 1)",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as of a run")
    given = parser.parse_args(argv)
    for line in _table() if given.table else _of_config(composed(given.overrides), given.processes):
        print(line, flush=True)
    return 0


def _of_config(cfg: RunConfig, processes: int) -> Iterator[str]:
    from moabench.benchmarks.fairness.budget import Skeleton, apply

    if cfg.parsed_method.tuner == "none":
        raise ConfigError(f"method={cfg.parsed_method.name}: expected a method that trains.")
    cfg, _ = apply(cfg)
    t, model = cfg.train, Skeleton(cfg).attached(cfg.method)
    yield (
        f"{cfg.parsed_method.name} on {cfg.model.name} ({cfg.model.dtype}), a step of {t.batch_size} "
        f"x {t.max_length} tokens"
        + (f", base in {cfg.model.quantize} bits" if cfg.model.quantize else "")
        + (", gradient checkpointing" if t.gradient_checkpointing else "")
        + (f", base over {processes} processes" if processes > 1 else "")
    )
    found = estimate(
        model, t.batch_size, t.max_length, t.gradient_checkpointing, cfg.model.quantize, processes
    )
    rows = {
        "frozen weights": found.frozen,
        "trained weights": found.trained,
        "optimiser": found.optimiser,
        "gradients, activations": found.step,
        "gathered or unpacked weights": found.gathered,
        "together": found.total,
    }
    yield from (f"  {name:<30}{_gib(size):>9} GiB" for name, size in rows.items() if size)


def _gib(size: float) -> str:
    return f"{size / 2**30:,.2f}"


LLAMA = {"vocab_size": 128256, "num_attention_heads": 32, "num_key_value_heads": 8}
SIZES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama3.2_1b": (
        "llama",
        LLAMA
        | {
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "tie_word_embeddings": True,
        },
    ),
    "llama3.2_3b": (
        "llama",
        LLAMA
        | {
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "num_hidden_layers": 28,
            "num_attention_heads": 24,
            "tie_word_embeddings": True,
        },
    ),
    "llama3.1_8b": (
        "llama",
        LLAMA | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
    ),
    "qwen3_14b": (
        "qwen3",
        {
            "vocab_size": 151936,
            "hidden_size": 5120,
            "intermediate_size": 17408,
            "num_hidden_layers": 40,
            "num_attention_heads": 40,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "tie_word_embeddings": False,
        },
    ),
}
"""model_type and sizes of models in conf/model, whose own configs lie on the hub."""
WAYS: dict[str, tuple[bool, int | None, int]] = {
    "plain": (False, None, 1),
    "gradient checkpointing": (True, None, 1),
    "and a base in 4 bits": (True, 4, 1),
    "or sharded over 2 GPUs": (True, None, 2),
}
"""Columns of the table: (checkpointing, quantize, processes)."""


def bare(name: str) -> nn.Module:
    """A model of `SIZES` in bfloat16 on the meta device."""
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, sizes = SIZES[name]
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes), dtype=torch.bfloat16)


def _table(batch: int = 8, length: int = 256) -> Iterator[str]:
    yield f"GiB for a training step of {batch} x {length} tokens in bfloat16"
    yield ""
    yield "| model | method | " + " | ".join(WAYS) + " |"
    yield "|---|---|" + "---:|" * len(WAYS)
    for name in SIZES:
        for method in ("lora", "molora", "mixlora", "moa_soft"):
            models = {
                way: methods.attach(bare(name), catalog.raw(method)).to("meta") for way in (False, True)
            }
            steps = {way: _peak(model, batch, length, checkpointing=way) for way, model in models.items()}
            found = [_with_weights(models[way], steps[way], *more) for way, *more in WAYS.values()]
            yield (
                f"| `{name}` | `{method}` | "
                + " | ".join(f"{memory.total / 2**30:.1f}" for memory in found)
                + " |"
            )
