"""Auxiliary losses: pure functions of the routings that one forward pass recorded.

An optimiser step may see its batch in several forward passes (accumulation, processes). A loss with
batch=global is that of the whole batch all the same: what it must know of the other passes are sums over
their tokens that carry no gradient (`Loss.sums`), and given these (`whole`) the mean over the passes of its
values is the loss of all tokens, gradient included.

Shapes: S sites of one method, G of them read one input, T tokens, E experts. Padding is excluded from every
mean.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from .lazy import Lazy
from .routing import Routing
from .spec import NonNegative, Part

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = Lazy("torch")


@dataclass(frozen=True)
class Loss(Part):
    """Base of the auxiliary losses. coef multiplies the value before it is added to the task loss.

    scope: `site` computes the loss for each router, then `reduce`s over routers by sum or mean; `model`
    computes one loss from the tokens of all routers together. Published coefficients mean different things,
    so both belong to a method. batch: `global` is the loss of all tokens of an optimiser step, however they
    are cut into forward passes and processes; `micro` that of each forward pass, averaged, as published code
    computes it. A loss of another form can be `micro` alone: its class says so by the type of this field, and
    why in its docstring.
    """

    folder: ClassVar[str] = "moabench.methods.losses"

    coef: NonNegative = 0.0
    scope: Literal["site", "model"] = "site"
    reduce: Literal["sum", "mean"] = "sum"
    batch: Literal["global", "micro"] = "global"

    @property
    def reads(self) -> str:
        """What it must find in a Routing, one of what `Router.gives` names."""
        return "probs"

    def given(self, routing: Routing) -> bool:
        """Whether a pass's routing has what the loss reads; where it has not, the pass has no such loss."""
        return True

    def sums(self, routing: Routing) -> Tensor:
        """What the passes over a batch must know of each other: sums over real tokens, [G, ...], without
        gradient. batch=global only."""
        raise NotImplementedError

    def per_site(self, routings: Sequence[Routing], whole: Sequence[Tensor] | None = None) -> Tensor:
        """Unreduced values [S] (or [1] for scope=model). whole: for each of the routings the mean of `sums`
        over the passes that make up the batch; None where this pass is all of it."""
        raise NotImplementedError

    def __call__(self, routings: Sequence[Routing], whole: Sequence[Tensor] | None = None) -> Tensor:
        values = self.per_site(routings, whole)
        return self.coef * (values.sum() if self.reduce == "sum" else values.mean())


Entry = tuple[tuple[str, ...], Routing, dict[str, Loss]]
"""What a recorder holds of one router's pass: its sites, their routing [T, G, E], its losses by kind."""
Sums = dict[tuple[str, Loss], list["Tensor"]]
"""By kind and loss, `Loss.sums` of each routing that it reads."""


def read_by(entries: Iterable[Entry]) -> dict[tuple[str, Loss], list[Routing]]:
    """The routings that each loss reads; losses whose coefficient is 0, or that a pass gives nothing to read,
    are left out."""
    found: dict[tuple[str, Loss], list[Routing]] = {}
    for _, routing, losses in entries:
        for kind, loss in losses.items():
            if loss.coef > 0 and loss.given(routing):
                found.setdefault((kind, loss), []).append(routing)
    return found


def global_sums(entries: Iterable[Entry]) -> Sums:
    """What the losses with batch=global need of one forward pass; empty where there is none."""
    return {
        key: [key[1].sums(routing) for routing in routings]
        for key, routings in read_by(entries).items()
        if key[1].batch == "global"
    }


def auxiliary(entries: Iterable[Entry], whole: Sums | None = None) -> dict[str, Tensor]:
    """Auxiliary losses of one forward pass by kind, each already multiplied by its coefficient. whole: the
    mean of `global_sums` over the passes of which this is one."""
    total: dict[str, Tensor] = {}
    for (kind, loss), routings in read_by(entries).items():
        value = loss(routings, None if whole is None else whole.get((kind, loss)))
        total[kind] = total[kind] + value if kind in total else value
    return total


def token_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over the tokens of values [T, G, E] that the mask [T] calls real: [G, E]."""
    if mask is None:
        return values.mean(0)
    share = mask.to(values.dtype) / mask.sum().clamp(min=1)
    return torch.einsum("t,tge->ge", share, values)


def token_sum(values: Tensor, mask: Tensor | None) -> Tensor:
    """Sum over the same tokens: [G, E]."""
    return values.sum(0) if mask is None else torch.einsum("t,tge->ge", mask.to(values.dtype), values)


def token_count(routing: Routing) -> Tensor:
    """Number of real tokens, [G, 1], as often as sites read this input."""
    weights = routing.weights
    real = (
        weights.new_tensor(float(len(weights)))
        if routing.mask is None
        else routing.mask.sum().to(weights.dtype)
    )
    return real.expand(weights.shape[1], 1)
