"""One decoder layer with its mixtures: which tensors it owns, and how a forward pass runs through them.

The layer's linears and feed-forward block are wrapped; the wrappers own nothing and ask the `MixtureLayer`,
which holds the trained tensors of every adapter. What a layer decides during a pass (a block's routing,
outputs of linears that share an input) lives in `self.live` from the start of its attention to the layer's
end and nowhere else.

Shapes: B sequences, L positions, T = B L tokens, d width, G linears that share one input, E experts, R rank
rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from moabench.kernels import backend, grouped, lowrank

from ..bank import Experts
from ..catalog import Method, Mixture
from ..recorder import Context
from ..router import FactRouter, LinearRouter, Router, decide
from ..routing import Routing
from ..spec import ConfigError
from .architecture import DecoderLayer, FeedForward, base_of, drop, keys_values, owned, project
from .plan import Group, Plan, Term, tensor_name


@dataclass
class Live:
    """What belongs to one forward pass of one layer."""

    context: Context
    plan: Plan
    routings: dict[str, Routing] = field(default_factory=dict)  # of block routers, by mixture
    pending: dict[int, tuple[Tensor, dict[str, Tensor]]] = field(
        default_factory=dict
    )  # outputs waiting for their linear, by group


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
        self._kept_keys: dict[int, tuple[tuple, tuple[Tensor, Tensor]]] = {}
        self._constants: dict[tuple, dict[str, Tensor]] = {}
        self._names: dict[tuple, list[tuple[str, str]]] = {}
        self._disable_adapters = False
        self._active_adapter: str | list[str] = []
        self.merged_adapters: list[str] = []
        self._hooks = [
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
        self.tensors[adapter] = nn.ParameterDict(
            {name: p.make(device) for name, p in plan.declared(self.layer).items()}
        )
        self.plans[adapter] = plan
        for place in (p for group in plan.groups for p in group.places):
            if not isinstance(getattr(place.parent, place.attribute), RoutedLinear):
                setattr(place.parent, place.attribute, RoutedLinear(place.linear, self, place.attribute))
        if plan.feed_forward and not isinstance(self.layer.feed_forward, RoutedFeedForward):
            wrapper = RoutedFeedForward(self.layer.feed_forward, self)
            setattr(self.layer.module, self.layer.feed_forward_name, wrapper)

    def forget(self, adapter: str) -> None:
        """Drop what is known of an adapter whose tensors PEFT has deleted; the wrappers stay and pass
        through."""
        self.plans.pop(adapter, None)
        for kept in (self._names, self._constants, self._kept_keys):
            kept.clear()

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
        return self.tensors[self.active_adapters[0]]._parameters

    def site_name(self, mixture: Mixture, place: str) -> str:
        """Name of a routed site, e.g. `model.layers.0.q`; a further mixture adds its own name."""
        extra = "" if mixture.name == "main" else f".{mixture.name}"
        return f"{self.layer.name}{extra}.{place}"

    # A forward pass. Its hooks sit on the layer's children: checkpointing recomputes a layer's `forward`
    # without the layer's own hooks.

    def _see_raw(self, module, args):
        self._raw = args[0]

    def _begin(self, module, args, kwargs):
        context = kwargs.pop("mixture_context", None) or Context()
        plan, raw, self._raw = self.plan, self._raw, None
        self.live = None if plan is None else Live(context, plan)
        hidden = args[0] if args else kwargs["hidden_states"]
        for mixture in plan.mixtures if plan is not None else ():
            if mixture.site == "block" and mixture.routed:
                reads = hidden if mixture.input == "normed" or raw is None else raw
                self.live.routings[mixture.name] = self._route(mixture, "block", reads)
        return args, kwargs

    def _end(self, module, args, output):
        self.live = None

    def _route(self, mixture: Mixture, place: str, hidden: Tensor) -> Routing:
        """Routing over T tokens of one block or feed-forward router that reads hidden [B, L, d]."""
        router, p = mixture.router, self.tensor(mixture, "router", place)

        def made(x: Tensor) -> Routing:
            q = {k: t.to(x.dtype) for k, t in p.items()}
            return decide(router, scores_of(router, q, x), self.training)

        with (
            torch.autocast(hidden.device.type, enabled=False)
            if backend.autocasting(hidden)
            else nullcontext()
        ):
            if isinstance(router, FactRouter):
                routing = shared_decision(router, len(mixture.expert_names), self.context)
            elif router.granularity == "token":
                routing = made(hidden.flatten(0, -2).to(lowrank.full_precision(hidden.dtype)))
            else:
                name = self.site_name(mixture, place)
                routing = sequence_decision(router, name, hidden, self.context, made).per_token(
                    hidden.shape[1]
                )
        if self.context.recorder is not None:
            self._record(mixture, [place], routing.map(lambda t: t.unsqueeze(1)))
        change = self.context.changes.get(self.site_name(mixture, place)) if self.context.changes else None
        return routing if change is None else change(routing)

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

    def linear(self, linear: nn.Module, attribute: str, x: Tensor) -> Tensor:
        """Output [..., b] of one wrapped linear; the linears that share x run together when the first of them
        is asked for."""
        plan = self.live.plan if self.live is not None else self.plan
        index = plan.group_of.get(attribute) if plan is not None else None
        if index is None:
            return linear(x)
        group, shape = plan.groups[index], (*x.shape[:-1], -1)
        if self.live is None:  # a linear called on its own, outside its layer
            return self._run(group, x)[attribute].view(shape)
        waiting, outputs = self.live.pending.get(index, (None, {}))
        if waiting is not x or attribute not in outputs:
            outputs = self._run(group, x)
            self.live.pending[index] = (x, outputs)
        y = outputs.pop(attribute)
        if not outputs:
            del self.live.pending[index]
        return y.view(shape)

    def _run(self, group: Group, x: Tensor) -> dict[str, Tensor]:
        """Outputs [T, b] of the linears of one group, by attribute."""
        flat = x.reshape(-1, x.shape[-1])
        dropout = group.dropout if self.training else 0.0
        sorts = tuple(
            [not self.context.changes and term.sorts(flat.device, flat.dtype) for term in group.terms]
        )
        pack = group.pack(self.owned, flat.dtype, sorts, self.context.continues)
        linears = [parent._modules[name]._modules["base_layer"] for parent, name in group.linears]
        dropped = drop(flat, dropout)
        ys, s, z = project(linears, flat, pack.a, pack.heads, dropped)
        pieces = s.split_with_sizes(pack.sizes, -1) if len(pack.sizes) > 1 else (s,)
        scores = iter(z.split_with_sizes(pack.head_sizes, -1) if len(pack.head_sizes) > 1 else (z,))
        pairs: dict[str, list] = {name: [] for name in group.attributes}
        by_expert: list[tuple[str, grouped.Shrunk, int, Tensor, slice]] = []
        for term, piece, b, bias, a in zip(
            group.terms, pieces, pack.b, pack.biases, pack.sorted_a, strict=True
        ):
            weights = None
            if term.apart:
                weights = self._route_apart(term, x)
            elif term.own_router:
                routing = self._route_linears(term, next(scores), bias)
                weights = routing.weights
            elif term.mixture.routed:
                weights = columns(self.live.routings[term.mixture.name].weights, term.columns)
            if a is not None:
                shrunk = grouped.shrink(
                    flat if dropped is None else dropped, a, weights, routing.ids, term.bank.scales[0]
                )
                by_expert += [
                    (place.attribute, shrunk, g, b[g], place.columns) for g, place in enumerate(term.places)
                ]
                continue
            mixed = term.bank.mix(
                piece.view(-1, len(term.places), term.rows), weights, self._constants_of(term.bank, x.device)
            )
            for place, m, b_matrix in zip(term.places, mixed.unbind(1), b, strict=True):
                pairs[place.attribute].append((m, b_matrix, place.columns) if place.fused else (m, b_matrix))
        ys = {
            name: lowrank.expand_add_(y, pairs[name]) if pairs[name] else y
            for name, y in zip(group.attributes, ys, strict=True)
        }
        for name, *update in by_expert:
            ys[name] = grouped.expand_add_(ys[name], *update)
        return ys

    def _route_linears(self, term: Term, scores: Tensor, bias: Tensor | None) -> Routing:
        """Routing [T, G, E] of the G routers of one term from their scores [T, G H] before the bias [G H], as
        the experts are given it."""
        if bias is not None:
            scores = scores + bias
        by_site = scores.view(scores.shape[0], len(term.places), -1)
        routing = decide(term.mixture.router, by_site, self.training)
        self._record(term.mixture, [p.role for p in term.places], routing)
        if not self.context.changes:
            return routing
        changes = [
            self.context.changes.get(self.site_name(term.mixture, p.role), lambda r: r) for p in term.places
        ]
        return Routing(
            torch.stack([change(routing.at_site(g)).weights for g, change in enumerate(changes)], 1)
        )

    def _record(self, mixture: Mixture, places: list[str], routing: Routing) -> None:
        """Hand a routing [T, G, E] of G places to the open recorder."""
        if self.context.recorder is not None:
            routing.experts = mixture.expert_names
            self.context.record(
                tuple(self.site_name(mixture, place) for place in places), routing, mixture.losses
            )

    def _route_apart(self, term: Term, x: Tensor) -> Tensor:
        """Weights [T, G, E] of routers that are no linear map of the token."""
        return torch.stack([self._route(term.mixture, place.role, x).weights for place in term.places], 1)

    def feed_forward(self, block: nn.Module, x: Tensor) -> Tensor:
        """Output [B, L, d] of the feed-forward block with the banks that sit there."""
        plan = self.live.plan if self.live is not None else self.plan
        if plan is None or not plan.feed_forward:
            return block(x)
        flat, y, routings = x.flatten(0, -2), None, {}
        for mixture, name, bank in plan.feed_forward:
            routing = None
            if mixture.routed and mixture.site == "ffn":
                if mixture.name not in routings:
                    routings[mixture.name] = self._route(mixture, "ffn", x)
                routing = bank_routing(routings[mixture.name], mixture, name, bank)
            elif mixture.routed:
                routing = bank_routing(self.live.routings[mixture.name], mixture, name, bank)
            if y is None and not bank.replaces:
                y = owned(
                    self.layer.places["down"].linear, block(x).flatten(0, -2)
                )  # a block ends in its down projection
            y = bank.forward(
                self.tensor(mixture, name, "ffn"), flat, y, FeedForward(self.layer), routing, self.training
            )
        return y.unflatten(0, x.shape[:-1])

    def attention(self, query: Tensor, scaling: float) -> Tensor | None:
        """What the banks inside attention add to its output [B, L, H, hd], or None; query [B, H, L, hd]."""
        total = None
        for mixture, name, bank in self.live.plan.attention if self.live is not None else ():
            weights = None
            if mixture.routed:
                places = [[mixture.column(name, "attention", i) for i in range(bank.n)]]
                weights = columns(self.live.routings[mixture.name].weights, places)[:, 0].unflatten(
                    0, (query.shape[0], -1)
                )
            p = self.tensor(mixture, name, "attention")
            delta = bank.forward(p, query, lambda e: self._keys_values(e, query.dtype), scaling, weights)
            total = delta if total is None else total + delta
        return total

    def _keys_values(self, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Frozen keys and values of a parameter x [N, d]; kept while a KV cache is continued, as decoding
        asks for each token."""
        if torch.is_grad_enabled():
            return keys_values(self.layer, x.to(dtype))
        frozen = [
            base_of(getattr(p.parent, p.attribute)).weight
            for p in (self.layer.places["k"], self.layer.places["v"])
        ]
        stamp = (dtype, *((t.data_ptr(), t._version) for t in (x, *frozen)))
        if not self.context.continues or self._kept_keys.get(id(x), (None,))[0] != stamp:
            self._kept_keys[id(x)] = (stamp, keys_values(self.layer, x.to(dtype)))
        return self._kept_keys[id(x)][1]

    def _constants_of(self, bank: Experts, device: torch.device) -> dict[str, Tensor]:
        key = (bank, device)
        if key not in self._constants:
            self._constants[key] = {
                name: torch.tensor(values, device=device) for name, values in bank.constants().items()
            }
        return self._constants[key]


