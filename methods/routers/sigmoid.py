"""Soft MoA's router: one independent sigmoid gate for each expert."""

from __future__ import annotations

from dataclasses import dataclass

from ..gate_network import GateNetwork
from ..routing import Routing


@dataclass(frozen=True)
class Sigmoid(GateNetwork):
    """`g = sigmoid(R(u))` in (0, 1)^E, neither normalised nor selected (arXiv 2506.05928, soft MoA)."""

    kind = "sigmoid"

    def route(self, scores, training):
        gates = scores.sigmoid()
        return Routing(weights=gates, probs=gates, logits=scores)
