"""LoRA experts: E low-rank pairs on a linear, of equal or different ranks."""

from __future__ import annotations

from dataclasses import dataclass

from ..bank import LinearExperts, mix_constants, weighed
from ..params import Param, linear_default


@dataclass(frozen=True)
class LoRA(LinearExperts):
    """`y = W x + sum_e w_e s_e B_e A_e x` (arXiv 2106.09685; as a mixture arXiv 2309.05444). A like
    torch.nn.Linear, B = 0."""

    kind = "lora"

    @property
    def sortable(self):
        return len(set(self.ranks)) == 1 and self.gate_grad == "plain"

    @property
    def owners(self):
        return {"A": (0, self.owner), "B": (1, self.owner)}

    def params(self, d_in, d_out):
        rows = sum(self.ranks)
        return {"A": linear_default(rows, d_in), "B": Param((d_out, rows))}

    def constants(self):
        return mix_constants(self)

    def mix(self, s, w, c):
        return weighed(s, w, c)
