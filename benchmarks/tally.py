"""What a training run counts about itself, on the device until the next logged step, and saved with every checkpoint."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .meter import Meter


@dataclass
class Tally:
    """Losses, tokens and expert load since the last logged step (`recent`), and over the whole run."""

    losses: dict[str, Tensor] = field(default_factory=dict)
    """Each part of the loss, summed over the steps since the last logged one."""
    recent_tokens: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.int64))
    """Real tokens, padding excluded."""
    recent: Meter = field(default_factory=Meter)
    load: Meter = field(default_factory=Meter)
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
        """A row of the history: means over the steps since the last row, which are then forgotten."""
        steps, self.last_step = max(1, step - self.last_step), step
        tokens, seconds = int(self.recent_tokens), self._lap()
        row = {f"loss/{name}": float(value) / steps for name, value in self.losses.items()}
        row["loss/total"] = sum(row.values())
        row |= {"tokens": tokens, "seconds": seconds, "tokens_per_second": tokens / seconds}
        row |= {f"load/{name}": value for name, value in self.recent.measures().items()}
        self.tokens, self.seconds = self.tokens + tokens, self.seconds + seconds
        self.load.merge(self.recent)
        self.losses, self.recent_tokens, self.recent = {}, torch.zeros_like(self.recent_tokens), Meter()
        return row

    def state(self) -> dict[str, Any]:
        """Plain data for `torch.save`; the clock is stopped for it and starts again with `restore`."""
        counted = {key: getattr(self, key) for key in ("losses", "recent_tokens", "tokens", "seconds", "last_step")}
        elapsed = time.perf_counter() - self.started
        return counted | {"recent": self.recent.state(), "load": self.load.state(), "elapsed": elapsed}

    def restore(self, state: dict[str, Any]) -> None:
        """Continues from what `state` returned."""
        for key in ("losses", "recent_tokens", "tokens", "seconds", "last_step"):
            setattr(self, key, state[key])
        self.recent, self.load = Meter.from_state(state["recent"]), Meter.from_state(state["load"])
        self.started = time.perf_counter() - state["elapsed"]

    def start(self) -> None:
        """Starts the clock, before the first step of a run that is not resumed."""
        self.started = time.perf_counter()

    def _lap(self) -> float:
        now = time.perf_counter()
        seconds, self.started = now - self.started, now
        return seconds
