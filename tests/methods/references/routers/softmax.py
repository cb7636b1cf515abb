"""p = softmax(W u), every expert (MoLoRA, HydraLoRA)."""

from references.loops import Choice, dots
from references.loops import softmax as over_experts

SOFT = True
VARIANTS = [{}, {"bias": True}]


def choose(options, tensors, u, **facts):
    z = dots(tensors["weight"], tensors.get("bias"), u)
    p = over_experts(z)
    return Choice(p, p, [True] * len(p), z)
