"""(IA)^3 vectors as experts: activations scaled by a mixture of vectors (MoV)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..bank import AroundExperts
from ..params import Param
from ..spec import ConfigError


@dataclass(frozen=True)
class IA3Vectors(AroundExperts):
    """`a' = a * sum_e w_e(a) l_e` (arXiv 2309.05444; each vector: arXiv 2205.05638).

    On k and v, a is what the linear gives to one head, before any norm of the keys and before positions, and
    every head has a mixture of its own, by one router that all heads share. On down, a is what the linear
    reads, which is the same as scaling one factor of the gated block. Vectors start at 1, so that the model
    starts at its base under any weights that sum to 1; weight decay would pull them to 0, and does not touch
    them. The paper speaks of a router that reads the token's representation; the official code and this one
    read the activation.
    """

    kind = "ia3_vectors"
    size = "n"
    targets: tuple[Literal["k", "v", "down"], ...] = ("k", "v", "down")

    def __post_init__(self):
        if not self.targets or len(set(self.targets)) < len(self.targets):
            raise ConfigError(f"targets={list(self.targets)}: expected one or more of k, v, down, each once.")

    @property
    def owners(self):
        return {"vectors": (1, tuple(range(self.n)))}

    def heads(self, place, d_in, d_out, head_dim):
        return (1, d_in) if place == "down" else (d_out // head_dim, head_dim)

    def reads_output(self, place):
        return place != "down"

    def params(self, place, d_in, d_out, head_dim):
        heads, width = self.heads(place, d_in, d_out, head_dim)
        # decay would pull a factor to 0, which shuts the activation off; 1 leaves it alone
        return {"vectors": Param((heads, self.n, width), "full", 1.0, decay=False)}

    def forward(self, p, place, x, linear, route):
        def scaled(a):  # [T, H, width]
            w = route(a)  # [T, H, E]
            vectors = p["vectors"]
            mixed = vectors.sum(1) if w is None else (w.transpose(0, 1) @ vectors.to(w.dtype)).transpose(0, 1)
            return (a * mixed.to(a.dtype)).flatten(1)

        if place == "down":
            return linear(scaled(x.unsqueeze(1)))
        y = linear(x)
        return scaled(y.unflatten(-1, (len(p["vectors"]), -1)))
