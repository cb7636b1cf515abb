"""`moabench memory ...`: what a training step needs, before there is a GPU to run out of memory on.

    moabench memory method=moa_soft model=llama3.1_8b train=paper train.gradient_checkpointing=true
    moabench memory --table                      usual models under usual methods

How it is counted, and what is not: benchmarks/training/memory.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from moabench import methods
from moabench.benchmarks.bases.skeleton import Skeleton
from moabench.benchmarks.config.overrides import composed
from moabench.benchmarks.config.run import RunConfig
from moabench.benchmarks.data import labels
from moabench.benchmarks.fairness.budget import apply
from moabench.benchmarks.tasks.rows import Reader
from moabench.benchmarks.training.memory import estimate, peak_of, with_weights
from moabench.methods import catalog
from moabench.methods.spec import ConfigError


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

    if cfg.parsed_method.tuner == "none":
        raise ConfigError(f"method={cfg.parsed_method.name}: expected a method that trains.")
    cfg, _ = apply(labels.fitted(cfg, Reader(cfg.data)))
    t, model = cfg.train, Skeleton(cfg.model).attached(cfg.method)
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
            steps = {way: peak_of(model, batch, length, checkpointing=way) for way, model in models.items()}
            found = [with_weights(models[way], steps[way], *more) for way, *more in WAYS.values()]
            yield (
                f"| `{name}` | `{method}` | "
                + " | ".join(f"{memory.total / 2**30:.1f}" for memory in found)
                + " |"
            )
