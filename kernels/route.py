"""Routing decisions: router scores [..., H] to expert weights [..., E], where E is small and the rows are
many.

A router's equation is its own `route()`, in plain torch. Those that fit

    p = softmax(z) or sigmoid(z);   S: all, the k largest, the prefix of a given mass, or p >= tau
    u = p or p - tau on S;   w = u or u / sum u

say so as a `Rule`, and `decide` runs any Rule: on Triton as one kernel forward and one backward, which also
sums the expert load over real tokens; else as plain torch ops.

Shapes: T tokens, G sites that share one input, E experts, H = E, or E + 1 where the last score is the
threshold's, K selected.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import backend

SUMS = ("assignments", "weights", "members", "probs", "shares")
"""Sums over tokens of each expert, [G, E]: selections, w, w / sum w, p, p / sum p. A row without weight has
no members."""
TOTALS = ("tokens", "idle", "entropy", "squared_lse")
"""Sums over tokens, [G]: 1, tokens without an expert, entropy of p / sum p (nats), logsumexp(z)^2."""
SMALLEST = 1e-20
"""Least sum that weights are divided by: rows whose selected weights sum to less get no gradient through
them."""


@dataclass(frozen=True)
class Rule:
    """How scores become weights.

    select: `all`; `top_k`, the k largest scores; `top_p`, the experts before which, in order of p, less than
    `mass` has been reached; `threshold`, p >= tau. Of equal scores the one of lower index counts as larger.
    tau: the threshold, 1/E if None; with adaptive tau * sigmoid(t), t the last score. shifted: the weight is
    p - tau. renormalize: weights are divided by their sum over S. detach: tau gets no gradient. ste: the mask
    passes the gradient of sigmoid((p - tau) / ste), straight through; 0: it passes none.
    """

    activation: Literal["softmax", "sigmoid"] = "softmax"
    select: Literal["all", "top_k", "top_p", "threshold"] = "all"
    k: int = 0
    mass: float = 0.0
    tau: float | None = None
    adaptive: bool = False
    shifted: bool = False
    renormalize: bool = False
    detach: bool = False
    ste: float = 0.0


@dataclass
class Decision:
    """weights, probs [..., E] fp32; chosen [..., E] bool, None for select=all; ids [..., K] int64 by falling
    score for top_k, else None; tau [..., 1] for a threshold, else None; stats: `SUMS` [G, E] and `TOTALS` [G]
    over real tokens, None unless asked for."""

    weights: Tensor
    probs: Tensor
    chosen: Tensor | None = None
    ids: Tensor | None = None
    tau: Tensor | None = None
    stats: dict[str, Tensor] | None = None


def decide(scores: Tensor, rule: Rule, mask: Tensor | None = None, stats: bool = False) -> Decision:
    """The decision for scores [T, H], [T, G, H] or with more leading dimensions, any strides; mask [T] bool,
    True for real tokens, concerns the stats alone. Differentiable: weights, probs and tau, of scores."""
    if not backend.triton_for(scores):
        made = plain(scores, rule)
        if stats:
            made.stats = statistics(made.weights, made.chosen, made.probs, experts_only(scores, rule), mask)
        return made
    sites = _by_site(scores).float()
    weights, probs, tau, chosen, ids, sums = _Route.apply(
        sites, mask, stats, rule.activation, rule.select, rule.k, rule.mass, _tau(rule, scores),
        rule.adaptive, rule.shifted,
        rule.renormalize, rule.detach, rule.ste,
    )  # fmt: skip
    weights, probs, tau, chosen, ids = (
        t.view(*scores.shape[:-1], t.shape[-1]) for t in (weights, probs, tau, chosen, ids)
    )
    soft = rule.select == "all"
    return Decision(
        weights=weights,
        probs=weights if soft else probs,
        chosen=None if soft else chosen,
        ids=ids if rule.select == "top_k" else None,
        tau=tau if rule.select == "threshold" else None,
        stats=_named(sums.sum(0)) if stats else None,
    )


def plain(scores: Tensor, rule: Rule) -> Decision:
    """`decide` in plain torch ops, without stats."""
    logits = experts_only(scores, rule)
    p = softmax(logits) if rule.activation == "softmax" else logits.sigmoid()
    ids, tau = None, None
    if rule.select == "all":
        return Decision(p, p)
    if rule.select == "top_k":
        ids = logits.detach().sort(dim=-1, descending=True, stable=True).indices[..., : rule.k]
        chosen = torch.zeros_like(p, dtype=torch.bool).scatter_(-1, ids, True)
    elif rule.select == "top_p":
        order = p.detach().sort(dim=-1, descending=True, stable=True)
        before = order.values.cumsum(-1) - order.values
        chosen = (before < rule.mass).scatter(-1, order.indices, before < rule.mass)
    else:
        bound = _tau(rule, scores)
        tau = bound * scores[..., -1:].sigmoid() if rule.adaptive else torch.full_like(p[..., :1], bound)
        tau = tau.detach() if rule.detach else tau
        chosen = p >= tau
    u = (p - tau if rule.shifted else p) * chosen
    if rule.ste:
        soft = torch.sigmoid((p - tau) / rule.ste)
        u = u + p * (soft - soft.detach())
    if rule.renormalize:
        total = u.sum(-1, keepdim=True)
        u = torch.where(total <= SMALLEST, u.detach(), u) / total.clamp(min=SMALLEST)
    return Decision(u, p, chosen, ids, tau)


def statistics(
    weights: Tensor, chosen: Tensor | None, probs: Tensor | None, logits: Tensor | None, mask: Tensor | None
) -> dict[str, Tensor]:
    """`SUMS` and `TOTALS` of any decision, tensors [T, E] or [T, G, E], over the tokens that mask [T] calls
    real; on the device, detached. Without probs or logits what is made of them is left out."""
    weights = _by_site(weights.detach().float())
    real = weights.new_ones(weights.shape[0]) if mask is None else mask.reshape(-1).to(weights.dtype)
    chosen = torch.ones_like(weights) if chosen is None else _by_site(chosen).to(weights.dtype)
    values = {"assignments": chosen, "weights": weights, "members": _share(weights)}
    rows = {"tokens": torch.ones_like(weights[..., 0]), "idle": (chosen.amax(-1) == 0).to(weights.dtype)}
    if probs is not None:
        p = _by_site(probs.detach().float())
        values |= {"probs": p, "shares": _share(p)}
        rows["entropy"] = torch.special.entr(_share(p)).sum(-1)
    if logits is not None:
        rows["squared_lse"] = _by_site(logits.detach().float()).logsumexp(-1).square()
    real = real.bool()
    found = {name: torch.where(real[:, None, None], v, 0.0).sum(0) for name, v in values.items()}
    return found | {name: torch.where(real[:, None], v, 0.0).sum(0) for name, v in rows.items()}


def experts_only(scores: Tensor, rule: Rule) -> Tensor:
    """The experts' scores [..., E] of scores [..., H]."""
    return scores[..., :-1] if rule.adaptive else scores


