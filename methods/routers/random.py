"""A router that knows nothing: the control for claims that routing, and not the number of experts, made a
difference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..lazy import Lazy
from ..router import FactRouter
from ..routing import Routing, one_hot
from ..spec import ConfigError, Count

torch = Lazy("torch")


@dataclass(frozen=True)
class Random(FactRouter):
    """`w = onehot(u)` at every site, u uniform on the experts: a hash of the prompt's tokens and of `seed`,
    without parameters.

    granularity=sequence draws once a sequence; token draws for each kind of token in each sequence. The same
    text is always routed the same way, in training and evaluation, whatever its padding, its batch and its
    cache.
    """

    kind = "random"
    granularity: Literal["token", "sequence"] = "sequence"
    seed: Count = 1

    @property
    def reads_prompt(self):
        return True

    def decide(self, context, experts):
        if context.continues:
            return None
        hashed = scramble(_ids(context), self.seed)
        if (prompt := context.prompt_tokens) is not None:
            hashed = hashed * prompt
        drawn = scramble(hashed.sum(1), self.seed)
        routing = one_hot(uniform(drawn, experts), experts)
        routing.extras["drawn"] = drawn.unsqueeze(-1)
        return routing

    def spread(self, kept: Routing, context):
        if self.granularity == "sequence":
            return super().spread(kept, context)
        drawn = scramble(_ids(context) + kept.extras["drawn"], self.seed)
        experts = kept.weights.shape[-1]
        return one_hot(uniform(drawn.flatten(), experts), experts)


def _ids(context):
    if context.input_ids is None:
        raise ConfigError(
            "input_ids=None: expected token ids at the forward, since router.kind=random hashes them."
        )
    return context.input_ids


def scramble(x, seed: int):
    """A well mixed hash [...] int64 of int64 x: SplitMix64's step and finaliser, whose products wrap
    around."""
    x = x + _signed(seed * 0x9E3779B97F4A7C15)
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift(x, 31)


def _signed(n: int) -> int:
    """`n` modulo 2^64 as int64 holds it."""
    return (n + (1 << 63)) % (1 << 64) - (1 << 63)


def _shift(x, bits: int):
    """Logical shift to the right; torch's is arithmetic."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def uniform(x, n: int):
    """Numbers [...] in 0 .. n - 1 of hashes x, each as likely."""
    return _shift(x, 16) % n
