"""Auxiliary losses.

    value(routing, **options) -> the loss before its coefficient; None where it says nothing

routing: by site, the Choice of every real token; the tokens of a sequence that is decided as one share
theirs. options: those of the product's loss but `coef` and `batch` (all tokens of a batch are one pass
here). `over_sites` groups and reduces by scope and reduce.
"""

REQUIRED = ("value",)


def over_sites(routing, scope, reduce, loss):
    """`loss(choices)` of each site, summed or averaged, or once of the tokens of all sites together."""
    sites = list(routing.values())
    if scope == "model":
        sites = [[choice for choices in sites for choice in choices]]
    values = [loss(choices) for choices in sites]
    return sum(values) / (len(values) if reduce == "mean" else 1)
