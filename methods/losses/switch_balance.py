"""Balance of loads (Switch Transformers)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..lazy import Lazy
from ..loss import Loss, token_count, token_mean, token_sum

torch = Lazy("torch")


@dataclass(frozen=True)
class SwitchBalance(Loss):
    """`L = E sum_i f_i P_i`, f_i = assignments to i a token, P_i = mean p_i (arXiv 2101.03961, eq. 4-6).

    With k experts a token, uniform routing gives L = k, which is not the least: with E = 2, k = 1 three
    tokens of four at p = (1/2, 1/2) that choose the first and one at (0, 1) give 0.875. scope=model takes f
    and P as means over the sites: layers that have each collapsed onto another expert give k too. So a low
    value says nothing of collapse; load measures by site do. values=shifted puts AdaMoLE's `p - tau` in place
    of p, as its code does. Gradient flows through P alone.

    batch=global: f and P from counts and sums over all tokens of the step. A pass with the sums s of p, of a
    batch of M passes, gives `E sum_i (C_i / N) (s_i M / N)`, whose mean over passes is L.
    """

    kind = "switch_balance"
    values: Literal["probs", "shifted"] = "probs"

    @property
    def reads(self):
        return "probs" if self.values == "probs" else "tau"

    def sums(self, routing):
        counts = token_sum(routing.selected.to(routing.weights.dtype), routing.mask)
        return torch.cat([counts, token_count(routing)], -1)  # [G, E + 1]

    def per_site(self, routings, whole=None):
        shares, means = [], []
        for i, routing in enumerate(routings):
            scores = routing.probs if self.values == "probs" else routing.probs - routing.extras["tau"]
            if whole is None:
                shares.append(token_mean(routing.selected.to(scores.dtype), routing.mask))
                means.append(token_mean(scores, routing.mask))
            else:
                counts, tokens = whole[i][:, :-1], whole[i][:, -1:]
                shares.append(counts / tokens)
                means.append(token_sum(scores, routing.mask) / tokens)
        if len({share.shape[-1] for share in shares}) == 1:  # layers may differ in E
            shares, means = [torch.cat(shares)], [torch.cat(means)]  # [S, E]
        if self.scope == "model":
            shares, means = [shares[0].mean(0, keepdim=True)], [means[0].mean(0, keepdim=True)]
        return torch.cat([f.shape[-1] * (f * p).sum(-1) for f, p in zip(shares, means, strict=True)])
