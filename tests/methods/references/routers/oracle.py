"""w = onehot(skill mod E)."""

from references.loops import one_hot

SOFT = False
LEARNS = "never"
FACTS = ("skill",)
RULE = False  # it has no scores
VARIANTS = [{}]


def choose(options, tensors, u, *, experts, skill, **facts):
    return one_hot(skill % experts, experts)
