"""g_i = sigmoid(R(u)_i), independent of each other (soft MoA); R(u) is linear, or W2 (silu(W1 u + b1) * (W3 u
+ b3)) + b2."""

import torch

from references.loops import Choice, dots, silu
from references.loops import sigmoid as gate

SOFT = True
SUMS_TO_ONE = False
VARIANTS = [{}, {"net": "swiglu", "width": 3}]


def scores(options, tensors, u):
    """R(u), the scores of MoA's gate network."""
    if options.net == "linear":
        return dots(tensors["weight"], tensors["bias"], u)
    a, b = dots(tensors["w1"], tensors["b1"], u), dots(tensors["w3"], tensors["b3"], u)
    return dots(tensors["w2"], tensors["b2"], torch.stack([silu(x) * y for x, y in zip(a, b, strict=True)]))


def choose(options, tensors, u, **facts):
    z = scores(options, tensors, u)
    g = [gate(v) for v in z]
    return Choice(g, g, [True] * len(g), z)
