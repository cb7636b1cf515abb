"""Banks inside attention (../attention.py says how they get there)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import proof
from ..architecture import DecoderLayer, base_of, keys_values
from ..deciding import columns
from . import base
from .base import Entry


class Seam(base.Seam):
    """Banks of kind AttentionExperts."""

    adds_to_attention = True

    def __init__(self, layer: DecoderLayer, entries: list[Entry]) -> None:
        layer.require(("q", "k", "v"))
        self.entries = entries
        self.kept: dict[int, tuple[tuple, tuple[Tensor, Tensor]]] = {}

    def declared(self, layer: DecoderLayer):
        heads = layer.places["q"].shape[1] // layer.head_dim
        for mixture, name, bank in self.entries:
            yield mixture, name, "attention", bank.params(layer.width, heads)

    def prove(self, model: nn.Module, layer: DecoderLayer) -> None:
        proof.keys(model, layer)

    def attention(self, owner, query: Tensor, scaling: float) -> Tensor:
        """What the banks add to the attention's output [B, L, H, hd]; query [B, H, L, hd]."""
        total = None
        for mixture, name, bank in self.entries:
            weights = None
            if mixture.routed:
                places = [[mixture.column(name, "attention", i) for i in range(bank.n)]]
                weights = columns(owner.live.routings[mixture.name].weights, places)[:, 0]
                weights = weights.unflatten(0, (query.shape[0], -1))
            p = owner.tensor(mixture, name, "attention")
            delta = bank.forward(
                p, query, lambda e: self._keys_values(owner, e, query.dtype), scaling, weights
            )
            total = delta if total is None else total + delta
        return total

    def _keys_values(self, owner, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Frozen keys and values of a parameter x [N, d]; kept while a KV cache is continued, as decoding
        asks for each token."""
        layer = owner.layer
        if torch.is_grad_enabled():
            return keys_values(layer, x.to(dtype))
        frozen = [
            base_of(getattr(p.parent, p.attribute)).weight for p in (layer.places["k"], layer.places["v"])
        ]
        if any(t.is_inference() for t in (x, *frozen)):  # they do not tell when they have changed
            return keys_values(layer, x.to(dtype))
        stamp = (dtype, *((t.data_ptr(), t._version) for t in (x, *frozen)))
        if not owner.context.continues or self.kept.get(id(x), (None,))[0] != stamp:
            self.kept[id(x)] = (stamp, keys_values(layer, x.to(dtype)))
        return self.kept[id(x)][1]
