"""What one adapter does in one decoder layer, worked out once: which banks sit where, and the names of their
tensors."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from moabench.kernels import grouped

from ..bank import AttentionExperts, FeedForwardExperts, LinearExperts
from ..catalog import Method, Mixture
from ..params import Param
from ..router import LinearRouter
from ..spec import ConfigError
from .architecture import INPUTS, DecoderLayer, Place

Tensors = dict[str, Tensor]


def tensor_name(mixture: Mixture, part: str, place: str, tensor: str) -> str:
    """Name of one tensor in a layer: `<mixture>__<router or bank>__<place>__<tensor>`."""
    return f"{mixture.name}__{part}__{place}__{tensor}"


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
        return self.own_router and (router.granularity == "sequence" or not isinstance(router, LinearRouter))

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
        if self.own_router:
            keys = self.mixture.router.params(self.places[0].shape[0], self.bank.n)
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
        if torch.is_grad_enabled():
            return self._pack(owned, dtype, sorts)
        stamp = tuple([(t.data_ptr(), t._version) for t in map(owned.__getitem__, self.names)])
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


class Plan:
    """The groups of linears of one adapter in one layer, and its banks at the feed-forward block and inside
    attention."""

    def __init__(self, method: Method, layer: DecoderLayer) -> None:
        self.mixtures = method.mixtures
        banks = [(m, name, bank) for m in method.mixtures for name, bank in m.banks.items()]
        layer.require({r for _, _, b in banks if isinstance(b, LinearExperts) for r in b.targets})
        if any(isinstance(b, FeedForwardExperts) for _, _, b in banks):
            layer.require(("gate", "up", "down"))
        if any(isinstance(b, AttentionExperts) for _, _, b in banks):
            layer.require(("q", "k", "v"))
        self.groups: list[Group] = []
        for roles in INPUTS:
            terms = []
            for mixture, name, bank in banks:
                if isinstance(bank, LinearExperts) and (
                    found := [layer.places[r] for r in roles if r in bank.targets]
                ):
                    terms.append(Term(mixture, name, bank, found))
            if terms:
                self.groups.append(Group(terms))
        self.group_of = {p.attribute: g for g, group in enumerate(self.groups) for p in group.places}
        self.attention = [(m, n, b) for m, n, b in banks if isinstance(b, AttentionExperts)]
        self.feed_forward = [(m, n, b) for m, n, b in banks if isinstance(b, FeedForwardExperts)]
        self.feed_forward.sort(key=lambda entry: not entry[2].replaces)
        if sum(b.replaces for *_, b in self.feed_forward) > 1:
            raise ConfigError("experts: expected at most one bank that runs the whole feed-forward block.")

    def declared(self, layer: DecoderLayer) -> dict[str, Param]:
        """Every tensor of this adapter in this layer, by name."""
        tensors: dict[str, Param] = {}

        def add(mixture: Mixture, part: str, place: str, params: dict[str, Param]) -> None:
            tensors.update({tensor_name(mixture, part, place, name): p for name, p in params.items()})

        for term in (t for group in self.groups for t in group.terms):
            for place in term.places:
                add(term.mixture, term.name, place.role, term.bank.params(*place.shape))
                if term.own_router:
                    add(
                        term.mixture,
                        "router",
                        place.role,
                        term.mixture.router.params(place.shape[0], term.bank.n),
                    )
        for mixture, name, bank in self.feed_forward:
            add(mixture, name, "ffn", bank.params(layer.width, layer.places["down"].shape[0]))
        for mixture, name, bank in self.attention:
            add(
                mixture,
                name,
                "attention",
                bank.params(layer.width, layer.places["q"].shape[1] // layer.attention.head_dim),
            )
        for mixture in self.mixtures:
            if mixture.routed and mixture.site != "linear":
                add(
                    mixture,
                    "router",
                    mixture.site,
                    mixture.router.params(layer.width, len(mixture.expert_names)),
                )
        return tensors
