"""Routing decisions: router scores [..., H] to expert weights [..., E], where E is small and the rows are
many.

A router's equation is its own `route()`, in plain torch. Those that fit

    p = softmax(z) or sigmoid(z);   S: all, the k largest, the prefix of a given mass, or p >= tau
    u = p or p - tau on S;   w = u or u / sum u

say so as a `Rule`, and `decide` runs any Rule as one Triton kernel forward and one backward.

Shapes: T tokens, G sites that share one input, E experts, H = E, or E + 1 where the last score is the
threshold's, K selected.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


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


@dataclass(frozen=True)
class Decision:
    """weights, probs [..., E] fp32; chosen [..., E] bool, None for select=all; ids [..., K] int64 by falling
    score for top_k, else None; tau [..., 1] for a threshold, else None."""

    weights: Tensor
    probs: Tensor
    chosen: Tensor | None = None
    ids: Tensor | None = None
    tau: Tensor | None = None


def decide(scores: Tensor, rule: Rule) -> Decision:
    """The decision for scores [T, H], [T, G, H] or with more leading dimensions, any strides, where Triton
    runs. Differentiable: weights, probs and tau, of scores."""
    options = (rule.activation, rule.select, rule.k, rule.mass, _tau(rule, scores), rule.adaptive)
    found = _Route.apply(
        _by_site(scores).float(), *options, rule.shifted, rule.renormalize, rule.detach, rule.ste
    )
    weights, probs, tau, chosen, ids = (t.view(*scores.shape[:-1], t.shape[-1]) for t in found)
    soft = rule.select == "all"
    return Decision(
        weights=weights,
        probs=weights if soft else probs,
        chosen=None if soft else chosen,
        ids=ids if rule.select == "top_k" else None,
        tau=tau if rule.select == "threshold" else None,
    )


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
    def forward(ctx, scores, activation, select, k, mass, tau, adaptive, shifted, renormalize, detach, ste):
        weights, probs, taus, chosen, ids = _triton().route(
            scores, activation, select, k, mass, tau, adaptive, shifted, renormalize
        )
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(chosen, ids)
        ctx.options = (activation, select, tau, adaptive, shifted, renormalize, detach, ste)
        ctx.save_for_backward(weights if select == "all" else probs, chosen, taus)
        return weights, probs, taus, chosen, ids

    @staticmethod
    @once_differentiable
    def backward(ctx, dweights, dprobs, dtau, *_):
        probs, chosen, taus = ctx.saved_tensors
        given, none = (dweights, dprobs, dtau), (None,) * 10
        if all(d is None for d in given):
            return None, *none
        return _triton().route_backward(*given, probs, chosen, taus, *ctx.options), *none


def _by_site(t: Tensor) -> Tensor:
    """[T, E] or [..., G, E] as [T, G, E], without a copy where strides allow."""
    return t.unsqueeze(-2).flatten(0, -3) if t.dim() == 2 else t.flatten(0, -3)


def _tau(rule: Rule, scores: Tensor) -> float:
    if rule.select != "threshold":
        return 0.0
    return 1 / (scores.shape[-1] - rule.adaptive) if rule.tau is None else rule.tau


def _triton():
    from .triton import route

    return route
