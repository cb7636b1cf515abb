"""The protocol of seams."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn

from ...bank import Experts
from ...catalog import Mixture
from ...params import Param
from ..architecture import DecoderLayer


class Entry(NamedTuple):
    """A bank of an adapter, with its name and its mixture."""

    mixture: Mixture
    name: str
    bank: Experts


def tensor_name(mixture: Mixture, part: str, place: str, tensor: str) -> str:
    """Name of one tensor in a layer: `<mixture>__<router or bank>__<place>__<tensor>`."""
    return f"{mixture.name}__{part}__{place}__{tensor}"


class Seam:
    """The banks of one adapter that attach to one decoder layer in one way.

    owner: the layer's MixtureLayer, which has tensors, context and routers. A seam implements what it takes
    part in: `linears` names the linears that it wraps and `linear` runs one of them, `feed_forward` runs the
    block, `attention` adds to the attention's output.
    """

    linears: tuple[str, ...] = ()
    """Attributes of the linears that it wraps, each a RoutedLinear then."""
    wraps_feed_forward = False
    """Whether it runs the block, a RoutedFeedForward then."""
    adds_to_attention = False
    """Whether it adds to the attention's output, and the model's attention must ask."""

    def __init__(self, layer: DecoderLayer, entries: list[Entry]) -> None:
        """Raises ConfigError where the layer or the banks do not fit."""
        raise NotImplementedError

    def declared(self, layer: DecoderLayer) -> Iterator[tuple[Mixture, str, str, dict[str, Param]]]:
        """(mixture, `router` or bank, place, tensors), routers of a whole block excepted."""
        raise NotImplementedError

    def prove(self, model: nn.Module, layer: DecoderLayer) -> None:
        """Raise ConfigError where the frozen parts that the banks share are not what they are taken for
        (../proof.py)."""

    def linear(self, owner: Any, attribute: str, x: Tensor, inner: Callable) -> Tensor:
        """Output [..., b] of a linear for its input x [..., a]; `inner(x)` runs it without this seam."""
        raise NotImplementedError

    def feed_forward(self, owner: Any, block: nn.Module, x: Tensor) -> Tensor:
        """Output [B, L, d] of the block for its input x [B, L, d]."""
        raise NotImplementedError

    def attention(self, owner: Any, query: Tensor, scaling: float) -> Tensor:
        """What to add to the attention's output [B, L, H, hd]; query [B, H, L, hd]."""
        raise NotImplementedError
