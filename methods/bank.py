"""The family of experts. A bank holds the experts of one kind at one place, concatenated, as options plus
equations.

Shapes: T tokens, G linears that share one input, E = `n` experts of the bank, R rank rows (all experts of one
linear). A bank never loops over its experts and never touches a wide tensor itself: it scales rank-side
tensors, and moabench.kernels does the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from .lazy import Lazy
from .params import Param
from .spec import ConfigError, Count, NonNegative, Part, Share

if TYPE_CHECKING:
    from torch import Tensor

lowrank = Lazy("moabench.kernels.lowrank")

LINEARS = ("q", "k", "v", "o", "gate", "up", "down")
Linear = Literal["q", "k", "v", "o", "gate", "up", "down"]


@dataclass(frozen=True)
class Experts(Part):
    """Base of all banks. `place` says what they attach to: each of `targets` (linear), the feed-forward
    block, or attention."""

    folder: ClassVar[str] = "moabench.methods.experts"
    place: ClassVar[Literal["linear", "ffn", "attention"]]
    size: ClassVar[str] = "r"
    """The option that says how large an expert is; its parameters grow linearly with it."""

    n: Count = 1

    def constants(self) -> dict[str, Any]:
        """Fixed tensors of the bank as nested lists, handed back as `c`; they are neither trained nor
        saved."""
        return {}


@dataclass(frozen=True)
class LinearExperts(Experts):
    """Base of banks on linears: `y = base(x) + B mix(A x, w)`.

    r: rank of each expert, one number or one for each expert. scale of an expert: alpha / r, with rslora
    alpha / sqrt(r) (arXiv 2312.03732). dropout: share of the inputs of A set to 0 in training, with one mask
    for all experts of one input.
    """

    place = "linear"

    targets: tuple[Linear, ...] = ("q", "k", "v", "o", "down")
    r: Count | tuple[Count, ...] = 8
    alpha: NonNegative = 8.0
    rslora: bool = False
    dropout: Share = 0.0

    def __post_init__(self) -> None:
        if isinstance(self.r, tuple) and len(self.r) != self.n:
            raise ConfigError(
                f"r={list(self.r)}: expected one rank, or {self.n} ranks, one for each expert (n={self.n})."
            )
        if not self.targets or len(set(self.targets)) < len(self.targets):
            raise ConfigError(
                f"targets={list(self.targets)}: expected one or more of {', '.join(LINEARS)}, each once."
            )

    @cached_property
    def ranks(self) -> tuple[int, ...]:
        """Rank of each expert."""
        return self.r if isinstance(self.r, tuple) else (self.r,) * self.n

    @cached_property
    def scales(self) -> tuple[float, ...]:
        """Factor of each expert's update."""
        return tuple(self.alpha / (r**0.5 if self.rslora else r) for r in self.ranks)

    @cached_property
    def owner(self) -> tuple[int, ...]:
        """Expert of each column of B."""
        return tuple(e for e, r in enumerate(self.ranks) for _ in range(r))

    @property
    def sortable(self) -> bool:
        """Whether each expert is a low-rank pair of its own, of one rank and scale, scaled by its weight
        alone: then tokens may be sorted by expert instead of meeting all of them
        (moabench.kernels.grouped)."""
        return False

    def params(self, d_in: int, d_out: int) -> dict[str, Param]:
        """`A [rows, d_in]` and `B [d_out, R]` of one linear."""
        raise NotImplementedError

    def mix(self, s: Tensor, w: Tensor | None, c: Mapping[str, Tensor]) -> Tensor:
        """Rank-side mixture [T, G, R] of the projections s [T, G, rows] and the weights w [T, G, E] (None:
        all 1)."""
        raise NotImplementedError


@dataclass(frozen=True)
class FeedForwardExperts(Experts):
    """Base of banks on the feed-forward block."""

    place = "ffn"

    def params(self, d: int, f: int) -> dict[str, Param]:
        """The tensors of one block of width d and inner width f."""
        raise NotImplementedError

    def forward(
        self, p: Mapping[str, Tensor], x: Tensor, y: Tensor | None, ffn: Any, routing: Any, training: bool
    ) -> Tensor:
        """Block output [T, d] from its input x [T, d], where y is the output so far; banks that run the block
        themselves (`replaces = True`) get None. `ffn` is an architecture.FeedForward, `routing` a Routing
        over this bank's experts or None.
        """
        raise NotImplementedError

    replaces: ClassVar[bool] = False


@dataclass(frozen=True)
class AttentionExperts(Experts):
    """Base of banks inside attention, after the positions are in the queries and before the output
    projection."""

    place = "attention"

    def params(self, d: int, heads: int) -> dict[str, Param]:
        """The tensors of one attention of model width d with `heads` query heads."""
        raise NotImplementedError

    def forward(
        self, p: Mapping[str, Tensor], query: Tensor, project: Any, scaling: float, w: Tensor | None
    ) -> Tensor:
        """What to add to the attention output [B, L, H, hd]; query [B, H, L, hd]; w [B, L, E] or None for 1.

        `project(parameter [N, d])` gives its frozen keys and values in the model's dtype, each [N, H, hd],
        repeated over grouped query heads.
        """
        raise NotImplementedError


def mix_constants(bank: LinearExperts) -> dict[str, Any]:
    """`scale` [R], the factor of each column of B, and `expand` [E, R], its one-hot form: `w @ expand` gives
    every rank row its owner's weight, scale included, by a small GEMM. Indexing would scatter in its
    backward, and a broadcast over r is slow in bf16."""
    scale = [bank.scales[e] for e in bank.owner]
    return {
        "scale": scale,
        "expand": [[s * (e == o) for o, s in zip(bank.owner, scale, strict=True)] for e in range(bank.n)],
    }


def weighed(s: Tensor, w: Tensor | None, c: Mapping[str, Tensor]) -> Tensor:
    """s [T, G, R] with each rank row times its owner's weight in w [T, G, E] and its scale; the scale alone
    where there are no weights."""
    return s * c["scale"].to(s.dtype) if w is None else lowrank.weigh(s, w, c["expand"])