def softmax(scores: Tensor) -> Tensor:
    """`softmax(scores, -1)`. On a CPU many rows are laid out expert by expert first: vectorised over tokens,
    3-4x faster for E = 8."""
    if scores.device.type != "cpu" or scores.dim() < 2 or scores.numel() < 256 * scores.shape[-1]:
        return scores.softmax(-1)
    return scores.movedim(-1, 0).contiguous().softmax(0).movedim(0, -1)


class _Route(torch.autograd.Function):
    """The Triton kernels; the backward needs p, S and tau, and recomputes the rest."""

    @staticmethod
    def forward(
        ctx,
        scores,
        mask,
        stats,
        activation,
        select,
        k,
        mass,
        tau,
        adaptive,
        shifted,
        renormalize,
        detach,
        ste,
    ):
        kernels = _triton()
        weights, probs, taus, chosen, ids, sums = kernels.route(
            scores, mask, stats, activation, select, k, mass, tau, adaptive, shifted, renormalize
        )
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(chosen, ids, sums)
        ctx.options = (activation, select, tau, adaptive, shifted, renormalize, detach, ste)
        ctx.save_for_backward(weights if select == "all" else probs, chosen, taus)
        return weights, probs, taus, chosen, ids, sums

    @staticmethod
    @once_differentiable
    def backward(ctx, dweights, dprobs, dtau, *_):
        probs, chosen, taus = ctx.saved_tensors
        if dweights is None and dprobs is None and dtau is None:
            return (None,) * 13
        return _triton().route_backward(dweights, dprobs, dtau, probs, chosen, taus, *ctx.options), *(
            None,
        ) * 12


def _by_site(t: Tensor) -> Tensor:
    """[T, E] or [..., G, E] as [T, G, E], without a copy where strides allow."""
    return t.unsqueeze(-2).flatten(0, -3) if t.dim() == 2 else t.flatten(0, -3)


def _tau(rule: Rule, scores: Tensor) -> float:
    if rule.select != "threshold":
        return 0.0
    return 1 / (scores.shape[-1] - rule.adaptive) if rule.tau is None else rule.tau


def _share(x: Tensor) -> Tensor:
    return x / x.sum(-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)


def _named(sums: Tensor) -> dict[str, Tensor]:
    """Sums [G, 5 E + 4] by name."""
    per_expert = sums[:, : -len(TOTALS)].unflatten(-1, (len(SUMS), -1))
    totals = sums[:, -len(TOTALS) :]
    return dict(zip(SUMS, per_expert.unbind(1), strict=True)) | dict(
        zip(TOTALS, totals.unbind(1), strict=True)
    )


def _triton():
    from .triton import route

    return route
