"""LoRA experts that share one A (HydraLoRA)."""

from __future__ import annotations

from dataclasses import dataclass

from ..bank import LinearExperts, mix_constants, weighed
from ..params import Param, linear_default
from ..spec import ConfigError


@dataclass(frozen=True)
class SharedALoRA(LinearExperts):
    """`y = W x + s sum_e w_e B_e A x` (arXiv 2404.19245, eq. 4): one A, E up-projections. A like
    torch.nn.Linear, B = 0.

    The rank-side tensor is the outer product of the weights and A x. The official code draws a dropout mask
    for each expert, so that its A sees E different inputs; here they share one.
    """

    kind = "lora_shared_a"

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.r, tuple):
            raise ConfigError(f"r={list(self.r)}: expected one rank, since the experts share A.")

    @property
    def owners(self):
        return {"B": (1, self.owner)}

    def params(self, d_in, d_out):
        return {"A": linear_default(self.r, d_in), "B": Param((d_out, self.n * self.r))}

    def constants(self):
        return mix_constants(self) | {
            "tile": [[float(i == j % self.r) for j in range(self.n * self.r)] for i in range(self.r)]
        }

    def mix(self, s, w, c):
        tiled = s.flatten(0, 1) @ c["tile"].to(s.dtype)  # A x once for each expert
        return weighed(tiled.unflatten(0, s.shape[:2]), w, c)
