"""A reader's view of an attached mixture: each routed place with its router and banks, tensors visible."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..router import Router

if TYPE_CHECKING:
    from ..catalog import Mixture
    from .layer import MixtureLayer


@dataclass
class BankView:
    """One bank at one place.

    A [rows, d_in], B [d_out, R], owner [R] (expert of each column of B), scale [E] for banks on linears;
    `tensors` has every tensor of the bank by its own name.
    """

    name: str
    part: Any  # an Experts
    place: str
    tensors: dict[str, Tensor]

    @property
    def A(self) -> Tensor:
        return self.tensors["A"]

    @property
    def B(self) -> Tensor:
        return self.tensors["B"]

    @property
    def owner(self) -> Tensor:
        return torch.tensor(self.part.owner)

    @property
    def scale(self) -> Tensor:
        return torch.tensor(self.part.scales)


@dataclass
class Site:
    """One place with its router (None where nothing is routed) and the banks that it governs.

    `experts` names the router's outputs; `tensors` are the router's. `module` is what runs there: the wrapped
    linear or feed-forward block, or the decoder layer; `layer` is the layer's mixtures, of which `mixture` is
    this one. `place` is the last part of the name. `columns`: of the module's output, those that this site's
    decision concerns, where a token has several decisions at one linear (one a head).
    """

    name: str
    kind: str
    router: Router | None
    experts: tuple[str, ...]
    tensors: dict[str, Tensor]
    banks: list[BankView]
    place: str
    module: nn.Module
    layer: MixtureLayer
    mixture: Mixture
    columns: slice = field(default_factory=lambda: slice(None))


def layer_sites(layer: MixtureLayer) -> list[Site]:
    """Sites of the active adapter in one decoder layer."""
    return [
        site for mixture in (layer.plan.mixtures if layer.plan else ()) for site in _sites(layer, mixture)
    ]


def _sites(layer: MixtureLayer, mixture: Mixture) -> Iterator[Site]:
    views = [
        BankView(name, bank, place, layer.tensor(mixture, name, place))
        for name, bank in mixture.banks.items()
        for place in bank.places
    ]
    groups = [(v.place, [v]) for v in views] if mixture.site == "linear" else [(mixture.site, views)]
    router = mixture.router if mixture.routed else None
    for place, banks in groups:
        tensors = layer.tensor(mixture, "router", place) if mixture.routed else {}
        module, decisions, width = _module(layer, mixture.site, place), 1, 0
        if mixture.site == "linear":
            decisions, width = banks[0].part.heads(
                place, *layer.layer.places[place].shape, layer.layer.head_dim
            )
        for g, name in enumerate(layer.site_names(mixture, place, decisions)):
            yield Site(
                name,
                mixture.site,
                router,
                mixture.expert_names,
                tensors,
                banks,
                name.rpartition(".")[2],
                module,
                layer,
                mixture,
                slice(g * width, (g + 1) * width) if decisions > 1 else slice(None),
            )


def _module(layer: MixtureLayer, kind: str, place: str) -> nn.Module:
    """The module whose output the experts of one place change."""
    described = layer.layer
    if kind == "block":
        return described.module
    if kind == "ffn":
        return getattr(described.module, described.feed_forward_name)
    linear = described.places[place]
    return getattr(linear.parent, linear.attribute)
