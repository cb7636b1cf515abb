"""Dense softmax router: every expert acts on every token."""

from __future__ import annotations

from dataclasses import dataclass

from ..lazy import Lazy
from ..router import LinearRouter
from ..routing import Routing

route = Lazy("moabench.kernels.route")


@dataclass(frozen=True)
class Softmax(LinearRouter):
    """`w = softmax(W x)`, dense and in fp32 (MoLoRA, arXiv 2309.05444; HydraLoRA, arXiv 2404.19245)."""

    kind = "softmax"

    @property
    def rule(self):
        return route.Rule()

    def route(self, scores, training):
        p = route.softmax(scores)  # [..., E]
        return Routing(weights=p, probs=p, logits=scores)
