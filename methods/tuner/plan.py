"""What one adapter does in one decoder layer, worked out once: its seams, and the tensors that they
declare."""

from __future__ import annotations

from ..catalog import Method
from ..params import Param
from . import seams
from .architecture import DecoderLayer
from .seams import Entry, tensor_name


class Plan:
    """The seams of one adapter in one layer. Raises ConfigError where it does not fit the layer."""

    def __init__(self, method: Method, layer: DecoderLayer) -> None:
        self.mixtures = method.mixtures
        entries = [Entry(m, name, bank) for m in method.mixtures for name, bank in m.banks.items()]
        # In this order tensors are drawn, and `around` comes after what it runs around.
        kinds = sorted({entry.bank.seam for entry in entries}, reverse=True)
        self.seams = [
            seams.of_kind(kind)(layer, [e for e in entries if e.bank.seam == kind]) for kind in kinds
        ]
        self.linears = {a: [s for s in self.seams if a in s.linears] for s in self.seams for a in s.linears}
        self.feed_forward = [s for s in self.seams if s.wraps_feed_forward]
        self.attention = [s for s in self.seams if s.adds_to_attention]

    def declared(self, layer: DecoderLayer) -> dict[str, Param]:
        """Every tensor of this adapter in this layer, by name."""
        tensors: dict[str, Param] = {}
        found = [entry for seam in self.seams for entry in seam.declared(layer)]
        for mixture in self.mixtures:
            if mixture.routed and mixture.site != "linear":
                params = mixture.router.params(layer.width, len(mixture.expert_names))
                found.append((mixture, "router", mixture.site, params))
        for mixture, part, place, params in found:
            tensors.update({tensor_name(mixture, part, place, name): p for name, p in params.items()})
        return tensors
