"""Routers as loops over experts for one token in fp64, written from the method cards' equations. The oracle
of the tests.

Each takes the router's options, its tensors (fp64) and an input u [d], and returns a `Choice`: weight,
probability and selection of every expert as Python lists of scalars, so that autograd gives the reference
gradients.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Choice:
    """What one token gets: weight w_i, probability or gate p_i, selection m_i, logits z_i; `tau` where there
    is a threshold."""

    w: list
    p: list
    chosen: list[bool]
    z: list
    tau: Tensor | None = None
    shifted: list = field(default_factory=list)


def _dots(weight, bias, u) -> list[Tensor]:
    return [row @ u + (0 if bias is None else bias[i]) for i, row in enumerate(weight)]


def _softmax(z: list[Tensor]) -> list[Tensor]:
    top = max(float(v.detach()) for v in z)
    powers = [torch.exp(v - top) for v in z]
    return [v / sum(powers) for v in powers]


def softmax(options, t, u) -> Choice:
    """p = softmax(W u), every expert (MoLoRA, HydraLoRA)."""
    z = _dots(t["weight"], t.get("bias"), u)
    p = _softmax(z)
    return Choice(p, p, [True] * len(p), z)


def topk(options, t, u) -> Choice:
    """S = the k largest of p; w_i = p_i / sum_{j in S} p_j, or p_i without renormalisation."""
    z = _dots(t["weight"], t.get("bias"), u)
    p = _softmax(z)
    best = sorted(range(len(p)), key=lambda i: -float(p[i].detach()))[: options.k]
    total = sum(p[i] for i in best) if options.renormalize else 1
    return Choice(
        [p[i] / total if i in best else 0 * p[i] for i in range(len(p))],
        p,
        [i in best for i in range(len(p))],
        z,
    )


def top_p(options, t, u) -> Choice:
    """Sort p, keep experts until the cumulative sum reaches P, that one included."""
    z = _dots(t["weight"], t.get("bias"), u)
    p = _softmax(z)
    kept, mass = [], 0.0
    for i in sorted(range(len(p)), key=lambda i: -float(p[i].detach())):
        kept.append(i)
        mass += float(p[i].detach())
        if mass >= options.p:
            break
    total = sum(p[i] for i in kept) if options.renormalize else 1
    return Choice(
        [p[i] / total if i in kept else 0 * p[i] for i in range(len(p))],
        p,
        [i in kept for i in range(len(p))],
        z,
    )


def adaptive_threshold(options, t, u) -> Choice:
    """tau = tau_max sigmoid(w_t u + b_t); g_i = p_i - tau where p_i >= tau; w_i = g_i / sum g (AdaMoLE).

    The threshold's row is the last of the linear map; a bias of one entry is the threshold's own.
    """
    weight, bias = t["weight"], t.get("bias")
    adaptive = options.threshold == "adaptive"
    experts = weight.shape[0] - adaptive
    z = _dots(weight[:experts], bias if bias is not None and len(bias) > 1 else None, u)
    p = _softmax(z)
    tau = torch.tensor(1 / experts if options.tau_max is None else options.tau_max, dtype=u.dtype)
    if adaptive:
        tau = tau / (1 + torch.exp(-(weight[-1] @ u + bias[-1])))
    chosen = [bool(v >= tau) for v in p]
    gate = [
        ((v - tau) if options.weights == "shifted" else v) if m else 0 * v
        for v, m in zip(p, chosen, strict=True)
    ]
    total = sum(gate)
    return Choice(
        [g / total if total.detach() > 0 else g for g in gate], p, chosen, z, tau, [v - tau for v in p]
    )


def _gate_scores(options, t, u) -> list[Tensor]:
    """R(u): linear, or W2 (silu(W1 u + b1) * (W3 u + b3)) + b2 (MoA)."""
    if options.net == "linear":
        return _dots(t["weight"], t["bias"], u)
    a, b = _dots(t["w1"], t["b1"], u), _dots(t["w3"], t["b3"], u)
    hidden = torch.stack([x / (1 + torch.exp(-x)) * y for x, y in zip(a, b, strict=True)])
    return _dots(t["w2"], t["b2"], hidden)


def sigmoid(options, t, u) -> Choice:
    """g_i = sigmoid(R(u)_i), independent of each other (soft MoA)."""
    z = _gate_scores(options, t, u)
    g = [1 / (1 + torch.exp(-v)) for v in z]
    return Choice(g, g, [True] * len(g), z)


def threshold(options, t, u) -> Choice:
    """m_i = [g_i >= tau], tau = Gamma_max sigmoid(v u + c) or Gamma_max; the weight by the way its gradient
    goes (sparse MoA)."""
    z = _gate_scores(options, t, u)
    g = [1 / (1 + torch.exp(-v)) for v in z]
    tau = torch.tensor(options.gamma_max, dtype=u.dtype)
    if options.dynamic:
        tau = tau / (1 + torch.exp(-(t["threshold_weight"][0] @ u + t["threshold_bias"][0])))
    chosen = [bool(v >= tau) for v in g]
    w = []
    for v, m in zip(g, chosen, strict=True):
        if options.grad == "none":
            w.append(v * float(m))
        elif options.grad == "subtract":
            w.append((v - tau) * float(m))
        else:  # forward value v m; backward as if the mask were sigmoid((g - tau) / T)
            soft = 1 / (1 + torch.exp(-(v - tau) / options.temperature))
            w.append(v * (float(m) + soft - soft.detach()))
    return Choice(w, g, chosen, z, tau)


LOOPS = {f.__name__: f for f in (softmax, topk, top_p, adaptive_threshold, sigmoid, threshold)}
