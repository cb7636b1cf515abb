"""The moments of training at which a method's rules act, for whoever trains it.

    moments = Moments(model)
    for batch in batches:                        # the passes of one optimiser step
        with record(model) as rec:
            loss = ...
        loss.backward()
        moments.passed(rec.routing)
    moments.after_backward()                     # gradients are whole and clipped
    optimizer.step()
    moments.after_step()

Sites and their tensors are looked up at each moment, never kept: DDP and `.to()` put new buffers in the place
of old ones.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..routing import Routing
from ..rule import Rule
from .layer import MixtureLayer
from .sites import Site, layer_sites


class Moments:
    """The rules of a model's active adapter; without any, every call returns at once."""

    def __init__(self, model: nn.Module) -> None:
        self._layers = [m for m in model.modules() if isinstance(m, MixtureLayer)]
        self._counts: dict[str, Tensor] = {}  # by site, since the last step
        self.rules = list(dict.fromkeys(rule for rule, _ in self._acting()))

    def _acting(self) -> list[tuple[Rule, Site]]:
        """(rule, site) in the order of the model, the same in every process."""
        return [(rule, s) for layer in self._layers for s in layer_sites(layer) for rule in s.mixture.rules]

    def passed(self, routing: Mapping[str, Routing]) -> None:
        """A training pass is done, and recorded these routings [T, E] by site."""
        for rule, site in self._acting() if self.rules else ():
            if site.name in routing and (found := rule.counts(routing[site.name])) is not None:
                before = self._counts.get(site.name)
                self._counts[site.name] = found if before is None else before + found

    def after_backward(self) -> None:
        """Before the optimiser's step: gradients of all passes and processes are summed, and clipped."""
        for rule, sites in self._by_rule().items():
            rule.after_backward(sites)

    def after_step(self) -> None:
        """After the optimiser's step. Sums what was counted over the processes."""
        if self._counts:
            names = [
                name for name in dict.fromkeys(s.name for _, s in self._acting()) if name in self._counts
            ]
            flat = torch.cat([self._counts[name].flatten() for name in names])
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.all_reduce(flat)
            pieces = flat.split([self._counts[name].numel() for name in names])
            self._counts = {
                name: piece.view_as(self._counts[name]) for name, piece in zip(names, pieces, strict=True)
            }
        for rule, sites in self._by_rule().items():
            counted = [site for site in sites if site.name in self._counts]
            rule.after_step(counted, [self._counts[site.name] for site in counted])
        self._counts = {}

    def _by_rule(self) -> dict[Rule, list[Site]]:
        found: dict[Rule, list[Site]] = {}
        for rule, site in self._acting() if self.rules else ():
            found.setdefault(rule, []).append(site)
        return found
