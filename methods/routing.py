"""`Routing`, the one object that routers make, banks consume, and losses and measures read.

Shapes: T tokens (batch x length, row-major), E experts.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from .lazy import Lazy

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = Lazy("torch")


@dataclass
class Routing:
    """What one router decided for T tokens.

    weights [T, E]   fp32, what multiplies each expert; 0 where not selected
    chosen  [T, E]   bool, the experts a sparse router selected; None for a soft router, which selects all
    probs   [T, E]   fp32 scores before selection (softmax probabilities or sigmoid gates); None where there
            are none
    logits  [T, E]   fp32 router outputs; None where there are none
    ids     [T, K]   selected experts in order of score where every token selects exactly K; None otherwise
    mask    [T]      bool, real tokens; padding belongs to no load, loss or measure; None where every token is
            real
    length           rows in a row that share a decision: 1, or the L positions of a sequence
    extras           further tensors of one router by name, e.g. AdaMoLE's threshold `tau` [T, 1]
    """

    weights: Tensor
    chosen: Tensor | None = None
    probs: Tensor | None = None
    logits: Tensor | None = None
    ids: Tensor | None = None
    mask: Tensor | None = None
    experts: tuple[str, ...] = ()
    granularity: str = "token"
    length: int = 1
    extras: dict[str, Tensor] = field(default_factory=dict)

    @property
    def soft(self) -> bool:
        """True where every expert acts on every token, so that counting assignments says nothing."""
        return self.chosen is None

    @property
    def selected(self) -> Tensor:
        """[T, E] bool."""
        return torch.ones_like(self.weights, dtype=torch.bool) if self.chosen is None else self.chosen

    def map(self, f) -> Routing:
        """The same routing with `f` applied to every tensor that has one row a token, the mask excepted."""
        tensors = {
            k: f(v)
            for k in ("weights", "chosen", "probs", "logits", "ids")
            if (v := getattr(self, k)) is not None
        }
        return replace(self, **tensors, extras={k: f(v) for k, v in self.extras.items()})

    def at_site(self, g: int) -> Routing:
        """Site g's part [T, E] of a routing [T, G, E]."""
        return self.map(lambda t: t[:, g])

    def per_token(self, length: int) -> Routing:
        """A decision a sequence [B, E] as one a token [B length, E]."""
        expanded = self.map(lambda t: t.unsqueeze(1).expand(-1, length, *t.shape[1:]).flatten(0, 1))
        expanded.granularity, expanded.length = "sequence", length
        return expanded


def one_hot(expert: Tensor, experts: int) -> Routing:
    """The routing [..., E] that gives weight 1 to expert [...] (int64) and 0 to the others."""
    chosen = expert.unsqueeze(-1) == torch.arange(experts, device=expert.device)
    weights = chosen.float()
    return Routing(weights=weights, chosen=chosen, probs=weights, logits=weights, ids=expert.unsqueeze(-1))
