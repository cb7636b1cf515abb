"""L = E sum_i f_i P_i over real tokens (adamole.md, mixlora.md)."""

from references.losses import over_sites


def value(routing, scope="site", reduce="sum", values="probs"):
    def loss(choices):
        tokens, experts = len(choices), len(choices[0].p)
        total = 0
        for i in range(experts):
            f = sum(c.chosen[i] for c in choices) / tokens
            total = total + f * sum((c.p if values == "probs" else c.shifted)[i] for c in choices) / tokens
        return experts * total

    return over_sites(routing, scope, reduce, loss)
