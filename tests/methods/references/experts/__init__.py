"""Experts, as loops by the place at which they are: a file defines the functions of its places.

    add_to_linear(part, p, w, x) -> what its experts add to a linear's output, for one token x [d_in]
    around_linear(part, p, place, linear, x, choose) -> the linear's output; `choose(a)` gives weights for the
        activation a that a router reads, of one head where it has several; None where nothing is routed
    feed_forward(part, p, w, ffn, x, y) -> output of the whole block, y without them; None where they run it
    in_attention(part, p, w, q, keys, values) -> what is added for the queries q [heads][size] of one token;
        `keys(x)` and `values(x)` are the frozen projections, [heads][size] of each row

part: the bank of the product, for its options alone; p: tensors, fp64, by name; w: weight of each expert.
"""

REQUIRED = ()
