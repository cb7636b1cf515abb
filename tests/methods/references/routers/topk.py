"""S = the k largest of p; w_i = p_i / sum_{j in S} p_j, or p_i without renormalisation."""

from references.loops import Choice, descending, dots, kept, softmax

SOFT = False
JUMPS = True
VARIANTS = [*({"k": k, "renormalize": r} for k in (1, 2, 5) for r in (True, False)), {"k": 3, "bias": True}]


def choose(options, tensors, u, **facts):
    z = dots(tensors["weight"], tensors.get("bias"), u)
    p = softmax(z)
    best = descending(p)[: options.k]
    total = sum(p[i] for i in best) if options.renormalize else 1
    return Choice(kept(p, best, total), p, [i in best for i in range(len(p))], z)
