"""The routers alone, or with the experts (Mixture-of-LoRAs, second stage)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from ..spec import ConfigError
from ..stage import Round, Stage


@dataclass(frozen=True)
class Routers(Stage):
    """Trains the routers on all rows, by whatever losses the method has; train_experts: the experts go on
    training too (arXiv 2403.03432)."""

    kind = "routers"
    train_experts: bool = False

    @cached_property
    def trained(self):
        return ("experts", "routers") if self.train_experts else ("routers",)

    def check(self, mixtures):
        if not any(mixture.routed for mixture in mixtures):
            raise ConfigError("router.kind=none: expected a router, since this stage trains it.")

    def rounds(self, counts):
        return [Round(self.kind, self.trained)]
