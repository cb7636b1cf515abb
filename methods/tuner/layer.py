"""One decoder layer with its mixtures: which tensors it owns, and how a forward pass runs through them.

The layer's linears and feed-forward block are wrapped (wrappers.py); the wrappers own nothing and ask the
`MixtureLayer`, which holds the tensors of every adapter and hands the work to the seams of the active one
(seams/). What a layer decides during a pass (a block's routing, outputs of linears that share an input) lives
in `self.live` from the start of its attention to the layer's end and nowhere else.

Shapes: B sequences, L positions, T = B L tokens, d width, G decisions a token at one place, E experts.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from moabench.kernels import backend, lowrank

from ..catalog import Method, Mixture
from ..params import Param
from ..recorder import Context
from ..router import decide
from ..routing import Routing
from ..spec import ConfigError
from .architecture import DecoderLayer, base_of
from .deciding import sequence_decision, shared_decision
from .plan import Plan
from .seams import tensor_name
from .wrappers import RoutedFeedForward, RoutedLinear


@dataclass
class Live:
    """What belongs to one forward pass of one layer. routings: of block routers, by mixture; shared: outputs
    of linears that run together, until they are asked for, by group (seams/low_rank.py)."""

    context: Context
    plan: Plan
    routings: dict[str, Routing] = field(default_factory=dict)
    shared: dict[str, Any] = field(default_factory=dict)


class Tensors(nn.Module):
    """The tensors of one adapter in one layer, by name: parameters, and the buffers that only rules
    change."""

    def __init__(self, declared: dict[str, Param], device: torch.device) -> None:
        super().__init__()
        self.no_weight_decay = {n for n, param in declared.items() if not param.decay}
        """Names of tensors that weight decay leaves alone. (Not an attribute of the parameters: who loads a
        model without memory makes new ones from the attributes of the old.)"""
        made = {name: param.make(device) for name, param in declared.items()}
        for name, tensor in sorted(made.items()):
            trained = declared[name].trained
            self.register_parameter(name, tensor) if trained else self.register_buffer(name, tensor)

    @property
    def all(self) -> dict[str, Tensor]:
        """Every tensor by name, as it is now."""
        return self._parameters if not self._buffers else self._parameters | self._buffers


class MixtureLayer(nn.Module, BaseTunerLayer):
    """The mixtures of one decoder layer, for all adapters. `tensors` holds the trained parameters, by
    adapter, then by name."""

    adapter_layer_names = ("tensors",)
    other_param_names = ()

    def __init__(self, layer: DecoderLayer) -> None:
        nn.Module.__init__(self)
        self.layer = layer
        self.tensors = nn.ModuleDict()
        self.plans: dict[str, Plan] = {}
        self.live: Live | None = None
        self._raw: Tensor | None = None
        self._names: dict[tuple, list[tuple[str, str]]] = {}
        self._disable_adapters = False
        self._active_adapter: str | list[str] = []
        self.merged_adapters: list[str] = []
        self.pending: Context | None = None
        """Of the pass of the whole model that is going on."""
        self._given: Context | None = None
        self._hooks = [
            layer.module.register_forward_pre_hook(self._see_context, with_kwargs=True),
            layer.attention.register_forward_pre_hook(self._begin, with_kwargs=True),
            layer.module.register_forward_hook(self._end, always_call=True),
        ]
        if layer.entry_norm is not None:
            self._hooks.append(layer.entry_norm.register_forward_pre_hook(self._see_raw))
        layer.attention._mixture = (self,)  # in a tuple, so that torch does not take it for a submodule

    def add(self, adapter: str, method: Method) -> None:
        """Create the tensors of one more adapter and wrap what it attaches to."""
        plan = Plan(method, self.layer)
        device = next(self.layer.module.parameters()).device
        self.tensors[adapter] = Tensors(plan.declared(self.layer), device)
        self.plans[adapter] = plan
        for place in self.layer.places.values():
            there = getattr(place.parent, place.attribute)
            if place.attribute in plan.linears and not isinstance(there, RoutedLinear):
                setattr(place.parent, place.attribute, RoutedLinear(place.linear, self, place.attribute))
        if plan.feed_forward and not isinstance(self.layer.feed_forward, RoutedFeedForward):
            wrapper = RoutedFeedForward(self.layer.feed_forward, self)
            setattr(self.layer.module, self.layer.feed_forward_name, wrapper)

    def forget(self, adapter: str) -> None:
        """Drop what is known of an adapter whose tensors PEFT has deleted; the wrappers stay and pass
        through."""
        self.plans.pop(adapter, None)
        self._names.clear()

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        """PEFT asks for this after loading; its own looks for one base layer, and there is a whole decoder
        layer."""
        self.tensors[adapter_name].to(device or next(self.layer.module.parameters()).device)

    def detach(self) -> None:
        """Take wrappers and hooks off the layer: what is left is the base's own."""
        for place in self.layer.places.values():
            setattr(place.parent, place.attribute, place.linear)
        if self.layer.feed_forward_name:
            setattr(self.layer.module, self.layer.feed_forward_name, base_of(self.layer.feed_forward))
        for handle in self._hooks:
            handle.remove()
        del self.layer.attention._mixture, self.layer.module.mixture

    @property
    def plan(self) -> Plan | None:
        """The active adapter's plan, None while adapters are disabled."""
        active = self.active_adapters
        return None if self._disable_adapters or not active else self.plans.get(active[0])

    def tensor(self, mixture: Mixture, part: str, place: str) -> dict[str, Tensor]:
        """Tensors of one router or bank at one place of the active adapter, by their own names."""
        prefix = tensor_name(mixture, part, place, "")
        key = (self.active_adapters[0], prefix)
        if key not in self._names:
            self._names[key] = [(name[len(prefix) :], name) for name in self.owned if name.startswith(prefix)]
        owned = self.owned
        return {short: owned[name] for short, name in self._names[key]}

    @property
    def owned(self) -> dict[str, Tensor]:
        """Every tensor of the active adapter in this layer, by name."""
        return self.tensors[self.active_adapters[0]].all

    def site_names(self, mixture: Mixture, place: str, decisions: int = 1) -> tuple[str, ...]:
        """Names of the routed sites at one place, e.g. `model.layers.0.q`, numbered where a token has several
        decisions there (`model.layers.0.k0`, ...); a further mixture adds its own name."""
        extra = "" if mixture.name == "main" else f".{mixture.name}"
        name = f"{self.layer.name}{extra}.{place}"
        return (name,) if decisions == 1 else tuple(f"{name}{g}" for g in range(decisions))

    # A forward pass. Its hooks sit on the layer's children: checkpointing recomputes a layer's `forward`
    # without the layer's own hooks.

    def _see_raw(self, module, args):
        self._raw = args[0]
        if (carried := getattr(args[0], "_mixture_context", None)) is not None:
            self._given = carried()

    def _see_context(self, module, args, kwargs):
        self._given = kwargs.get("mixture_context") or self.pending
        if self._given is not None:
            # A recomputed layer is called without its hooks, with the same tensors: they know the pass.
            # Weakly, since the context holds what was computed from them.
            (args[0] if args else kwargs["hidden_states"])._mixture_context = weakref.ref(self._given)

    def _begin(self, module, args, kwargs):
        context = self._context(kwargs.pop("mixture_context", None))
        plan, raw, self._raw = self.plan, self._raw, None
        self.live = None if plan is None else Live(context, plan)
        hidden = args[0] if args else kwargs["hidden_states"]
        for mixture in plan.mixtures if plan is not None else ():
            if mixture.site == "block" and mixture.routed:
                reads = hidden if mixture.input == "normed" or raw is None else raw
                routing = self.route(mixture, "block", reads.unsqueeze(-2))
                self.live.routings[mixture.name] = routing.at_site(0)
        return args, kwargs

    def _context(self, handed: Context | None) -> Context:
        """The pass's context, by the first that carries it: the attention's keyword arguments, the layer's
        (some architectures hand none to their attention), the pass that is going on. Raises ConfigError where
        a checkpointed layer is recomputed after its pass, and none does."""
        found, self._given = handed or self._given or self.pending, None
        if found is None and self.training and getattr(self.layer.module, "gradient_checkpointing", False):
            raise ConfigError(
                f"{type(self.layer.module).__name__}: gradient checkpointing recomputes this layer without "
                "the keyword arguments of its pass, so that routers would miss padding, prompts and the "
                "recorder; expected train.gradient_checkpointing=false for this architecture."
            )
        return found or Context()

    def _end(self, module, args, output):
        self.live = None

    def route(self, mixture: Mixture, place: str, hidden: Tensor) -> Routing:
        """Routing [T, G, E] of the router at one place, which reads hidden [B, L, G, d]: recorded, and as its
        experts are given it."""
        router, p, (length, decisions) = (
            mixture.router,
            self.tensor(mixture, "router", place),
            hidden.shape[1:3],
        )
        buffers = {name: t for name, t in p.items() if not isinstance(t, nn.Parameter)}
        if router.reads_skills(self.training) and self.context.skill_ids is not None:
            buffers["labels"] = self.context.skill_ids.unsqueeze(-1).expand(-1, decisions)

        def made(x: Tensor) -> Routing:
            q = {name: t.to(x.dtype) for name, t in p.items()}
            return decide(router, router.scores(q, x), self.training, buffers)

        with (
            torch.autocast(hidden.device.type, enabled=False)
            if backend.autocasting(hidden)
            else nullcontext()
        ):
            if router.reads_facts:
                routing = shared_decision(router, len(mixture.expert_names), self.context)
                routing = routing.map(lambda t: t.unsqueeze(1).expand(-1, decisions, *t.shape[1:]))
            elif router.granularity == "token":
                routing = made(hidden.flatten(0, 1).to(lowrank.full_precision(hidden.dtype)))
            else:
                name = self.site_names(mixture, place)[0]
                routing = sequence_decision(router, name, hidden, self.context, made).per_token(length)
        return self.decided(mixture, [place], routing, decisions)

    def decided(self, mixture: Mixture, places: list[str], routing: Routing, decisions: int = 1) -> Routing:
        """A routing [T, G, E] of `places`, or of the `decisions` at the only one: handed to the open
        recorder, and changed where the pass asks for it (../effects.py)."""
        context = self.context
        if context.recorder is None and not context.changes:
            return routing
        names = [name for place in places for name in self.site_names(mixture, place, decisions)]
        if context.recorder is not None:
            routing.experts = mixture.expert_names
            context.record(tuple(names), routing, mixture.losses)
        changes = [context.changes.get(name) for name in names]
        if not any(changes):
            return routing
        sites = [routing.at_site(g) for g in range(len(names))]
        return stacked([r if change is None else change(r) for r, change in zip(sites, changes, strict=True)])

    @contextmanager
    def within(self, context: Context) -> Iterator[None]:
        """Modules of this layer called inside run as in a pass with this context."""
        self.live = Live(context, self.plan)
        try:
            yield
        finally:
            self.live = None

    @property
    def context(self) -> Context:
        return self.live.context if self.live is not None else Context()

    @property
    def _running(self) -> Plan | None:
        """The plan of the pass, or the active one for a module called on its own."""
        return self.live.plan if self.live is not None else self.plan

    def linear(self, linear: nn.Module, attribute: str, x: Tensor) -> Tensor:
        """Output [..., b] of one wrapped linear: each seam runs around those before it."""
        plan, run = self._running, linear
        for seam in plan.linears.get(attribute, ()) if plan is not None else ():
            run = partial(seam.linear, self, attribute, inner=run)
        return run(x)

    def feed_forward(self, block: nn.Module, x: Tensor) -> Tensor:
        """Output [B, L, d] of the feed-forward block with the banks that sit there."""
        plan = self._running
        return plan.feed_forward[0].feed_forward(self, block, x) if plan and plan.feed_forward else block(x)

    def attention(self, query: Tensor, scaling: float) -> Tensor | None:
        """What the banks inside attention add to its output [B, L, H, hd], or None; query [B, H, L, hd]."""
        seams = self.live.plan.attention if self.live is not None else ()
        return seams[0].attention(self, query, scaling) if seams else None


def stacked(sites: list[Routing]) -> Routing:
    """Weights and choices of G sites [T, E] as one [T, G, E]; a changed routing has no more than these."""
    chosen = [r.selected for r in sites]
    return Routing(torch.stack([r.weights for r in sites], 1), torch.stack(chosen, 1))
