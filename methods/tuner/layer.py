"""One decoder layer with its mixtures: which tensors it owns, and how a forward pass runs through them.

The layer's linears and feed-forward block are wrapped; the wrappers own nothing and ask the `MixtureLayer`, which holds the trained
tensors of every adapter. What a layer decides during a pass (a block's routing, outputs of linears that share an input) lives in
`self.live` from the layer's pre-hook to its post-hook and nowhere else.

Shapes: B sequences, L positions, T = B L tokens, d width, G linears that share one input, E experts, R rank rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..bank import AttentionExperts, Experts, FeedForwardExperts, LinearExperts
from ..catalog import Method, Mixture
from ..params import Param
from ..recorder import Context
from ..router import LinearRouter
from ..routing import Routing
from ..spec import ConfigError
from .architecture import INPUTS, DecoderLayer, FeedForward, Place, base_of, frozen_linears, keys_values, project


@dataclass
class Live:
    """What belongs to one forward pass of one layer."""

    context: Context
    routings: dict[str, Routing] = field(default_factory=dict)  # of block routers, by mixture
    pending: dict[int, tuple[Tensor, dict[int, Tensor]]] = field(default_factory=dict)  # outputs waiting for their linear, by group


@dataclass
class Term:
    """The experts of one bank on the linears that share one input."""

    mixture: Mixture
    name: str
    bank: LinearExperts
    places: list[Place]

    @property
    def own_router(self) -> bool:
        return self.mixture.site == "linear" and self.mixture.routed

    @property
    def columns(self) -> list[list[int]]:
        """Block-router output of each expert, [G][E]."""
        return [[self.mixture.column(self.name, p.role, i) for i in range(self.bank.n)] for p in self.places]


class Plan:
    """What one adapter does in one layer: the terms of each group of linears, and the banks at the feed-forward block and attention."""

    def __init__(self, method: Method, layer: DecoderLayer) -> None:
        self.mixtures = method.mixtures
        banks = [(m, name, bank) for m in method.mixtures for name, bank in m.banks.items()]
        layer.require({r for _, _, b in banks if isinstance(b, LinearExperts) for r in b.targets})
        if any(isinstance(b, FeedForwardExperts) for _, _, b in banks):
            layer.require(("gate", "up", "down"))
        if any(isinstance(b, AttentionExperts) for _, _, b in banks):
            layer.require(("q", "k", "v"))
        self.groups: list[list[Term]] = []
        for roles in INPUTS:
            terms = []
            for mixture, name, bank in banks:
                if isinstance(bank, LinearExperts) and (found := [layer.places[r] for r in roles if r in bank.targets]):
                    terms.append(Term(mixture, name, bank, found))
            if terms:
                if len({t.bank.dropout for t in terms}) > 1:
                    raise ConfigError(f"dropout={[t.bank.dropout for t in terms]}: expected one value on {', '.join(roles)}.")
                self.groups.append(terms)
        self.feed_forward = [(m, n, b) for m, n, b in banks if isinstance(b, FeedForwardExperts)]
        self.attention = [(m, n, b) for m, n, b in banks if isinstance(b, AttentionExperts)]
        self.feed_forward.sort(key=lambda entry: not entry[2].replaces)
        if sum(b.replaces for *_, b in self.feed_forward) > 1:
            raise ConfigError("experts: expected at most one bank that runs the whole feed-forward block.")
        self.group_of = {id(p.linear): g for g, terms in enumerate(self.groups) for t in terms for p in t.places}

    def declared(self, layer: DecoderLayer) -> dict[str, Param]:
        """Every tensor of this adapter in this layer by name, `<mixture>__<router or bank>__<place>__<tensor>`."""
        tensors: dict[str, Param] = {}

        def add(mixture: Mixture, part: str, place: str, params: dict[str, Param]) -> None:
            tensors.update({_key(mixture, part, place, name): p for name, p in params.items()})

        for terms in self.groups:
            for term in terms:
                for place in term.places:
                    add(term.mixture, term.name, place.role, term.bank.params(*place.shape))
                    if term.own_router:
                        add(term.mixture, "router", place.role, term.mixture.router.params(place.shape[0], term.bank.n))
        for mixture, name, bank in self.feed_forward:
            add(mixture, name, "ffn", bank.params(layer.width, layer.places["down"].shape[0]))
        for mixture, name, bank in self.attention:
            add(mixture, name, "attention", bank.params(layer.width, layer.places["q"].shape[1] // layer.attention.head_dim))
        for mixture in self.mixtures:
            if mixture.routed and mixture.site != "linear":
                add(mixture, "router", mixture.site, mixture.router.params(layer.width, len(mixture.expert_names)))
        return tensors


def _key(mixture: Mixture, part: str, place: str, tensor: str) -> str:
    return f"{mixture.name}__{part}__{place}__{tensor}"


class MixtureLayer(nn.Module, BaseTunerLayer):
    """The mixtures of one decoder layer, for all adapters. `tensors` holds the trained parameters, by adapter, then by name."""

    adapter_layer_names = ("tensors",)
    other_param_names = ()

    def __init__(self, layer: DecoderLayer) -> None:
        nn.Module.__init__(self)
        self.layer = layer
        self.tensors = nn.ModuleDict()
        self.plans: dict[str, Plan] = {}
        self.live: Live | None = None
        self._constants: dict[tuple, Tensor] = {}
        self._names: dict[tuple, list[tuple[str, str]]] = {}
        self._packed: dict[tuple, tuple[tuple, Tensor]] = {}
        self._disable_adapters = False
        self._active_adapter: str | list[str] = []
        self.merged_adapters: list[str] = []
        self._hooks = [
            layer.module.register_forward_pre_hook(self._begin, with_kwargs=True),
            layer.module.register_forward_hook(self._end, always_call=True),
            layer.attention.register_forward_pre_hook(self._before_attention, with_kwargs=True),
        ]
        layer.attention._mixture = (self,)  # in a tuple, so that torch does not take it for a submodule

    def add(self, adapter: str, method: Method) -> None:
        """Create the tensors of one more adapter and wrap what it attaches to."""
        plan = Plan(method, self.layer)
        device = next(self.layer.module.parameters()).device
        self.tensors[adapter] = nn.ParameterDict({name: p.make(device) for name, p in plan.declared(self.layer).items()})
        self.plans[adapter] = plan
        for terms in plan.groups:
            for term in terms:
                for place in term.places:
                    if not isinstance(getattr(place.parent, place.attribute), RoutedLinear):
                        setattr(place.parent, place.attribute, RoutedLinear(place.linear, self))
        if plan.feed_forward and not isinstance(self.layer.feed_forward, RoutedFeedForward):
            wrapper = RoutedFeedForward(self.layer.feed_forward, self)
            setattr(self.layer.module, self.layer.feed_forward_name, wrapper)

    def remove(self, adapter: str) -> None:
        """Forget one adapter; its wrappers stay and pass through."""
        if adapter in self.plans:
            del self.plans[adapter], self.tensors[adapter]
            self._names = {key: names for key, names in self._names.items() if key[0] != adapter}

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
        adapter = self.active_adapters[0]
        owned = self.tensors[adapter]._parameters
        key = (adapter, mixture.name, part, place)
        if key not in self._names:
            prefix = _key(mixture, part, place, "")
            self._names[key] = [(name[len(prefix) :], name) for name in owned if name.startswith(prefix)]
        return {short: owned[name] for short, name in self._names[key]}

    def site_name(self, mixture: Mixture, place: str) -> str:
        """Name of a routed site, e.g. `model.layers.0.q`; a further mixture adds its own name."""
        extra = "" if mixture.name == "main" else f".{mixture.name}"
        return f"{self.layer.name}{extra}.{place}"

    # A forward pass

    def _begin(self, module, args, kwargs):
        context = kwargs.pop("mixture_context", None) or Context()
        plan = self.plan
        if plan is None:
            return args, kwargs
        self.live = Live(context)
        hidden = args[0] if args else kwargs["hidden_states"]
        self._route_block(plan, "raw", hidden)
        return args, kwargs

    def _end(self, module, args, output):
        self.live = None

    def _before_attention(self, module, args, kwargs):
        if self.plan is not None and self.live is not None:
            self._route_block(self.plan, "normed", args[0] if args else kwargs["hidden_states"])

    def _route_block(self, plan: Plan, reads: str, hidden: Tensor) -> None:
        for mixture in plan.mixtures:
            if mixture.site == "block" and mixture.routed and mixture.input == reads:
                self.live.routings[mixture.name] = self._route(mixture, "block", hidden)

    def _route(self, mixture: Mixture, place: str, hidden: Tensor) -> Routing:
        """Routing over T tokens of one block or feed-forward router that reads hidden [B, L, d]."""
        router, name, context = mixture.router, self.site_name(mixture, place), self.context
        p = self.tensor(mixture, "router", place)

        def decide(x: Tensor) -> Routing:
            scores = nn.functional.linear(x, *router.heads(p)) if isinstance(router, LinearRouter) else router.scores(p, x)
            return router.route(scores, self.training)

        with torch.autocast(hidden.device.type, enabled=False):
            if router.granularity == "token":
                routing = decide(hidden.flatten(0, -2).float())
            else:
                routing = per_token(sequence_decision(router, name, hidden, context, decide), hidden.shape[1])
        routing.experts = mixture.expert_names
        context.record((name,), routing.map(lambda t: t.unsqueeze(1)), mixture.losses)
        return routing

    @property
    def context(self) -> Context:
        return self.live.context if self.live is not None else Context()

    def linear(self, linear: nn.Module, x: Tensor) -> Tensor:
        """Output [..., b] of one wrapped linear; the linears that share x run together when the first of them is asked for."""
        plan = self.plan
        group = plan.group_of.get(id(linear)) if plan is not None else None
        if group is None:
            return linear(x)
        if self.live is None:  # a linear called on its own, outside its layer
            return self._run_group(plan.groups[group], x)[id(linear)].unflatten(0, x.shape[:-1])
        waiting, outputs = self.live.pending.get(group, (None, {}))
        if waiting is not x:
            outputs = self._run_group(plan.groups[group], x)
            self.live.pending[group] = (x, outputs)
        y = outputs.pop(id(linear), None)
        if y is None:  # the same linear twice on one input
            y = self._run_group(plan.groups[group], x)[id(linear)]
        if not outputs:
            self.live.pending.pop(group, None)
        return y.unflatten(0, x.shape[:-1])

    def _run_group(self, terms: list[Term], x: Tensor) -> dict[int, Tensor]:
        """Outputs [T, b] of the linears of one group, by id of the linear."""
        flat = x.reshape(-1, x.shape[-1])
        places = [p for t in terms for p in t.places]
        linears = frozen_linears(places)
        dropout = terms[0].bank.dropout if self.training else 0.0
        heads = [t for t in terms if t.own_router and t.mixture.router.granularity == "token"]
        merged = flat.dtype == torch.float32 and not dropout  # then routers are further rows of the projection
        rows = [self.tensor(t.mixture, t.name, p.role)["A"] for t in terms for p in t.places]
        router_rows = [self._heads(t) for t in heads]
        a = self._cat(("A", id(terms)), [*rows, *(w for w, _ in router_rows)] if merged else rows, x.dtype)
        ys, s = project(linears, flat, a, dropout)
        sizes = [len(t.places) * self.tensor(t.mixture, t.name, t.places[0].role)["A"].shape[0] for t in terms]
        pieces = s.split([*sizes, *(w.shape[0] for w, _ in router_rows)] if merged else sizes, dim=-1)
        pairs: dict[int, list] = {id(m): [] for m in linears}
        for i, term in enumerate(terms):
            weights = None
            if term in heads:
                j = heads.index(term)
                w, b = router_rows[j]
                if merged:
                    scores = pieces[len(terms) + j] if b is None else pieces[len(terms) + j] + b
                else:
                    with torch.autocast(x.device.type, enabled=False):
                        scores = nn.functional.linear(flat.float(), w, b)
                weights = self._route_linears(term, scores).weights
            elif term.own_router:
                weights = self._route_sequences(term, x)
            elif term.mixture.routed:
                weights = columns(self.live.routings[term.mixture.name].weights, term.columns)
            mixed = term.bank.mix(pieces[i].unflatten(-1, (len(term.places), -1)), weights, self._const(term.bank, x.device))
            for place, m in zip(term.places, mixed.unbind(1), strict=True):
                b_matrix = self._cat(("B", term.name, place.role), [self.tensor(term.mixture, term.name, place.role)["B"]], x.dtype)
                pairs[id(place.linear)].append((m, b_matrix, place.columns))
        return {id(m): expand(y, pairs[id(m)]) for m, y in zip(linears, ys, strict=True)}

    def _heads(self, term: Term) -> tuple[Tensor, Tensor | None]:
        """Linear maps of the routers of one term, one below the other: [G H, d] and [G H] or None."""
        found = [term.mixture.router.heads(self.tensor(term.mixture, "router", p.role)) for p in term.places]
        weight = self._cat(("heads", term.name, term.places[0].role), [w for w, _ in found], torch.float32)
        return weight, None if found[0][1] is None else torch.cat([b for _, b in found])

    def _route_linears(self, term: Term, scores: Tensor) -> Routing:
        """Routing [T, G, E] of the G routers of one term from their scores [T, G H]."""
        routing = term.mixture.router.route(scores.float().unflatten(-1, (len(term.places), -1)), self.training)
        routing.experts = term.mixture.expert_names
        names = tuple(self.site_name(term.mixture, p.role) for p in term.places)
        self.context.record(names, routing, term.mixture.losses)
        return routing

    def _route_sequences(self, term: Term, x: Tensor) -> Tensor:
        """Weights [T, G, E] of routers that decide once a sequence."""
        weights = []
        for place in term.places:
            router, name = term.mixture.router, self.site_name(term.mixture, place.role)
            p = self.tensor(term.mixture, "router", place.role)
            routing = sequence_decision(
                router,
                name,
                x,
                self.context,
                lambda u, p=p, r=router: r.route(nn.functional.linear(u, *r.heads(p)), self.training),
            )
            routing = per_token(routing, x.shape[1])
            routing.experts = term.mixture.expert_names
            self.context.record((name,), routing.map(lambda t: t.unsqueeze(1)), term.mixture.losses)
            weights.append(routing.weights)
        return torch.stack(weights, 1)

    def feed_forward(self, block: nn.Module, x: Tensor) -> Tensor:
        """Output [B, L, d] of the feed-forward block with the banks that sit there."""
        plan = self.plan
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
                y = block(x).flatten(0, -2)
            y = bank.forward(self.tensor(mixture, name, "ffn"), flat, y, FeedForward(self.layer), routing, self.training)
        return y.unflatten(0, x.shape[:-1])

    def attention(self, query: Tensor, scaling: float) -> Tensor | None:
        """What the banks inside attention add to its output [B, L, H, hd], or None; query [B, H, L, hd]."""
        plan, total = self.plan, None
        for mixture, name, bank in plan.attention if plan is not None else ():
            weights = None
            if mixture.routed:
                places = [[mixture.column(name, "attention", i) for i in range(bank.n)]]
                weights = columns(self.live.routings[mixture.name].weights, places)[:, 0].unflatten(0, (query.shape[0], -1))
            p = self.tensor(mixture, name, "attention")
            delta = bank.forward(p, query, lambda e: keys_values(self.layer, e), scaling, weights)
            total = delta if total is None else total + delta
        return total

    # Tensors that are put together from parameters

    def _cat(self, key: tuple, tensors: list[Tensor], dtype: torch.dtype) -> Tensor:
        """The rows of `tensors` in `dtype`. Without gradients the result is kept until one of them changes (decoding would otherwise
        pay for it at every token)."""
        if torch.is_grad_enabled():
            return (torch.cat(tensors) if len(tensors) > 1 else tensors[0]).to(dtype)
        stamp = tuple((t.data_ptr(), t._version, t.device) for t in tensors)
        key = (self.active_adapters[0], *key, dtype)
        if self._packed.get(key, (None,))[0] != stamp:
            self._packed[key] = (stamp, (torch.cat(tensors) if len(tensors) > 1 else tensors[0]).to(dtype))
        return self._packed[key][1]

    def _const(self, bank: Experts, device: torch.device) -> dict[str, Tensor]:
        for name, values in bank.constants().items():
            if (bank, name, device) not in self._constants:
                self._constants[bank, name, device] = torch.tensor(values, device=device)
        return {name: self._constants[bank, name, device] for name in bank.constants()}


def expand(y: Tensor, pairs: list) -> Tensor:
    from moabench.kernels import lowrank

    whole = [(m, b) if columns == slice(0, y.shape[1]) else (m, b, columns) for m, b, columns in pairs]
    return lowrank.expand_add_(y, whole)


def columns(weights: Tensor, places: list[list[int]]) -> Tensor:
    """weights [T, n] -> [T, G, E]: the router output of each expert, by slices and broadcasts, since indexing scatters in backward."""
    flat = [c for row in places for c in row]
    if len(set(flat)) == 1:
        picked = weights[:, flat[0], None].expand(-1, len(flat))
    elif flat == list(range(flat[0], flat[0] + len(flat))):
        picked = weights[:, flat[0] : flat[0] + len(flat)]
    else:
        parts = weights.unbind(-1)
        picked = torch.stack([parts[c] for c in flat], -1)
    return picked.unflatten(-1, (len(places), -1))


def bank_routing(routing: Routing, mixture: Mixture, name: str, bank: Experts) -> Routing:
    """The part of a routing that concerns one bank at the feed-forward block."""
    places = [[mixture.column(name, "ffn", i) for i in range(bank.n)]]
    if places[0] == list(range(routing.weights.shape[-1])):
        return routing
    return Routing(weights=columns(routing.weights, places)[:, 0])


def sequence_decision(router, name: str, hidden: Tensor, context: Context, decide) -> Routing:
    """One decision a sequence [B, E], made from the pooled prompt at the prefill and kept beside the cache while decoding."""
    if context.continues:
        if router.pool == "official_mean":
            raise ConfigError(
                "router.pool='official_mean': expected prompt_mean or last_prompt with a KV cache, since it reads future tokens."
            )
        if name not in context.gates:
            raise ConfigError(f"{name}: the KV cache holds no decision of this router; start the generation with this adapter active.")
        return context.gates[name]
    real = context.mask if context.mask is not None else torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
    prompt = real if context.prompt is None else real & context.prompt
    x = hidden.float()
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


def per_token(routing: Routing, length: int) -> Routing:
    """A decision a sequence [B, E] as one a token [B length, E]."""
    expanded = routing.map(lambda t: t.unsqueeze(1).expand(-1, length, *t.shape[1:]).flatten(0, 1))
    expanded.granularity = "sequence"
    return expanded


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

    def forward(self, x: Tensor) -> Tensor:
        return self._layer[0].linear(self.base_layer, x)


class RoutedFeedForward(_Wrapper):
    """A frozen feed-forward block with experts beside or inside it."""

    def forward(self, x: Tensor) -> Tensor:
        return self._layer[0].feed_forward(self.base_layer, x)
