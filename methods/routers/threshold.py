"""Sparse MoA's router: sigmoid gates against a token-dependent threshold."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Literal

from ..gate_network import GateNetwork
from ..lazy import Lazy
from ..params import bias_default, linear_default
from ..routing import Routing
from ..spec import Bound, NonNegative

torch = Lazy("torch")
F = Lazy("torch.nn.functional")
route = Lazy("moabench.kernels.route")


@dataclass(frozen=True)
class Threshold(GateNetwork):
    """`g = sigmoid(R(u))`, `tau = gamma_max sigmoid(v u + c)`, `m_i = [g_i >= tau]`, `w_i = g_i m_i` (arXiv
    2506.05928, sparse MoA).

    dynamic=false sets tau = gamma_max. grad says how the threshold learns: `none`, as in the official code,
    where the comparison passes no gradient and v, c keep their initial values; `subtract`, `w_i = (g_i - tau)
    m_i`; `ste`, a straight-through mask whose backward is that of sigmoid((g_i - tau) / temperature).
    """

    kind = "threshold"
    gives = ("probs", "logits", "tau")
    gamma_max: NonNegative = 0.5
    dynamic: bool = True
    grad: Literal["none", "subtract", "ste"] = "none"
    temperature: Annotated[float, Bound(ge=1e-4, le=1e4)] = 0.1

    def params(self, d, experts):
        tensors = super().params(d, experts)
        if self.dynamic:
            # without a gradient it stays as drawn; one that learns is a matrix, decayed as the official code
            # would
            weight = replace(linear_default(1, d), decay=self.grad != "none")
            tensors |= {"threshold_weight": weight, "threshold_bias": bias_default(1, d)}
        return tensors

    def scores(self, p, x):
        gates = super().scores(p, x)
        if not self.dynamic:
            return gates
        head = (p["threshold_weight"], p["threshold_bias"])
        # no gradient at all, so that an optimiser leaves the head alone, weight decay included
        if self.grad == "none":
            x, head = x.detach(), tuple(t.detach() for t in head)
        return torch.cat([gates, F.linear(x, *head)], dim=-1)  # the last column is tau's

    @property
    def rule(self):
        return route.Rule(
            activation="sigmoid",
            select="threshold",
            tau=self.gamma_max,
            adaptive=self.dynamic,
            shifted=self.grad == "subtract",
            detach=self.grad == "none",
            ste=self.temperature if self.grad == "ste" else 0.0,
        )

    def route(self, scores, training):
        logits = scores[..., :-1] if self.dynamic else scores
        gates = logits.sigmoid()
        tau = (
            self.gamma_max * scores[..., -1:].sigmoid()
            if self.dynamic
            else torch.full_like(gates[..., :1], self.gamma_max)
        )
        if self.grad == "none":
            tau = tau.detach()
        chosen = gates >= tau
        if self.grad == "subtract":
            weights = (gates - tau) * chosen
        elif self.grad == "ste":
            soft = torch.sigmoid((gates - tau) / self.temperature)
            weights = gates * (chosen + soft - soft.detach())
        else:
            weights = gates * chosen
        return Routing(weights=weights, chosen=chosen, probs=gates, logits=logits, extras={"tau": tau})
