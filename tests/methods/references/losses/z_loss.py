"""mean_t (log sum_i exp z_ti)^2 (arXiv 2202.08906, eq. 5)."""

import torch

from references.losses import over_sites


def value(routing, scope="site", reduce="sum"):
    def loss(choices):
        return sum(torch.log(sum(torch.exp(z) for z in c.z)) ** 2 for c in choices) / len(choices)

    return over_sites(routing, scope, reduce, loss)
