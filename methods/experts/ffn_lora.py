"""Feed-forward experts that share the frozen block and differ by LoRA on gate, up and down (MixLoRA)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from ..bank import FeedForwardExperts
from ..lazy import Lazy
from ..params import Param, linear_default
from ..spec import Count, NonNegative, Share

torch = Lazy("torch")
lowrank = Lazy("moabench.kernels.lowrank")
mix_ffn = Lazy("moabench.kernels.mix_ffn")


@dataclass(frozen=True)
class FeedForwardLoRA(FeedForwardExperts):
    """`E_e(h) = (W_d + s B_d A_d) (act((W_g + s B_g A_g) h) * ((W_u + s B_u A_u) h))`, output `sum_e w_e
    E_e(h)` (arXiv 2404.15159).

    The mixture replaces the block's output. The frozen gate and up projections run once for all experts, and
    so does the frozen down projection, on `sum_e w_e h_e`, since it is linear. A like torch.nn.Linear, B = 0;
    s = alpha / r, with rslora alpha / sqrt(r). dropout acts on the inputs of the A's, one mask for all
    experts.
    """

    kind = "ffn_lora"
    replaces = True
    r: Count = 16
    alpha: NonNegative = 32.0
    rslora: bool = False
    dropout: Share = 0.0

    @cached_property
    def scale(self) -> float:
        return self.alpha / (self.r**0.5 if self.rslora else self.r)

    def params(self, d, f):
        rows = self.n * self.r
        return {
            "gate_A": linear_default(rows, d),
            "gate_B": Param((f, rows)),
            "up_A": linear_default(rows, d),
            "up_B": Param((f, rows)),
            "down_A": linear_default(rows, f),
            "down_B": Param((d, rows)),
        }

    def forward(self, p, x, y, ffn, routing, training):
        drop = self.dropout if training else 0.0
        (gate, up), s = ffn.gate_up_shrink(x, torch.cat([p["gate_A"], p["up_A"]]), drop)
        s_gate, s_up = (s * self.scale).chunk(2, dim=-1)
        if routing is None:
            weights, ids = x.new_ones(x.shape[0], self.n), None
        else:
            weights, ids = routing.weights.to(x.dtype), routing.ids
        inner, z = mix_ffn.mix_ffn(
            gate,
            up,
            s_gate,
            s_up,
            p["gate_B"],
            p["up_B"],
            p["down_A"],
            weights,
            ids,
            act=ffn.activation,
            dropout=drop,
        )
        return lowrank.expand_add_(ffn.down(inner), [(z * self.scale, p["down_B"])])
