"""LoRA experts: E low-rank pairs on a linear, of equal or different ranks."""

from __future__ import annotations

from dataclasses import dataclass

from ..bank import LinearExperts, scaled
from ..params import Param, linear_default


@dataclass(frozen=True)
class LoRA(LinearExperts):
    """`y = W x + sum_e w_e s_e B_e A_e x` (arXiv 2106.09685; as a mixture arXiv 2309.05444). A like torch.nn.Linear, B = 0."""

    kind = "lora"

    def params(self, d_in, d_out):
        rows = sum(self.ranks)
        return {"A": linear_default(rows, d_in), "B": Param((d_out, rows))}

    def constants(self):
        uniform = not isinstance(self.r, tuple)
        one_hot = [[float(o == e) for o in self.owner] for e in range(self.n)]
        return {} if uniform else {"scale": list(self.scales), "expand": one_hot}

    def mix(self, s, w, c):
        if not c:  # equal ranks
            factor = scaled(w, self.scales, s, c)  # [T, G, E] or a number
            if isinstance(factor, float):
                return s * factor if factor != 1 else s
            if self.n == 1:
                return s * factor
            return (s.unflatten(-1, (self.n, -1)) * factor.unsqueeze(-1)).flatten(-2)
        factor = scaled(w, self.scales, s, c)
        if isinstance(factor, float):
            return s * factor
        return s * (factor @ c["expand"].to(s.dtype))  # the one-hot GEMM: indexing would scatter in its backward
