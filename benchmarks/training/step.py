"""The loss of a training step: the task's and the auxiliary ones, for every method alike.

The Trainer, the counts of FLOPs and memory and the benchmarks of speed all take it from here, so that what is
counted is what is trained.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moabench.benchmarks.data import batches
from moabench.methods import record
from moabench.methods.loss import Sums, auxiliary, global_sums


@dataclass(frozen=True)
class Losses:
    """task: summed negative log-likelihood of the answer tokens; auxiliary: by name, coefficients applied;
    routing: of each site."""

    task: Tensor
    auxiliary: dict[str, Tensor]
    routing: dict[str, Any]


def losses(
    model: nn.Module,
    batch: dict[str, Any],
    inner: nn.Module | None = None,
    joined: Callable[[Sums], Sums] | None = None,
) -> Losses:
    """Of one forward pass over a batch as `batches.collate` makes it. inner: the model inside, where `model`
    is a wrapper for several processes. joined: where this pass sees a part of an optimiser step's batch, what
    makes of its `global_sums` their mean over all passes of the step."""
    with record(inner or model) as recorder:
        logits = batches.forward(model, batch, batch["kept"], inner=inner)
    task = answer_nll(logits, batch["labels"][:, -batch["kept"] :])
    whole = None if joined is None else joined(global_sums(recorder.entries))
    return Losses(task, auxiliary(recorder.entries, whole), recorder.routing)


@torch.no_grad()
def sums(model: nn.Module, batch: dict[str, Any], inner: nn.Module | None = None) -> Sums:
    """`global_sums` of one forward pass, without its losses."""
    with record(inner or model) as recorder:
        batches.forward(model, batch, 1, inner=inner)
    return global_sums(recorder.entries)


def full(model: nn.Module, ids: Tensor) -> Tensor:
    """The loss of a step on whole sequences ids [B, L], every token of them an answer: a mean over tokens,
    plus the auxiliary losses. Sequences have skills 0 and 1 in turn, for routers that read them."""
    skills = torch.arange(len(ids), device=ids.device) % 2
    found = losses(model, {"input_ids": ids, "labels": ids, "kept": ids.shape[1], "skill_ids": skills})
    return found.task / ids.numel() + sum(found.auxiliary.values())


def answer_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum of the answer tokens' negative log-likelihoods, fp32. logits [B, L, V] at position i predict labels
    [B, L] at i + 1."""
    return F.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
    )
