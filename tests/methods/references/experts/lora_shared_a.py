"""s sum_e w_e B_e A x: one A for all experts (hydralora.md)."""

import math

from references.experts.lora import weighed


def add_to_linear(part, p, w, x):
    read, r = p["A"] @ x, part.r
    scale = part.alpha / (math.sqrt(r) if part.rslora else r)
    return sum(weighed(part, w[e], scale * (p["B"][:, e * r : (e + 1) * r] @ read)) for e in range(part.n))