def scores_of(router: Router, p: dict[str, Tensor], x: Tensor) -> Tensor:
    """Router outputs [T, H] of x [T, d]."""
    return (
        nn.functional.linear(x, *router.heads(p)) if isinstance(router, LinearRouter) else router.scores(p, x)
    )


def columns(weights: Tensor, places: list[list[int]]) -> Tensor:
    """weights [T, n] -> [T, G, E]: the router output of each expert, by slices and broadcasts, since indexing
    scatters in backward."""
    flat = [c for row in places for c in row]
    if len(set(flat)) == 1:
        picked = weights.narrow(1, flat[0], 1).expand(-1, len(flat))
    elif flat == list(range(flat[0], flat[0] + len(flat))):
        picked = weights.narrow(1, flat[0], len(flat))
    else:
        parts = weights.unbind(-1)
        picked = torch.stack([parts[c] for c in flat], -1)
    return picked.unflatten(-1, (len(places), -1)) if len(places) > 1 else picked.unsqueeze(1)


def bank_routing(routing: Routing, mixture: Mixture, name: str, bank: Experts) -> Routing:
    """The part of a routing that concerns one bank at the feed-forward block."""
    places = [[mixture.column(name, "ffn", i) for i in range(bank.n)]]
    if places[0] == list(range(routing.weights.shape[-1])):
        return routing
    return Routing(weights=columns(routing.weights, places)[:, 0])


