"""AdaMoLE's router: softmax probabilities against a learned, token-dependent threshold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..lazy import Lazy
from ..params import bias_default, linear_default
from ..router import LinearRouter
from ..routing import Routing
from ..spec import Positive

torch = Lazy("torch")
route = Lazy("moabench.kernels.route")


@dataclass(frozen=True)
class AdaptiveThreshold(LinearRouter):
    """`p = softmax(W x)`, `tau = tau_max sigmoid(w_t x + b_t)`, `g_i = (p_i - tau) [p_i >= tau]`, `w = g /
    sum g` (arXiv 2405.00361).

    A token without a selected expert gets weight 0 everywhere. tau_max: null means 1/E, at which one expert
    is always selected. threshold=constant sets tau = tau_max. weights=plain uses g_i = p_i (the paper's
    fixed-threshold baseline with threshold=constant). One selected expert has weight 1, and then neither gate
    nor threshold receives a task gradient. The last row of the linear map is the threshold's.
    """

    kind = "adaptive_threshold"
    gives = ("probs", "logits", "tau")
    tau_max: Positive | None = None
    threshold: Literal["adaptive", "constant"] = "adaptive"
    weights: Literal["shifted", "plain"] = "shifted"

    def params(self, d, experts):
        rows = experts + (self.threshold == "adaptive")
        biases = (experts if self.bias else 0) + (self.threshold == "adaptive")
        return {"weight": linear_default(rows, d)} | ({"bias": bias_default(biases, d)} if biases else {})

    def heads(self, p):
        weight, bias = p["weight"], p.get("bias")
        if bias is not None and bias.numel() < weight.shape[0]:  # the threshold's bias alone
            bias = torch.nn.functional.pad(bias, (weight.shape[0] - 1, 0))
        return weight, bias

    @property
    def rule(self):
        return route.Rule(
            select="threshold",
            tau=self.tau_max,
            adaptive=self.threshold == "adaptive",
            shifted=self.weights == "shifted",
            renormalize=True,
        )

    def route(self, scores, training):
        adaptive = self.threshold == "adaptive"
        logits = scores[..., :-1] if adaptive else scores
        probs = route.softmax(logits)
        tau_max = 1 / logits.shape[-1] if self.tau_max is None else self.tau_max
        tau = tau_max * scores[..., -1:].sigmoid() if adaptive else torch.full_like(logits[..., :1], tau_max)
        shifted = probs - tau
        chosen = shifted >= 0
        gate = shifted.clamp(min=0) if self.weights == "shifted" else probs * chosen
        weights = gate / gate.sum(-1, keepdim=True).clamp(min=1e-20)  # all 0 where none is selected
        return Routing(weights=weights, chosen=chosen, probs=probs, logits=logits, extras={"tau": tau})
