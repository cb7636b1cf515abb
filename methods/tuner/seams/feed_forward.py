"""Banks on the feed-forward block: beside it, or running it themselves."""

from __future__ import annotations

from torch import Tensor, nn

from ...bank import Experts
from ...catalog import Mixture
from ...routing import Routing
from ...spec import ConfigError
from .. import proof
from ..architecture import DecoderLayer, FeedForward, owned
from ..deciding import columns
from . import base
from .base import Entry


class Seam(base.Seam):
    """Banks of kind FeedForwardExperts."""

    wraps_feed_forward = True

    def __init__(self, layer: DecoderLayer, entries: list[Entry]) -> None:
        layer.require(("gate", "up", "down"))
        # who replaces the block runs first
        self.entries = sorted(entries, key=lambda entry: not entry.bank.replaces)
        if sum(entry.bank.replaces for entry in entries) > 1:
            raise ConfigError("experts: expected at most one bank that runs the whole feed-forward block.")

    def declared(self, layer: DecoderLayer):
        for mixture, name, bank in self.entries:
            yield mixture, name, "ffn", bank.params(layer.width, layer.places["down"].shape[0])

    def prove(self, model: nn.Module, layer: DecoderLayer) -> None:
        if any(entry.bank.replaces for entry in self.entries):
            proof.feed_forward(layer)

    def feed_forward(self, owner, block: nn.Module, x: Tensor) -> Tensor:
        """Output [B, L, d] of the block for its input x [B, L, d]."""
        flat, y, routings = x.flatten(0, -2), None, {}
        for mixture, name, bank in self.entries:
            routing = None
            if mixture.routed:
                if mixture.name not in routings:
                    at_ffn = mixture.site == "ffn"
                    routings[mixture.name] = (
                        owner.route(mixture, "ffn", x.unsqueeze(-2)).at_site(0)
                        if at_ffn
                        else owner.live.routings[mixture.name]
                    )
                routing = bank_routing(routings[mixture.name], mixture, name, bank)
            if y is None and not bank.replaces:
                # a block ends in its down projection
                y = owned(owner.layer.places["down"].linear, block(x).flatten(0, -2))
            p = owner.tensor(mixture, name, "ffn")
            y = bank.forward(p, flat, y, FeedForward(owner.layer), routing, owner.training)
        return y.unflatten(0, x.shape[:-1])


def bank_routing(routing: Routing, mixture: Mixture, name: str, bank: Experts) -> Routing:
    """The part of a routing that concerns one bank at the feed-forward block."""
    places = [[mixture.column(name, "ffn", i) for i in range(bank.n)]]
    if places[0] == list(range(routing.weights.shape[-1])):
        return routing
    return Routing(weights=columns(routing.weights, places)[:, 0])
