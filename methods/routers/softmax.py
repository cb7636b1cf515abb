"""Dense softmax router: every expert acts on every token."""

from __future__ import annotations

from dataclasses import dataclass

from ..router import LinearRouter
from ..routing import Routing


@dataclass(frozen=True)
class Softmax(LinearRouter):
    """`w = softmax(W x)`, dense and in fp32 (MoLoRA, arXiv 2309.05444; HydraLoRA, arXiv 2404.19245)."""

    kind = "softmax"

    def route(self, scores, training):
        p = scores.softmax(-1)  # [..., E]
        return Routing(weights=p, probs=p, logits=scores)
