"""s = sigmoid(W u); S = the k largest of s + b; w_i = route_scale s_i / sum_S s, and route_scale s_i where k
= 1 (moe_lora_bias.md)."""

from references.loops import Choice, descending, dots, kept, sigmoid

SOFT = False
JUMPS = True
SUMS_TO_ONE = True  # to route_scale, which is 1
RULE = False  # the bias of the selection is a buffer, and no part of a kernel's rule
VARIANTS = [{"k": 1}, {}, {"k": 5}, {"k": 3, "bias": True, "route_scale": 2.5}]


def choose(options, tensors, u, **facts):
    z = dots(tensors["weight"], tensors.get("bias"), u)
    s = [sigmoid(v) for v in z]
    best = descending([v + b for v, b in zip(s, tensors["load_bias"], strict=True)])[: options.k]
    total = sum(s[i] for i in best) if options.k > 1 else 1
    w = [options.route_scale * v for v in kept(s, best, total)]
    return Choice(w, s, [i in best for i in range(len(s))], z)
