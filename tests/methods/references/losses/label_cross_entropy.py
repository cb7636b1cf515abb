"""CE(z, label) a sequence, mean over sequences (mixture_of_loras.md); nothing where there are no labels."""

import torch

from references.losses import over_sites


def value(routing, scope="site", reduce="mean"):
    def loss(choices):
        decisions = list({id(c): c for c in choices}.values())  # one a sequence
        each = [torch.log(sum(torch.exp(z) for z in c.z)) - c.z[c.label] for c in decisions]
        return sum(each) / len(each)

    if any(c.label is None for choices in routing.values() for c in choices):
        return None
    return over_sites(routing, scope, reduce, loss)
