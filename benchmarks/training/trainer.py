"""A transformers Trainer for every method alike: task loss plus recorded auxiliary losses, load statistics,
exact checkpoints."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import PrinterCallback, Trainer, TrainerCallback

from moabench.benchmarks.observing.training_log import TrainingLog
from moabench.methods.spec import ConfigError
from moabench.methods.tuner.moments import Moments

from . import step
from .joined import Joined


class _Moments(TrainerCallback):
    """Calls a method's rules where the Trainer says that a moment is there: once a step, not once a pass."""

    def __init__(self, moments: Moments) -> None:
        self.moments = moments

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.moments.after_backward()

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.moments.after_step()


class MixtureTrainer(Trainer):
    """Trainer whose loss is the task loss plus the auxiliary losses the model records. It never asks which
    method it trains."""

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self.remove_callback(PrinterCallback)
        # answer tokens are counted over the whole accumulated batch, and `compute_loss` divides by that count
        self.model_accepts_loss_kwargs = self.loss_is_scaled_for_ga = self._loss_shifts_labels = True
        self.tally = TrainingLog()
        self.moments = Moments(self.model)
        self.add_callback(_Moments(self.moments))
        self.joined = Joined(self)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The passes of the next optimiser step; what their losses must know of each other is counted
        here."""
        found, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.joined.count(found)
        return found, items

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """`answer-token NLL / answer tokens in the accumulated batch + sum of auxiliary losses / accumulation
        steps`.

        Each part then has the same gradient however the batch is cut into forward passes and processes; of
        the auxiliary losses those with batch=global, where micro is the mean over passes.
        """
        found = step.losses(model, inputs, inner=self.model, joined=self.joined.means)
        # DDP averages over processes.
        parts = {"task": found.task / num_items_in_batch * self.accelerator.num_processes}
        parts |= {k: v / self.current_gradient_accumulation_steps for k, v in found.auxiliary.items()}
        self.tally.add(parts, inputs["attention_mask"], found.routing)
        self.moments.passed(found.routing)
        loss = sum(parts.values())
        return (loss, None) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds what the tally counted since the last row; stops on a loss that is not finite."""
        if "loss" in logs:
            logs.pop("loss")  # it mixes the parts, and after a resume forgets the steps before
            logs |= self.tally.window(self.state.global_step)
            for name, value in logs.items():
                if name.startswith("loss/") and not math.isfinite(value):
                    raise ConfigError(
                        f"{name}={value} at step {self.state.global_step}: expected a finite loss. The "
                        f"learning rate is {self.args.learning_rate:g}, "
                        f"train.max_grad_norm={self.args.max_grad_norm:g}; try a smaller rate."
                    )
        super().log(logs)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """All but vectors (biases, norms, DoRA's magnitudes) and what is declared to have none: a module's
        `no_weight_decay` names its own (`methods.Param`)."""
        exempt = {name for name, p in model.named_parameters() if p.ndim < 2}
        for prefix, module in model.named_modules():
            exempt |= {f"{prefix}.{name}" for name in getattr(module, "no_weight_decay", ())}
        return [name for name in super().get_decay_parameter_names(model) if name not in exempt]

    def floating_point_ops(self, inputs) -> int:
        """Not reported; the Trainer's own estimate walks over every parameter in every step."""
        return 0

    def _get_train_sampler(self, train_dataset=None) -> SequentialSampler:
        """The data come in the order of `training_order`, which no random state can change."""
        return SequentialSampler(self.train_dataset)

    def _get_collator_with_removed_columns(self, data_collator, description=None):
        """Examples are no dicts and have no columns to remove."""
        return data_collator

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self.tally.gather()
        super()._save_checkpoint(*args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict=None) -> None:
        """Writes what training changes, and the tally: exact for every method, and the frozen base is left
        out."""
        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: value.detach().contiguous() for name, value in changing(self.model)}
        safetensors.torch.save_file(tensors, folder / "trained.safetensors")
        torch.save(self.tally.state(), folder / "tally.pt")

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        folder = Path(resume_from_checkpoint)
        saved = safetensors.torch.load_file(folder / "trained.safetensors")
        with torch.no_grad():
            for name, value in changing(self.model):
                value.copy_(saved[name])
        self.tally.restore(torch.load(folder / "tally.pt", weights_only=True, map_location=self.args.device))


def changing(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Trainable parameters, and the buffers that `state_dict` holds."""
    kept = model.state_dict().keys()
    yield from ((name, p) for name, p in model.named_parameters() if p.requires_grad)
    yield from ((name, b) for name, b in model.named_buffers() if name in kept)
