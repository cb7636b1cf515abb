"""The network that MoA's gates are read from: linear or SwiGLU (arXiv 2506.05928)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .lazy import Lazy
from .params import Param, bias_default, linear_default
from .router import Router
from .spec import Count

F = Lazy("torch.nn.functional")


@dataclass(frozen=True)
class GateNetwork(Router):
    """Base of MoA's routers: E independent scores R(u).

    net=linear: `R(u) = W u + b`. net=swiglu: `R(u) = W2 (silu(W1 u + b1) * (W3 u + b3)) + b2` with hidden
    width `width * E`, biases starting at 0.
    """

    net: Literal["linear", "swiglu"] = "linear"
    width: Count = 4

    def params(self, d, experts):
        if self.net == "linear":
            return {"weight": linear_default(experts, d), "bias": bias_default(experts, d)}
        m = self.width * experts
        return {
            "w1": linear_default(m, d),
            "b1": Param((m,)),
            "w3": linear_default(m, d),
            "b3": Param((m,)),
            "w2": linear_default(experts, m),
            "b2": Param((experts,)),
        }

    def scores(self, p, x):
        if self.net == "linear":
            return F.linear(x, p["weight"], p["bias"])
        hidden = F.silu(F.linear(x, p["w1"], p["b1"])) * F.linear(x, p["w3"], p["b3"])
        return F.linear(hidden, p["w2"], p["b2"])
