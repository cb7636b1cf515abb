"""Whether a run can fit into the machine, asked before it takes memory: the kernel kills without a word.

The estimate is that of `moabench memory`, for a full batch of the longest training row. Where there is less
than it, the run cannot end; where there is more, evaluation or other programs may still need too much.
"""

from __future__ import annotations

import heapq
import sys
from typing import Any

from moabench.benchmarks.bases import loading
from moabench.benchmarks.bases.skeleton import Skeleton
from moabench.benchmarks.config.run import RunConfig
from moabench.benchmarks.machine import memory, processes
from moabench.benchmarks.training.memory import peak_of, with_weights
from moabench.benchmarks.training.train import encode_rows
from moabench.methods.spec import ConfigError

from .prepared import Prepared

INDEX_BYTES = 52
"""Of an entry in the order of training: a number, and a place in three lists."""

SEQUENCE_BYTES = 256
"""Of a sequence of the passes that wait for their step: ids, mask, labels, prompt of few tokens."""

ROW_BYTES = 32
"""Of a rank row of an expert in the bank's constants, while they are made."""


CANDIDATES = 16
"""Rows that are encoded: what is longest in letters, in any of its fields, may not be so in tokens."""


def check(prepared: Prepared, device: str) -> None:
    """Raises ConfigError, with the estimate, for a run that cannot fit."""
    cfg = prepared.cfg
    if prepared.trains:
        _compare(_on_host(prepared), "cpu", cfg)
    base = Skeleton(cfg.model)
    model = _attached(base, cfg)
    needed = _weights(model, cfg, step=0)
    _compare(needed, device, cfg)
    if prepared.trains and not cfg.train.halve:
        length = _longest(prepared)
        try:
            step = peak_of(model, cfg.train.batch_size, length, cfg.train.gradient_checkpointing)
        except ConfigError:
            raise
        except Exception as error:  # a base that cannot run on fake tensors
            print(f"the memory of a step is not known ({type(error).__name__})", file=sys.stderr)
            return
        what = f"a step of {cfg.train.batch_size:,} x {length:,} tokens"
        _compare(needed | {what: step}, device, cfg)


def _attached(base: Skeleton, cfg: RunConfig) -> Any:
    try:
        return base.attached(cfg.method)
    except ConfigError:
        raise
    except Exception as error:  # PEFT's words for a base that has none of the targets
        first = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"method={cfg.parsed_method.name} cannot be attached to model={cfg.model.name}: {first}"
        ) from error


def _weights(model: Any, cfg: RunConfig, step: int) -> dict[str, float]:
    found = with_weights(model, step, cfg.model.quantize, processes.count() if cfg.shard else 1)
    return {
        "frozen weights": found.frozen + found.gathered,
        "trained weights and optimiser": found.trained + found.optimiser,
    }


def _on_host(prepared: Prepared) -> dict[str, float]:
    """What grows with the length of training, and with the square of the number of experts."""
    t = prepared.cfg.train
    rows = len(prepared.mixed[0])
    sequences = t.steps * t.batch_size * t.accumulation if t.steps else int(t.epochs * rows)
    banks: list[Any] = [
        bank
        for method in (prepared.method, *(method for _, method in prepared.method.layers))
        for mixture in method.mixtures
        for bank in mixture.banks.values()
        if bank.low_rank and method.tuner == "mixture"
    ]
    return {
        f"the order of {sequences:,} sequences": INDEX_BYTES * sequences,
        f"{t.accumulation:,} passes of {t.batch_size:,} sequences": SEQUENCE_BYTES
        * t.accumulation
        * t.batch_size,
        "constants of the experts": max((ROW_BYTES * b.n * sum(b.ranks) for b in banks), default=0),
    }


def _longest(prepared: Prepared) -> int:
    """Tokens of the longest training row, of those that are longest in letters."""
    rows = heapq.nlargest(CANDIDATES, prepared.mixed[0], key=lambda row: len(str(row)))
    try:
        examples, _ = encode_rows(loading.load_tokenizer(prepared.cfg.model), rows, prepared.cfg)
    except (ConfigError, KeyError):  # rows that cannot be trained on: said of all of them when they are
        return prepared.cfg.train.max_length
    return max(len(example.ids) for example in examples)


def _compare(needed: dict[str, float], device: str, cfg: RunConfig) -> None:
    most = memory.total(device)
    if sum(needed.values()) <= most:
        return
    parts = ", ".join(f"{name} {_gib(size)}" for name, size in needed.items() if size >= 2**20)
    raise ConfigError(
        f"out of memory before the run began: {parts} would take {_gib(sum(needed.values()))} of "
        f"{device}'s {_gib(most)}. Expected less: fewer or smaller experts, a smaller train.batch_size, "
        "train.steps or model, or train.gradient_checkpointing=true."
    )


def _gib(size: float) -> str:
    return f"{size / 2**30:,.1f} GiB"
