"""Low-rank banks on linears. The linears of a layer that share an input run together: one GEMM makes the
projections of all their experts and the scores of their routers, and each gets its rank-side mixture added.

Shapes: T tokens, G linears that share one input, E experts, R rank rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from moabench.kernels import grouped, lowrank

from ...bank import LinearExperts, constant_tensors
from ...catalog import Mixture
from ...router import decide
from ...routing import Routing
from ...spec import ConfigError
from ..architecture import INPUTS, DecoderLayer, Place, drop, project
from ..deciding import columns
from . import base
from .base import Entry, tensor_name

Tensors = dict[str, Tensor]


@dataclass
class Term:
    """The experts of one bank on the linears that share one input."""

    mixture: Mixture
    name: str
    bank: LinearExperts
    places: list[Place]

    @property
    def own_router(self) -> bool:
        """True where each linear has a router of its own."""
        return self.mixture.site == "linear" and self.mixture.routed

    @property
    def apart(self) -> bool:
        """True where the scores of the own routers are no linear map of the token, which the group's GEMM
        could make."""
        router = self.mixture.router
        return self.own_router and (router.granularity == "sequence" or not router.linear)

    def sorts(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether its tokens are sorted by expert, rather than meeting all experts: every token selects K of
        them, and that is cheaper."""
        bank, rule = self.bank, self.mixture.router.rule
        if not self.own_router or self.apart or not bank.sortable or rule is None or rule.select != "top_k":
            return False
        widths = [n for place in self.places for n in place.shape]
        return grouped.prefers_sorted(bank.n, rule.k, bank.ranks[0], device, dtype, *widths)

    def router_heads(self, owned: Tensors, i: int) -> tuple[Tensor, Tensor | None]:
        """Linear map of the router on place i."""
        return self.mixture.router.heads({k: owned[n] for k, n in self.router_names[i].items()})

    def __post_init__(self) -> None:
        roles = [p.role for p in self.places]
        self.rows = self.bank.params(*self.places[0].shape)["A"].shape[0]  # of A on each linear
        self.a_names = [tensor_name(self.mixture, self.name, role, "A") for role in roles]
        self.b_names = [tensor_name(self.mixture, self.name, role, "B") for role in roles]
        self.router_names: list[dict[str, str]] = []
        self.columns: list[list[int]] = []
        self.buffers: list[str] = []  # of the router
        if self.own_router:
            keys = self.mixture.router.params(self.places[0].shape[0], self.bank.n)
            self.buffers = [name for name, param in keys.items() if not param.trained]
            self.router_names = [
                {k: tensor_name(self.mixture, "router", role, k) for k in keys} for role in roles
            ]
        elif self.mixture.routed:  # output of the block's router for each expert, [G][E]
            self.columns = [
                [self.mixture.column(self.name, role, i) for i in range(self.bank.n)] for role in roles
            ]


@dataclass
class Pack:
    """The tensors of one group put together for its GEMMs.

    a [R, d]: rows of all A but those of sorted terms, which `sorted_a` has; sizes: rows of each term in a; b:
    B of each place of each term; heads [H, d]: rows of all routers, or None; head_sizes: rows of each routed
    term; biases: of the routers of each term, or None.
    """

    a: Tensor
    sorted_a: list[Tensor | None]
    sizes: list[int]
    b: list[list[Tensor]]
    heads: Tensor | None
    head_sizes: list[int]
    biases: list[Tensor | None]


