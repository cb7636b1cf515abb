"""LoRA experts that share one A (HydraLoRA)."""

from __future__ import annotations

from dataclasses import dataclass

from ..bank import LinearExperts, scaled
from ..params import Param, linear_default
from ..spec import ConfigError


@dataclass(frozen=True)
class SharedALoRA(LinearExperts):
    """`y = W x + s sum_e w_e B_e A x` (arXiv 2404.19245, eq. 4): one A, E up-projections. A like torch.nn.Linear, B = 0.

    The rank-side tensor is the outer product of the weights and A x. The official code draws a dropout mask for each expert, so that
    its A sees E different inputs; here they share one.
    """

    kind = "lora_shared_a"

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.r, tuple):
            raise ConfigError(f"r={list(self.r)}: expected one rank, since the experts share A.")

    def params(self, d_in, d_out):
        return {"A": linear_default(self.r, d_in), "B": Param((d_out, self.n * self.r))}

    def mix(self, s, w, c):
        factor = scaled(w, self.scales, s, c)
        if isinstance(factor, float):
            return (s * factor).repeat(1, 1, self.n)
        return (factor.unsqueeze(-1) * s.unsqueeze(-2)).flatten(-2)  # [T, G, E, 1] x [T, G, 1, r]
