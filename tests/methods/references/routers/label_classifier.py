"""w = onehot(argmax(W h + b)), h the last prompt token; while training w = onehot(label), and h passes no
gradient on (mixture_of_loras.md)."""

from references.loops import descending, dots, one_hot

SOFT = False
JUMPS = True
LEARNS = "never"  # the loss of the labels teaches it
RULE = False  # it decides once a sequence, and while training by label
VARIANTS = [{}, {"bias": False}]


def choose(options, tensors, u, *, training=False, skill=None, **facts):
    z = dots(tensors["weight"], tensors.get("bias"), u.detach())
    return one_hot(skill, len(z), z, label=skill) if training else one_hot(descending(z)[0], len(z), z)
