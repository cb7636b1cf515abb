"""Dynamic top-p router: as many experts as it takes to reach a given probability mass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from ..lazy import Lazy
from ..router import LinearRouter
from ..routing import Routing
from ..spec import Bound

route = Lazy("moabench.kernels.route")
BelowOne = Annotated[float, Bound(ge=1e-6, lt=1)]
"""Below 1 / E it selects one expert anyway; in single precision a far smaller one is 0, which none has to
reach."""


@dataclass(frozen=True)
class TopP(LinearRouter):
    """Smallest prefix of the sorted `p = softmax(W x)` whose mass reaches `p` (arXiv 2403.07652; MixLoRA's
    `dynamic` routing).

    renormalize=false keeps the raw probabilities as weights, as MixLoRA's code does: they sum to a value in
    [p, 1], so a site whose experts contain the frozen FFN shrinks it and the model does not start at its
    base.
    """

    kind = "top_p"
    p: BelowOne = 0.8
    renormalize: bool = True

    @property
    def rule(self):
        return route.Rule(select="top_p", mass=self.p, renormalize=self.renormalize)

    def route(self, scores, training):
        probs = route.softmax(scores)
        order = probs.detach().sort(dim=-1, descending=True, stable=True)
        before = order.values.cumsum(-1) - order.values  # mass ahead of each expert in the order
        chosen = (before < self.p).scatter(-1, order.indices, before < self.p)
        weights = probs * chosen
        if self.renormalize:
            weights = weights / weights.sum(-1, keepdim=True)
        return Routing(weights=weights, chosen=chosen, probs=probs, logits=scores)
