"""What a training run counts about itself, on the device until the next logged step, and saved with every
checkpoint."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import load_measures
from .load import LoadCounts, fetch


@dataclass
class TrainingLog:
    """Losses, tokens and expert load since the last logged step (`recent`), and over the whole run."""

    losses: dict[str, Tensor] = field(default_factory=dict)
    """Each part of the loss, summed over the steps since the last logged one."""
    recent_tokens: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.int64))
    """Real tokens, padding excluded."""
    recent: LoadCounts = field(default_factory=LoadCounts)
    load: LoadCounts = field(default_factory=LoadCounts)
    tokens: int = 0
    seconds: float = 0.0
    last_step: int = 0
    started: float = field(default_factory=time.perf_counter)

    @torch.no_grad()
    def add(self, losses: dict[str, Tensor], mask: Tensor, routing: dict[str, Any]) -> None:
        """One forward pass; no host synchronisation."""
        for name, value in losses.items():
            self.losses[name] = self.losses.get(name, 0) + value.detach().float()
        self.recent_tokens = self.recent_tokens.to(mask.device) + mask.sum()
        self.recent.update(routing, mask.shape)

    def window(self, step: int) -> dict[str, float]:
        """A row of the history: means over the steps since the last row, which are then forgotten.

        Over all processes of a run: they all call this, each gets the same row but for its own clock. One
        copy from the device.
        """
        steps, self.last_step = max(1, step - self.last_step), step
        counted = fetch([*self.losses.values(), self.recent_tokens, *self.recent.tensors()], reduce=True)
        losses, tokens = counted[: len(self.losses)], int(counted[len(self.losses)])
        recent, seconds = self.recent.holding(counted[len(self.losses) + 1 :]), self._lap()
        row = {
            f"loss/{name}": float(value) / steps / processes()
            for name, value in zip(self.losses, losses, strict=True)
        }
        row["loss/total"] = sum(row.values())
        row |= {"tokens": tokens, "seconds": seconds, "tokens_per_second": tokens / seconds}
        row |= load_measures.measures(recent)
        self.tokens, self.seconds = self.tokens + tokens, self.seconds + seconds
        self.load.merge(recent)
        self._forget()
        return row

    def gather(self) -> None:
        """Before a checkpoint, which the first process alone writes: it takes over what all have counted
        since the last row."""
        names, tensors = (
            list(self.losses),
            [*self.losses.values(), self.recent_tokens, *self.recent.tensors()],
        )
        if processes() == 1:
            return
        counted = [sums.to(t.device) for sums, t in zip(fetch(tensors, reduce=True), tensors, strict=True)]
        losses = dict(zip(names, counted[: len(names)], strict=True))
        tokens, recent = counted[len(names)], self.recent.holding(counted[len(names) + 1 :])
        self._forget()
        if torch.distributed.get_rank() == 0:
            self.losses, self.recent_tokens, self.recent = losses, tokens, recent
        else:  # sums of nothing, of the same names, so that the next reduction has the same shape everywhere
            self.losses = {name: torch.zeros_like(value) for name, value in losses.items()}
            self.recent = recent.holding([torch.zeros_like(t) for t in recent.tensors()])

    def _forget(self) -> None:
        self.losses, self.recent_tokens, self.recent = {}, torch.zeros_like(self.recent_tokens), LoadCounts()

    def state(self) -> dict[str, Any]:
        """Plain data for `torch.save`; the clock is stopped for it and starts again with `restore`."""
        counted = {
            key: getattr(self, key) for key in ("losses", "recent_tokens", "tokens", "seconds", "last_step")
        }
        elapsed = time.perf_counter() - self.started
        return counted | {"recent": self.recent.state(), "load": self.load.state(), "elapsed": elapsed}

    def restore(self, state: dict[str, Any]) -> None:
        """Continues from what `state` returned; of several processes the first alone takes over what belongs
        to the next row."""
        for key in ("losses", "recent_tokens", "tokens", "seconds", "last_step"):
            setattr(self, key, state[key])
        self.recent, self.load = LoadCounts.from_state(state["recent"]), LoadCounts.from_state(state["load"])
        if processes() > 1 and torch.distributed.get_rank() > 0:
            self.losses = {name: torch.zeros_like(value) for name, value in self.losses.items()}
            self.recent_tokens = torch.zeros_like(self.recent_tokens)
            self.recent = self.recent.holding([torch.zeros_like(t) for t in self.recent.tensors()])
        self.started = time.perf_counter() - state["elapsed"]

    def start(self) -> None:
        """Starts the clock, before the first step of a run that is not resumed."""
        self.started = time.perf_counter()

    def _lap(self) -> float:
        now = time.perf_counter()
        seconds, self.started = now - self.started, now
        return seconds

    def pause(self, seconds: float) -> None:
        """Leaves out what was spent on something that is not training."""
        self.started += seconds


def processes() -> int:
    """Processes of this run."""
    there = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if there else 1