@dataclass
class Group:
    """The linears of one layer that read the same input (q, k and v, or gate and up), with all experts on
    them."""

    terms: list[Term]
    kept: dict[tuple, tuple[tuple, Pack]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.places = [p for t in self.terms for p in t.places]
        self.linears = list({p.attribute: (p.parent, p.attribute) for p in self.places}.values())
        self.attributes = [attribute for _, attribute in self.linears]
        self.key = self.attributes[0]
        self.dropout = self.terms[0].bank.dropout
        self.names = [
            n
            for t in self.terms
            for n in (*t.a_names, *t.b_names, *(n for r in t.router_names for n in r.values()))
        ]
        if len({t.bank.dropout for t in self.terms}) > 1:
            values = {t.name: t.bank.dropout for t in self.terms}
            raise ConfigError(f"dropout={values}: expected one value on linears that share an input.")

    def pack(self, owned: Tensors, dtype: torch.dtype, sorts: tuple[bool, ...], continues: bool) -> Pack:
        """The group's tensors, A and B in `dtype`; sorts: which terms sort their tokens.

        A pass that continues a KV cache takes those of the pass before, unless a tensor has changed: decoding
        would otherwise pay for it at every token. Other passes do not, since fused optimisers and writes
        through `.data` change a tensor and leave its version as it was.
        """
        tensors = [owned[name] for name in self.names]
        # a tensor made in inference mode does not tell when it has changed
        if torch.is_grad_enabled() or any(t.is_inference() for t in tensors):
            return self._pack(owned, dtype, sorts)
        stamp = tuple([(t.data_ptr(), t._version) for t in tensors])
        kept = self.kept.get((dtype, sorts))
        if not continues or kept is None or kept[0] != stamp:
            kept = self.kept[dtype, sorts] = (stamp, self._pack(owned, dtype, sorts))
        return kept[1]

    def _pack(self, owned: Tensors, dtype: torch.dtype, sorts: tuple[bool, ...]) -> Pack:
        rows, apart, sizes, heads, head_sizes, biases = [], [], [], [], [], []
        for term, alone in zip(self.terms, sorts, strict=True):
            a = [owned[n] for n in term.a_names]
            apart.append(cat(a).to(dtype) if alone else None)
            rows += [t[:0] for t in a] if alone else a
            sizes.append(0 if alone else sum(t.shape[0] for t in a))
            maps = [] if term.apart else [term.router_heads(owned, i) for i in range(len(term.router_names))]
            heads += [w for w, _ in maps]
            head_sizes += [sum(w.shape[0] for w, _ in maps)] if maps else []
            biases.append(cat([b for _, b in maps]) if maps and maps[0][1] is not None else None)
        b = [[owned[n].to(dtype) for n in term.b_names] for term in self.terms]
        return Pack(cat(rows).to(dtype), apart, sizes, b, cat(heads) if heads else None, head_sizes, biases)


def cat(tensors: list[Tensor]) -> Tensor:
    """The rows of `tensors`, without a copy where there is one."""
    return torch.cat(tensors) if len(tensors) > 1 else tensors[0]


@dataclass
class Shared:
    """Outputs of linears that share the input `x`, made when the first of them was asked for, until each is
    taken."""

    x: Tensor
    outputs: dict[str, Tensor]


class Seam(base.Seam):
    """Banks of kind LinearExperts."""

    def __init__(self, layer: DecoderLayer, entries: list[Entry]) -> None:
        layer.require({role for entry in entries for role in entry.bank.places})
        self.groups: list[Group] = []
        for roles in INPUTS:
            found = [(e, [layer.places[r] for r in roles if r in e.bank.places]) for e in entries]
            terms = [Term(e.mixture, e.name, e.bank, places) for e, places in found if places]
            if terms:
                self.groups.append(Group(terms))
        self.group_of = {p.attribute: group for group in self.groups for p in group.places}
        self.linears = tuple(self.group_of)
        self._constants: dict[tuple, dict[str, Tensor]] = {}  # by bank and device

    def declared(self, layer: DecoderLayer):
        for term in (t for group in self.groups for t in group.terms):
            mixture, bank = term.mixture, term.bank
            for place in term.places:
                yield mixture, term.name, place.role, bank.params(*place.shape)
                if term.own_router:
                    yield mixture, "router", place.role, mixture.router.params(place.shape[0], bank.n)

    def linear(self, owner, attribute: str, x: Tensor, inner) -> Tensor:
        group, shape = self.group_of[attribute], (*x.shape[:-1], -1)
        if owner.live is None:  # called on its own, outside its layer: nobody else takes the others' outputs
            return self._run(owner, group, x)[attribute].view(shape)
        shared = owner.live.shared.get(group.key)
        if shared is None or shared.x is not x or attribute not in shared.outputs:
            shared = owner.live.shared[group.key] = Shared(x, self._run(owner, group, x))
        y = shared.outputs.pop(attribute)
        if not shared.outputs:
            del owner.live.shared[group.key]
        return y.view(shape)

    def _run(self, owner, group: Group, x: Tensor) -> dict[str, Tensor]:
        """Outputs [T, b] of the linears of one group, by attribute."""
        flat, context = x.reshape(-1, x.shape[-1]), owner.context
        dropout = group.dropout if owner.training else 0.0
        sorts = tuple([not context.changes and term.sorts(flat.device, flat.dtype) for term in group.terms])
        pack = group.pack(owner.owned, flat.dtype, sorts, context.continues)
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
                weights = self._route_apart(owner, term, x)
            elif term.own_router:
                routing = self._route_linears(owner, term, next(scores), bias)
                weights = routing.weights
            elif term.mixture.routed:
                weights = columns(owner.live.routings[term.mixture.name].weights, term.columns)
            if a is not None:
                read = flat if dropped is None else dropped
                shrunk = grouped.shrink(read, a, weights, routing.ids, term.bank.scales[0])
                by_expert += [
                    (place.attribute, shrunk, g, b[g], place.columns) for g, place in enumerate(term.places)
                ]
                continue
            made = self._mixed(term, piece.view(-1, len(term.places), term.rows), weights)
            for mixed, detached in made:
                for place, m, b_matrix in zip(term.places, mixed.unbind(1), b, strict=True):
                    pair = (m, b_matrix.detach() if detached else b_matrix)
                    pairs[place.attribute].append((*pair, place.columns) if place.fused else pair)
        ys = {
            name: lowrank.expand_add_(y, pairs[name]) if pairs[name] else y
            for name, y in zip(group.attributes, ys, strict=True)
        }
        for name, *update in by_expert:
            ys[name] = grouped.expand_add_(ys[name], *update)
        return ys

    def _mixed(self, term: Term, s: Tensor, weights: Tensor | None) -> list[tuple[Tensor, bool]]:
        """Rank-side mixtures [T, G, R] whose B-images add up to the experts' output, and whether B gets no
        gradient from them."""
        bank, c = term.bank, self._constants_of(term.bank, s.device)
        if bank.gate_grad == "plain" or weights is None or not torch.is_grad_enabled():
            return [(bank.mix(s, weights, c), False)]
        # w o = stop(sqrt w) o + (w - stop(sqrt w)) stop(o): the experts learn by sqrt w, the router as ever
        root = weights.detach().sqrt()
        return [(bank.mix(s, root, c), False), (bank.mix(s.detach(), weights - root, c), True)]

    def _route_linears(self, owner, term: Term, scores: Tensor, bias: Tensor | None) -> Routing:
        """Routing [T, G, E] of the G routers of one term from their scores [T, G H] before the bias [G H], as
        the experts are given it."""
        if bias is not None:
            scores = scores + bias
        by_site = scores.view(scores.shape[0], len(term.places), -1)
        owned = owner.owned
        buffers = {b: torch.stack([owned[names[b]] for names in term.router_names]) for b in term.buffers}
        routing = decide(term.mixture.router, by_site, owner.training, buffers)
        return owner.decided(term.mixture, [p.role for p in term.places], routing)

    def _route_apart(self, owner, term: Term, x: Tensor) -> Tensor:
        """Weights [T, G, E] of routers that are no linear map of the token."""
        return torch.cat(
            [owner.route(term.mixture, place.role, x.unsqueeze(-2)).weights for place in term.places], 1
        )

    def _constants_of(self, bank: LinearExperts, device: torch.device) -> dict[str, Tensor]:
        key = (bank, device)
        if key not in self._constants:
            self._constants[key] = constant_tensors(bank, device)
        return self._constants[key]
