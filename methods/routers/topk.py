"""Top-k softmax router."""

from __future__ import annotations

from dataclasses import dataclass

from ..lazy import Lazy
from ..router import LinearRouter
from ..routing import Routing
from ..spec import ConfigError, Count

torch = Lazy("torch")
route = Lazy("moabench.kernels.route")


@dataclass(frozen=True)
class TopK(LinearRouter):
    """`p = softmax(W x)`, `S = top-k(p)`, `w_i = p_i / sum_S p` on S, else 0 (AdaMoLE's and MoA's top-k
    baseline, MixLoRA).

    renormalize=false keeps `w_i = p_i` (Switch, arXiv 2101.03961). With k = 1 and renormalize=true the weight
    is exactly 1 and the task loss gives the router no gradient.
    """

    kind = "topk"
    k: Count = 2
    renormalize: bool = True

    def check(self, experts):
        if self.k > experts:
            raise ConfigError(f"k={self.k}: expected at most the number of experts, {experts}.")

    @property
    def rule(self):
        return route.Rule(select="top_k", k=self.k, renormalize=self.renormalize)

    def route(self, scores, training):
        probs = route.softmax(scores)
        # stable: of equal scores the lower index goes first, as in the kernel; topk promises no order
        ids = scores.detach().sort(dim=-1, descending=True, stable=True).indices[..., : self.k]
        chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, ids, True)
        if self.renormalize:  # softmax over the selected logits is p_i / sum_S p
            weights = route.softmax(scores.masked_fill(~chosen, float("-inf")))
        else:
            weights = probs * chosen
        return Routing(weights=weights, chosen=chosen, probs=probs, logits=scores, ids=ids)
