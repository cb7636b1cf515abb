"""Auxiliary losses: pure functions of the routings that one forward pass recorded.

Shapes: S sites of one method, T tokens, E experts. Padding is excluded from every mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from .lazy import Lazy
from .routing import Routing
from .spec import NonNegative, Part

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = Lazy("torch")


@dataclass(frozen=True)
class Loss(Part):
    """Base of the auxiliary losses. coef multiplies the value before it is added to the task loss.

    scope: `site` computes the loss for each router, then `reduce`s over routers by sum or mean; `model`
    computes one loss from the tokens of all routers together. Published coefficients mean different things,
    so both belong to a method.
    """

    coef: NonNegative = 0.0
    scope: Literal["site", "model"] = "site"
    reduce: Literal["sum", "mean"] = "sum"

    @property
    def reads(self) -> str:
        """What it must find in a Routing, one of what `Router.gives` names."""
        return "probs"

    def per_site(self, routings: Sequence[Routing]) -> Tensor:
        """Unreduced values [S] (or [1] for scope=model)."""
        raise NotImplementedError

    def __call__(self, routings: Sequence[Routing]) -> Tensor:
        values = self.per_site(routings)
        return self.coef * (values.sum() if self.reduce == "sum" else values.mean())


def token_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over the tokens of values [T, G, E] that the mask [T] calls real: [G, E]."""
    if mask is None:
        return values.mean(0)
    share = mask.to(values.dtype) / mask.sum().clamp(min=1)
    return torch.einsum("t,tge->ge", share, values)


@dataclass(frozen=True)
class SwitchBalance(Loss):
    """`L = E sum_i f_i P_i`, f_i = assignments to i a token, P_i = mean p_i (arXiv 2101.03961, eq. 4-6).

    With k experts a token, uniform routing gives L = k. values=shifted puts AdaMoLE's `p - tau` in place of
    p, as its code does. Gradient flows through P alone.
    """

    kind = "switch_balance"
    values: Literal["probs", "shifted"] = "probs"

    @property
    def reads(self):
        return "probs" if self.values == "probs" else "tau"

    def per_site(self, routings):
        shares, means = [], []
        for routing in routings:
            scores = routing.probs if self.values == "probs" else routing.probs - routing.extras["tau"]
            shares.append(token_mean(routing.selected.to(scores.dtype), routing.mask))
            means.append(token_mean(scores, routing.mask))
        if len({share.shape[-1] for share in shares}) == 1:  # layers may differ in E
            shares, means = [torch.cat(shares)], [torch.cat(means)]  # [S, E]
        if self.scope == "model":
            shares, means = [shares[0].mean(0, keepdim=True)], [means[0].mean(0, keepdim=True)]
        return torch.cat([f.shape[-1] * (f * p).sum(-1) for f, p in zip(shares, means, strict=True)])


@dataclass(frozen=True)
class ZLoss(Loss):
    """`L = mean_t logsumexp(z_t)^2` (ST-MoE, arXiv 2202.08906, eq. 5)."""

    kind = "z_loss"

    @property
    def reads(self):
        return "logits"

    def per_site(self, routings):
        values = torch.cat(
            [token_mean(r.logits.logsumexp(-1, keepdim=True).square(), r.mask)[:, 0] for r in routings]
        )
        return values.mean(0, keepdim=True) if self.scope == "model" else values


@dataclass(frozen=True)
class LabelCrossEntropy(Loss):
    """`L = mean_b -log softmax(z_b)[label_b]` over sequences b (arXiv 2403.03432 teaches its routers by
    domain labels; coefficient and mean are ours). Read where the router was given labels, in training."""

    kind = "label_cross_entropy"
    reduce: Literal["sum", "mean"] = "mean"

    @property
    def reads(self):
        return "labels"

    def per_site(self, routings):
        values = []
        for routing in routings:
            every = slice(None, None, routing.length)  # a decision a sequence
            logp = routing.logits[every].log_softmax(-1)  # [B, G, E]
            values.append(-logp.gather(-1, routing.extras["labels"][every])[..., 0].mean(0))
        values = torch.cat(values)
        return values.mean(0, keepdim=True) if self.scope == "model" else values
