"""Bottleneck adapters beside the feed-forward block."""

from __future__ import annotations

from dataclasses import dataclass

from ..bank import FeedForwardExperts
from ..lazy import Lazy
from ..params import Param
from ..spec import Count

torch = Lazy("torch")
lowrank = Lazy("moabench.kernels.lowrank")


@dataclass(frozen=True)
class ParallelAdapter(FeedForwardExperts):
    """`FFN'(h) = FFN(h) + sum_e w_e (U_e silu(D_e h + b_e) + c_e)`, bottleneck width `bottleneck` (arXiv
    2506.05928; 2110.04366).

    D and U Xavier-uniform with gain 1e-4, biases 0, so the start is almost, not exactly, the base. The output
    bias is one more rank column whose activation is 1.
    """

    kind = "parallel_adapter"
    size = "bottleneck"
    bottleneck: Count = 16

    def params(self, d, f):
        bound = 1e-4 * (6 / (d + self.bottleneck)) ** 0.5
        rows = self.n * self.bottleneck
        return {
            "down": Param((rows, d), "uniform", bound),
            "down_bias": Param((rows,)),
            "up": Param((d, rows), "uniform", bound),
            "up_bias": Param((d, self.n), decay=False),  # n biases side by side
        }

    def forward(self, p, x, y, ffn, routing, training):
        hidden = torch.nn.functional.silu(lowrank.shrink(x, p["down"]) + p["down_bias"].to(x.dtype))
        if routing is None:
            weights = hidden.new_ones(hidden.shape[0], self.n)
        else:
            weights = routing.weights.to(x.dtype)
            hidden = (hidden.unflatten(-1, (self.n, -1)) * weights.unsqueeze(-1)).flatten(-2)
        return lowrank.expand_add_(
            y, [(torch.cat([hidden, weights], -1), torch.cat([p["up"], p["up_bias"]], -1))]
        )
