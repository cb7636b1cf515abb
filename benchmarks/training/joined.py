"""Auxiliary losses of a batch that is cut into several passes (accumulation, processes): what the passes must
know of each other (`moabench.methods.loss`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import Trainer

from moabench.methods.loss import Sums

from . import step


class Joined:
    """The sums of one optimiser step, as means over its passes.

    Processes exchange them in each pass. Passes that follow one another cannot: the last one's choices are
    known when the first ones' gradients have been taken. So they all run once more before, without gradients
    and with the random numbers that they will draw again (dropout): about a third more time, where a loss
    with batch=global is trained on and train.accumulation is above 1, and nowhere else.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.counted: Sums | None = None
        self.needed = True  # until a pass has shown that no loss asks for it

    def count(self, passes: Sequence[dict[str, Any]]) -> None:
        """Before the passes of a step."""
        self.counted = None
        if len(passes) < 2 or not self.needed:
            return
        trainer, device = self.trainer, self.trainer.args.device
        trainer.model_wrapped.train()  # as each pass does before it starts
        with (
            torch.random.fork_rng([device] if device.type == "cuda" else []),
            trainer.compute_loss_context_manager(),
        ):
            found: list[Sums] = []
            for inputs in passes:
                batch = trainer._prepare_inputs(inputs)
                found.append(step.sums(trainer.model_wrapped, batch, inner=trainer.model))
                if not found[0]:
                    self.needed = False
                    return
        self.counted = _mean(found, trainer.accelerator.num_processes)

    @property
    def means(self) -> Callable[[Sums], Sums] | None:
        """What makes of one pass's sums those of the step; None where the pass is the whole step."""
        if self.counted is not None:
            return lambda own: self.counted
        processes = self.trainer.accelerator.num_processes
        return (lambda own: _mean([own], processes)) if processes > 1 else None


def _mean(passes: Sequence[Sums], processes: int) -> Sums:
    """Mean over passes and processes, by one reduction; all processes meet the same losses and sites."""
    first = passes[0]
    if not first:
        return first
    flat = sum(torch.cat([t.flatten() for found in sums.values() for t in found]) for sums in passes)
    if processes > 1:
        torch.distributed.all_reduce(flat)
    parts = iter(
        (flat / (len(passes) * processes)).split([t.numel() for found in first.values() for t in found])
    )
    return {key: [next(parts).view_as(t) for t in found] for key, found in first.items()}
