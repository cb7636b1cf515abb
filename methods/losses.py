"""Auxiliary losses: pure functions of the routings that one forward pass recorded.

An optimiser step may see its batch in several forward passes (accumulation, processes). A loss with
batch=global is that of the whole batch all the same: what it must know of the other passes are sums over
their tokens that carry no gradient (`Loss.sums`), and given these (`whole`) the mean over the passes of its
values is the loss of all tokens, gradient included.

Shapes: S sites of one method, G of them read one input, T tokens, E experts. Padding is excluded from every
mean.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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
    so both belong to a method. batch: `global` is the loss of all tokens of an optimiser step, however they
    are cut into forward passes and processes; `micro` that of each forward pass, averaged, as published code
    computes it. A loss of another form can be `micro` alone: its class says so by the type of this field, and
    why in its docstring.
    """

    coef: NonNegative = 0.0
    scope: Literal["site", "model"] = "site"
    reduce: Literal["sum", "mean"] = "sum"
    batch: Literal["global", "micro"] = "global"

    @property
    def reads(self) -> str:
        """What it must find in a Routing, one of what `Router.gives` names."""
        return "probs"

    def given(self, routing: Routing) -> bool:
        """Whether a pass's routing has what the loss reads; where it has not, the pass has no such loss."""
        return True

    def sums(self, routing: Routing) -> Tensor:
        """What the passes over a batch must know of each other: sums over real tokens, [G, ...], without
        gradient. batch=global only."""
        raise NotImplementedError

    def per_site(self, routings: Sequence[Routing], whole: Sequence[Tensor] | None = None) -> Tensor:
        """Unreduced values [S] (or [1] for scope=model). whole: for each of the routings the mean of `sums`
        over the passes that make up the batch; None where this pass is all of it."""
        raise NotImplementedError

    def __call__(self, routings: Sequence[Routing], whole: Sequence[Tensor] | None = None) -> Tensor:
        values = self.per_site(routings, whole)
        return self.coef * (values.sum() if self.reduce == "sum" else values.mean())


Entry = tuple[tuple[str, ...], Routing, dict[str, Loss]]
"""What a recorder holds of one router's pass: its sites, their routing [T, G, E], its losses by kind."""
Sums = dict[tuple[str, Loss], list["Tensor"]]
"""By kind and loss, `Loss.sums` of each routing that it reads."""


def read_by(entries: Iterable[Entry]) -> dict[tuple[str, Loss], list[Routing]]:
    """The routings that each loss reads; losses whose coefficient is 0, or that a pass gives nothing to read,
    are left out."""
    found: dict[tuple[str, Loss], list[Routing]] = {}
    for _, routing, losses in entries:
        for kind, loss in losses.items():
            if loss.coef > 0 and loss.given(routing):
                found.setdefault((kind, loss), []).append(routing)
    return found


def global_sums(entries: Iterable[Entry]) -> Sums:
    """What the losses with batch=global need of one forward pass; empty where there is none."""
    return {
        key: [key[1].sums(routing) for routing in routings]
        for key, routings in read_by(entries).items()
        if key[1].batch == "global"
    }


def auxiliary(entries: Iterable[Entry], whole: Sums | None = None) -> dict[str, Tensor]:
    """Auxiliary losses of one forward pass by kind, each already multiplied by its coefficient. whole: the
    mean of `global_sums` over the passes of which this is one."""
    total: dict[str, Tensor] = {}
    for (kind, loss), routings in read_by(entries).items():
        value = loss(routings, None if whole is None else whole.get((kind, loss)))
        total[kind] = total[kind] + value if kind in total else value
    return total


def token_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over the tokens of values [T, G, E] that the mask [T] calls real: [G, E]."""
    if mask is None:
        return values.mean(0)
    share = mask.to(values.dtype) / mask.sum().clamp(min=1)
    return torch.einsum("t,tge->ge", share, values)


def token_sum(values: Tensor, mask: Tensor | None) -> Tensor:
    """Sum over the same tokens: [G, E]."""
    return values.sum(0) if mask is None else torch.einsum("t,tge->ge", mask.to(values.dtype), values)


def token_count(routing: Routing) -> Tensor:
    """Number of real tokens, [G, 1], as often as sites read this input."""
    weights = routing.weights
    real = (
        weights.new_tensor(float(len(weights)))
        if routing.mask is None
        else routing.mask.sum().to(weights.dtype)
    )
    return real.expand(weights.shape[1], 1)


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
