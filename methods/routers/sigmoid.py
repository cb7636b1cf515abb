"""Soft MoA's router: one independent sigmoid gate for each expert."""

from __future__ import annotations

from dataclasses import dataclass

from ..gate_network import GateNetwork
from ..lazy import Lazy
from ..routing import Routing

route = Lazy("moabench.kernels.route")


@dataclass(frozen=True)
class Sigmoid(GateNetwork):
    """`g = sigmoid(R(u))` in (0, 1)^E, neither normalised nor selected (arXiv 2506.05928, soft MoA)."""

    kind = "sigmoid"

    @property
    def rule(self):
        return route.Rule(activation="sigmoid")

    def route(self, scores, training):
        gates = scores.sigmoid()
        return Routing(weights=gates, probs=gates, logits=scores)
