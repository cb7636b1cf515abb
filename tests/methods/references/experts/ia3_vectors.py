"""a' = a * sum_e w_e(a) l_e: on k and v of what each head gets, before positions, on down of what it reads
(mov.md)."""

import torch


def around_linear(part, p, place, linear, x, choose):
    def scaled(head, a):
        w = choose(head, a)
        vectors = p["vectors"][head]
        return a * sum((1.0 if w is None else w[e]) * vectors[e] for e in range(part.n))

    if place == "down":
        return linear(scaled(0, x))
    size = p["vectors"].shape[-1]
    return torch.cat([scaled(h, a) for h, a in enumerate(linear(x).split(size))])