def sequence_decision(router, name: str, hidden: Tensor, context: Context, decide) -> Routing:
    """One decision a sequence [B, E], made from the pooled prompt at the prefill and kept beside the cache
    while decoding."""
    if context.continues:
        if router.pool == "official_mean":
            raise ConfigError(
                "router.pool='official_mean': expected prompt_mean or last_prompt with a KV cache, "
                "since it reads future tokens."
            )
        if name not in context.gates:
            raise ConfigError(
                f"{name}: the KV cache holds no decision of this router; start the generation with "
                "this adapter active."
            )
        return context.gates[name]
    prompt = context.prompt_tokens
    if prompt is None:
        prompt = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
    x = hidden.to(lowrank.full_precision(hidden.dtype))
    if router.pool == "official_mean":
        pooled = x.mean(1)
    elif router.pool == "last_prompt":
        last = (prompt * torch.arange(1, x.shape[1] + 1, device=x.device)).amax(1).clamp(min=1) - 1
        pooled = x[torch.arange(x.shape[0], device=x.device), last]
    else:
        pooled = (x * prompt.unsqueeze(-1)).sum(1) / prompt.sum(1, keepdim=True).clamp(min=1)
    routing = decide(pooled)
    context.gates[name] = routing
    return routing


def shared_decision(router: FactRouter, experts: int, context: Context) -> Routing:
    """One decision for all sites of a pass, [B L, E], from the facts of the batch; its sequence part is kept
    beside the cache."""
    name = f"{router}/{experts}"
    if name not in context.shared:
        if not context.shape[0]:
            raise ConfigError(
                f"router.kind={router.kind}: expected a pass of the whole model, since it routes by "
                "facts of the batch."
            )
        found = router.decide(context, experts)
        if found is None and name not in context.gates:
            raise ConfigError(
                f"router.kind={router.kind}: the KV cache holds no decision of it; start the "
                "generation with this adapter."
            )
        kept = context.gates[name] = found if found is not None else context.gates[name]
        context.shared[name] = router.spread(kept, context)
    return context.shared[name]


class _Wrapper(nn.Module):
    """A frozen module under its mixture; other attributes are the module's own."""

    def __init__(self, base_layer: nn.Module, layer: MixtureLayer) -> None:
        super().__init__()
        self.base_layer = base_of(base_layer)
        self._layer = (layer,)

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)


class RoutedLinear(_Wrapper):
    """A frozen linear whose output the layer's mixtures add to."""

    def __init__(self, base_layer: nn.Module, layer: MixtureLayer, attribute: str) -> None:
        super().__init__(base_layer, layer)
        self._attribute = attribute

    def forward(self, x: Tensor) -> Tensor:
        return self._layer[0].linear(self._modules["base_layer"], self._attribute, x)


class RoutedFeedForward(_Wrapper):
    """A frozen feed-forward block with experts beside or inside it."""

    def forward(self, x: Tensor) -> Tensor:
        return self._layer[0].feed_forward(self.base_layer, x)
