"""Size of the router's outputs (ST-MoE)."""

from __future__ import annotations

from dataclasses import dataclass

from ..lazy import Lazy
from ..loss import Loss, token_count, token_mean, token_sum

torch = Lazy("torch")


@dataclass(frozen=True)
class ZLoss(Loss):
    """`L = mean_t logsumexp(z_t)^2` (ST-MoE, arXiv 2202.08906, eq. 5). batch=global: over all tokens of the
    step; micro: the mean over passes of their means, in which a token of a short pass counts for more."""

    kind = "z_loss"

    @property
    def reads(self):
        return "logits"

    def sums(self, routing):
        return token_count(routing)

    def per_site(self, routings, whole=None):
        squares = [r.logits.logsumexp(-1, keepdim=True).square() for r in routings]
        if whole is None:
            found = [token_mean(s, r.mask)[:, 0] for s, r in zip(squares, routings, strict=True)]
        else:
            found = [
                (token_sum(s, r.mask) / tokens)[:, 0]
                for s, r, tokens in zip(squares, routings, whole, strict=True)
            ]
        values = torch.cat(found)
        return values.mean(0, keepdim=True) if self.scope == "model" else values
