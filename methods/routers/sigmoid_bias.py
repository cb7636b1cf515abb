"""Loss-free balancing: top-k of sigmoid gates under a bias that follows the loads (DeepSeek-V3)."""

from __future__ import annotations

from dataclasses import dataclass

from ..lazy import Lazy
from ..params import Param
from ..router import LinearRouter
from ..routing import Routing
from ..rule import Rule
from ..spec import ConfigError, Count, NonNegative, Positive

torch = Lazy("torch")
route = Lazy("moabench.kernels.route")


@dataclass(frozen=True)
class SigmoidBias(LinearRouter):
    """`s = sigmoid(W x)`, `S = top-k(s + b)`, `w_i = route_scale s_i / sum_S s` on S, else 0 (arXiv
    2408.15664; 2412.19437).

    b [E] only selects: it is a buffer, 0 at the start, which `BalanceLoads` moves by `speed` after each
    optimiser step. With k = 1 the normalised weight would be constant and the router without a gradient, so
    `w = route_scale s` there. Of equal scores the lower index goes first.
    """

    kind = "sigmoid_bias"
    k: Count = 2
    speed: NonNegative = 1e-3
    route_scale: Positive = 1.0

    def check(self, experts):
        if self.k > experts:
            raise ConfigError(f"k={self.k}: expected at most the number of experts, {experts}.")

    @property
    def rules(self):
        return (BalanceLoads(self.speed),)

    def params(self, d, experts):
        return super().params(d, experts) | {"load_bias": Param((experts,), trained=False)}

    def route(self, scores, training, load_bias):
        gates = scores.sigmoid()
        biased = gates.detach() + load_bias
        ids = biased.sort(dim=-1, descending=True, stable=True).indices[..., : self.k]
        chosen = torch.zeros_like(gates, dtype=torch.bool).scatter_(-1, ids, True)
        if self.k > 1:  # softmax of log s over the selected is s_i / sum_S s, where all s are 0 in fp32 too
            logs = torch.nn.functional.logsigmoid(scores)
            weights = route.softmax(logs.masked_fill(~chosen, float("-inf")))
        else:
            weights = gates * chosen
        return Routing(weights=self.route_scale * weights, chosen=chosen, probs=gates, logits=scores, ids=ids)


@dataclass(frozen=True)
class BalanceLoads(Rule):
    """After each optimiser step `b_i <- b_i + speed sign(mean load - load_i)`; load_i counts the tokens that
    chose expert i in the step, over all its passes and processes (arXiv 2408.15664, algorithm 1). Evaluation
    changes nothing."""

    kind = "balance_loads"
    speed: NonNegative = 1e-3

    def counts(self, routing):
        chosen = routing.chosen if routing.mask is None else routing.chosen & routing.mask[:, None]
        return chosen.sum(0)  # int64: exact, whatever the order of the passes

    def after_step(self, sites, counts):
        with torch.no_grad():
            for site, load in zip(sites, counts, strict=True):
                bias, load = site.tensors["load_bias"], load.to(torch.float64)
                bias += self.speed * torch.sign(load.mean() - load).to(bias.dtype)
