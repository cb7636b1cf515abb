"""No router: every expert acts on every token with weight 1."""

from __future__ import annotations

from dataclasses import dataclass

from ..router import Router


@dataclass(frozen=True)
class NoRouter(Router):
    """Weight 1 for every expert and token: a plain adapter, or the sum of several. Nothing is routed, so
    nothing is recorded."""

    kind = "none"

    def params(self, d, experts):
        return {}
