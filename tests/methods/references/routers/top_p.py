"""Sort p, keep experts until the cumulative sum reaches P, that one included."""

from references.loops import Choice, descending, dots, kept, softmax

SOFT = False
JUMPS = True
VARIANTS = [{"p": p, "renormalize": r} for p, r in ((0.6, True), (0.6, False), (0.05, True), (0.95, True))]


def choose(options, tensors, u, **facts):
    z = dots(tensors["weight"], tensors.get("bias"), u)
    p = softmax(z)
    prefix, mass = [], 0.0
    for i in descending(p):
        prefix.append(i)
        mass += float(p[i].detach())
        if mass >= options.p:
            break
    total = sum(p[i] for i in prefix) if options.renormalize else 1
    return Choice(kept(p, prefix, total), p, [i in prefix for i in range(len(p))], z)
