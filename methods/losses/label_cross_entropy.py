"""Labels named by the router (Mixture-of-LoRAs)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..lazy import Lazy
from ..loss import Loss

torch = Lazy("torch")


@dataclass(frozen=True)
class LabelCrossEntropy(Loss):
    """`L = mean_b -log softmax(z_b)[label_b]` over sequences b (arXiv 2403.03432 teaches its routers by
    domain labels; coefficient and mean are ours). There is none where the router was given no labels, as in
    evaluation.

    batch=micro alone: a mean over sequences, of which every pass of a step has as many, is the mean over
    passes.
    """

    kind = "label_cross_entropy"
    reduce: Literal["sum", "mean"] = "mean"
    batch: Literal["micro"] = "micro"

    @property
    def reads(self):
        return "labels"

    def given(self, routing):
        return "labels" in routing.extras

    def per_site(self, routings, whole=None):
        values = []
        for routing in routings:
            every = slice(None, None, routing.length)  # a decision a sequence
            logp = routing.logits[every].log_softmax(-1)  # [B, G, E]
            values.append(-logp.gather(-1, routing.extras["labels"][every])[..., 0].mean(0))
        values = torch.cat(values)
        return values.mean(0, keepdim=True) if self.scope == "model" else values
