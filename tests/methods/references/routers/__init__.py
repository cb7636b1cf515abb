"""Routers, for one token or sequence.

    choose(options, tensors, u, *, training, experts, skill, prompt, token) -> Choice

options: the router of the product, for its options alone; tensors: its own, fp64, by name; u [d]: what it
reads (None where it reads facts of the batch alone). The rest are facts, of which it names those that it
needs and takes the others as `**facts`: experts, how many there are; skill, of the sequence; prompt, the
token ids of its prompt; token, the id of this token.
"""

REQUIRED = ("choose", "SOFT", "VARIANTS")
"""SOFT: every expert acts on every token. VARIANTS: options to try."""

JUMPS = False
"""Whether a small change of the scores can change weights by much, at the edge of the selection."""
SUMS_TO_ONE = True
"""Whether the weights of a token do."""
LEARNS = "always"
"""From the loss of the task, with the options of the shipped methods: `always`, `sometimes` (not where one
expert is selected), `never`."""
FACTS = ()
"""Facts of the batch without which it cannot decide in evaluation: `skill`, `ids`."""
RULE = True
"""Whether a kernel does its decision, by `Router.rule`."""
QUIET = {}
"""Tensors that get no gradient at all where an option has a value: name -> (option, value)."""
