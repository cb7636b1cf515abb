"""w = onehot(h mod E), h a hash of the prompt's tokens and the seed; with granularity=token of it and of the
token. The hash is SplitMix64 in whole numbers modulo 2^64."""

from references.loops import one_hot

SOFT = False
LEARNS = "never"
FACTS = ("ids",)
RULE = False  # it has no scores
VARIANTS = [{}, {"granularity": "token"}, {"seed": 7}]
_WORD = 1 << 64


def _mixed(x: int, seed: int) -> int:
    x = (x + seed * 0x9E3779B97F4A7C15) % _WORD
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % _WORD
    x = (x ^ x >> 27) * 0x94D049BB133111EB % _WORD
    return x ^ x >> 31


def choose(options, tensors, u, *, experts, prompt, token, **facts):
    drawn = _mixed(sum(_mixed(i, options.seed) for i in prompt) % _WORD, options.seed)
    if options.granularity == "token":
        drawn = _mixed((token + drawn) % _WORD, options.seed)
    return one_hot((drawn >> 16) % experts, experts)
