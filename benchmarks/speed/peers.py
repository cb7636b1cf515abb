"""An attached mixture run the way other code runs it: a copy of the base whose linears and feed-forward
blocks hold the same tensors and take the same routing decisions, in one of the forms of `forms`.

Made for the methods whose routers are linear maps of the token (MoLoRA, top-k, AdaMoLE, HydraLoRA) and for
MixLoRA.
"""

from __future__ import annotations

import copy

from torch import Tensor, nn
from torch.nn import functional as F

from moabench.kernels import lowrank
from moabench.methods import Router
from moabench.methods.routing import Routing
from moabench.methods.tuner.architecture import DecoderLayer, decoder_layers
from moabench.methods.tuner.sites import Site, layer_sites

from . import published_forms as forms


class _Peer(nn.Module):
    """Copies of a site's trained tensors, kept in fp32 or wider as ours are."""

    def __init__(self, site: Site, form) -> None:
        super().__init__()
        self.router: Router | None = site.router
        self.form = form
        self.scale = _scale(site)
        self.own = nn.ParameterDict(
            {f"bank_{k}": nn.Parameter(t.detach().clone()) for k, t in site.banks[0].tensors.items()}
        )
        self.own.update({f"router_{k}": nn.Parameter(t.detach().clone()) for k, t in site.tensors.items()})

    def part(self, prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): t for k, t in self.own.items() if k.startswith(prefix)}

    def route(self, x: Tensor) -> Routing:
        if self.router is None:
            return Routing(weights=x.new_ones(x.shape[0], 1))
        full = lowrank.full_precision(x.dtype)
        weight, bias = self.router.heads(self.part("router_"))
        return self.router.route(
            F.linear(x.to(full), weight.to(full), None if bias is None else bias.to(full)), self.training
        )


class PeerLinear(_Peer):
    """A frozen linear plus its experts."""

    def __init__(self, linear: nn.Linear, site: Site, form) -> None:
        super().__init__(site, form)
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, -2)
        delta = self.form(flat, self.own["bank_A"], self.own["bank_B"], self.route(flat), self.scale)
        return self.linear(x) + delta.view(*x.shape[:-1], -1)


class PeerFeedForward(_Peer):
    """A feed-forward block of experts that share its frozen weights."""

    def __init__(self, block: nn.Module, site: Site, form) -> None:
        super().__init__(site, form)
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        frozen = {n: getattr(self.block, f"{n}_proj").weight for n in ("gate", "up", "down")}
        flat = x.flatten(0, -2)
        return self.form(flat, self.part("bank_"), frozen, self.route(flat), self.scale).view(x.shape)


def peer(attached: nn.Module, base: nn.Module, form: str) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    """A copy of `base` with the mixtures of `attached` in the given form, and the pairs of a trained tensor
    of `attached` and its copy.

    form: one of forms.FORMS for linears, of forms.FFN_FORMS for feed-forward blocks (whose attention LoRA
    then runs as `loop`).
    """
    model, pairs = copy.deepcopy(base), []
    for layer, (name, module) in zip(
        attached.base_model.mixture_layers(), decoder_layers(model).items(), strict=True
    ):
        described = DecoderLayer(name, module, model.config)
        for site in layer_sites(layer):
            if site.kind == "ffn":
                made = PeerFeedForward(described.feed_forward, site, forms.FFN_FORMS[form])
                setattr(module, described.feed_forward_name, made)
            else:
                place = described.places[site.banks[0].place]
                made = PeerLinear(
                    place.linear,
                    site,
                    forms.FORMS[form] if site.router is not None and form in forms.FORMS else forms.loop,
                )
                setattr(place.parent, place.attribute, made)
            pairs += [(t, made.own[f"bank_{k}"]) for k, t in site.banks[0].tensors.items()]
            pairs += [(t, made.own[f"router_{k}"]) for k, t in site.tensors.items()]
    return model, pairs


def _scale(site: Site) -> float:
    part = site.banks[0].part
    return float(part.scale if hasattr(part, "scale") else part.scales[0])
