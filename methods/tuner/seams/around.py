"""Banks around single linears: each sees what its linear reads and gives, and may change both."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...spec import ConfigError
from ..architecture import DecoderLayer, Place
from . import base
from .base import Entry


class Seam(base.Seam):
    """Banks of kind AroundExperts."""

    def __init__(self, layer: DecoderLayer, entries: list[Entry]) -> None:
        self.head_dim = layer.head_dim
        layer.require({role for entry in entries for role in entry.bank.places})
        self.terms = [(entry, layer.places[role]) for entry in entries for role in entry.bank.places]
        self.linears = tuple(dict.fromkeys(place.attribute for _, place in self.terms))
        for entry, place in self.terms:
            heads, width = entry.bank.heads(place.role, *place.shape, self.head_dim)
            if heads > 1 and heads * width != place.shape[1]:
                raise ConfigError(
                    f"experts.{entry.name}: {place.role} of '{layer.name}' gives {place.shape[1]} numbers, "
                    f"which are no whole heads of {width}."
                )

    def declared(self, layer: DecoderLayer):
        for (mixture, name, bank), place in self.terms:
            yield mixture, name, place.role, bank.params(place.role, *place.shape, self.head_dim)
            if mixture.routed:
                width = bank.heads(place.role, *place.shape, self.head_dim)[1]
                yield mixture, "router", place.role, mixture.router.params(width, bank.n)

    def linear(self, owner, attribute: str, x: Tensor, inner: Callable) -> Tensor:
        for entry, place in self.terms:
            if place.attribute == attribute:
                inner = self._around(owner, entry, place, inner)
        return inner(x)

    def _around(self, owner, entry: Entry, place: Place, inner: Callable) -> Callable:
        mixture, name, bank = entry
        p = owner.tensor(mixture, name, place.role)

        def run(x: Tensor) -> Tensor:
            leading, whole = x.shape[:-1], None

            def linear(u: Tensor) -> Tensor:
                nonlocal whole
                whole = inner(u.unflatten(0, leading)).flatten(0, -2)
                return whole[:, place.columns] if place.fused else whole

            def route(u: Tensor) -> Tensor | None:
                if not mixture.routed:
                    return None
                return owner.route(mixture, place.role, u.unflatten(0, leading)).weights

            y = bank.forward(p, place.role, x.flatten(0, -2), linear, route)
            if place.fused:  # the other roles of the linear stay as they are
                y = torch.cat([whole[:, : place.columns.start], y, whole[:, place.columns.stop :]], -1)
            return y.unflatten(0, leading)

        return run
