"""The family of experts. A bank holds the experts of one kind at one place, concatenated, as options plus
equations; how it meets the frozen model is its seam (tuner/seams).

Shapes: T tokens, G linears that share one input, E = `n` experts of the bank, R rank rows (all experts of one
linear). A bank never loops over its experts and never touches a wide tensor itself: it scales rank-side
tensors, and moabench.kernels does the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from .lazy import Lazy
from .params import Param
from .spec import LATER, ConfigError, Count, NonNegative, Part, Share

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = Lazy("torch")

lowrank = Lazy("moabench.kernels.lowrank")

LINEARS = ("q", "k", "v", "o", "gate", "up", "down")
Linear = Literal["q", "k", "v", "o", "gate", "up", "down"]


@dataclass(frozen=True)
class Experts(Part):
    """Base of all banks. seam: how they attach to a decoder layer, the name of a file in tuner/seams; sites:
    where the router that governs them may sit."""

    folder: ClassVar[str] = "moabench.methods.experts"
    seam: ClassVar[str]
    sites: ClassVar[tuple[str, ...]]
    size: ClassVar[str] = "r"
    """The option that says how large an expert is; its parameters grow linearly with it."""
    replaces: ClassVar[bool] = False
    """Whether the experts run the frozen module themselves, so that it must not run beside them."""
    low_rank: ClassVar[bool] = False
    """Whether the experts are rank-side mixtures of one A and one B."""

    n: Count = 1

    @property
    def places(self) -> tuple[str, ...]:
        """What the experts attach to: roles of linears, `ffn` or `attention`."""
        raise NotImplementedError

    def label(self, name: str, place: str) -> str:
        """How an expert of the bank `name` at `place` is called among the experts of a block's router."""
        return place

    def heads(self, place: str, d_in: int, d_out: int, head_dim: int) -> tuple[int, int]:
        """(H, width): how many decisions a token has on the linear at `place`, whose sizes are given, and how
        wide what each of them reads is."""
        return 1, d_in

    def reads_output(self, place: str) -> bool:
        """Whether the router of a linear at `place` reads what the frozen linear gives, not what it reads."""
        return False

    @property
    def owners(self) -> dict[str, tuple[int, tuple[int, ...]]]:
        """Tensor -> (axis, expert of each index along it), for tensors whose parts belong to one expert
        each."""
        return {}

    def params(self, *sizes: Any) -> dict[str, Param]:
        """The tensors at one place; what is given is the seam's."""
        raise NotImplementedError

    def forward(self, *args: Any) -> Tensor:
        """What the bank does at one place; what is given is the seam's."""
        raise NotImplementedError

    def constants(self) -> dict[str, Any]:
        """Fixed tensors of the bank as nested lists, handed back as `c`; they are neither trained nor
        saved."""
        return {}


@dataclass(frozen=True)
class LinearExperts(Experts):
    """Base of banks on linears: `y = base(x) + B mix(A x, w)`.

    r: rank of each expert, one number or one for each expert. scale of an expert: alpha / r, with rslora
    alpha / sqrt(r) (arXiv 2312.03732). dropout: share of the inputs of A set to 0 in training, with one mask
    for all experts of one input. gate_grad=sqrt: the experts' gradients are scaled by the root of their
    weights instead of the weights, value and router gradient staying as they are (arXiv 2502.15828).
    """

    seam = "low_rank"
    sites = ("linear", "block")
    low_rank = True

    targets: tuple[Linear, ...] = ("q", "k", "v", "o", "down")
    r: Count | tuple[Count, ...] = 8
    alpha: NonNegative = 8.0
    rslora: bool = False
    dropout: Share = 0.0
    gate_grad: Literal["plain", "sqrt"] = field(default="plain", metadata=LATER)

    @property
    def places(self) -> tuple[str, ...]:
        return self.targets

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
class AroundExperts(Experts):
    """Base of banks around a linear, which see what it reads and what it gives, and may change both.

    Shapes: H heads, the parts of an activation that are routed apart (1: all of it together).
    """

    seam = "around"
    sites = ("linear",)

    targets: tuple[str, ...] = ()

    @property
    def places(self) -> tuple[str, ...]:
        return self.targets

    def params(self, place: str, d_in: int, d_out: int, head_dim: int) -> dict[str, Param]:
        """The tensors on one linear."""
        raise NotImplementedError

    def forward(
        self, p: Mapping[str, Tensor], place: str, x: Tensor, linear: Callable, route: Callable
    ) -> Tensor:
        """Output [T, d_out] for the input x [T, d_in]. `linear(x)` runs the frozen linear with whatever else
        sits on it; `route(u)` gives weights [T, H, E] for u [T, H, width], None where nothing is routed."""
        raise NotImplementedError


@dataclass(frozen=True)
class FeedForwardExperts(Experts):
    """Base of banks on the feed-forward block."""

    seam = "feed_forward"
    sites = ("ffn", "block")

    @property
    def places(self) -> tuple[str, ...]:
        return ("ffn",)

    def label(self, name: str, place: str) -> str:
        return name

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


@dataclass(frozen=True)
class AttentionExperts(Experts):
    """Base of banks inside attention, after the positions are in the queries and before the output
    projection."""

    seam = "attention"
    sites = ("block",)

    @property
    def places(self) -> tuple[str, ...]:
        return ("attention",)

    def label(self, name: str, place: str) -> str:
        return name

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


def constant_tensors(bank: Experts, device: torch.device) -> dict[str, Tensor]:
    """The bank's constants on `device`; normal tensors in inference mode too, since training may use them
    later."""
    with torch.inference_mode(False):
        return {name: torch.tensor(values, device=device) for name, values in bank.constants().items()}


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
