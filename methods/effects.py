"""What each expert of a routed place does, all experts on the same tokens, those too that the router did not
select.

    with watch(model, ["model.layers.0.q"]) as watched:
        model(**batch, use_cache=False)
    watched["model.layers.0.q"].low_rank()         # experts on one linear: rank-side outputs and B, no wide
                                                   tensor
    watched["model.layers.0.block"].outputs()      # any experts: the place is run again with one expert
                                                   alone, weight 1
    watched["model.layers.0.block"].removed()      # ... and with one expert left out

Shapes: B sequences, L positions, T = B L tokens, E router outputs, R rank rows, d width of what the place
gives.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .bank import constant_tensors
from .recorder import Context
from .routing import Routing, one_hot

if TYPE_CHECKING:
    from .tuner.sites import Site

Change = Callable[[Routing], Routing]
"""The routing [T, E] that the router decided -> the one that the experts are given."""


@dataclass
class Watched:
    """One routed place as one forward pass met it. read [B, L, d_in]: what its router and experts read."""

    site: Site
    read: Tensor
    args: tuple
    kwargs: dict[str, Any]
    context: Context

    @torch.no_grad()
    def low_rank(self) -> tuple[Tensor, Tensor]:
        """(p [E, T, R], B [d, R]) of experts on a linear: `p_e B^T` is what expert e adds, alone, with weight
        1. Scales are in p."""
        (view,) = self.site.banks
        return _alone(self.site, self.read.flatten(0, -2).to(view.A.dtype) @ view.A.T), view.B

    @torch.no_grad()
    def outputs(self) -> Tensor:
        """[E, T, d]: what the place gives with expert e alone and weight 1, minus what the frozen model gives
        there.

        At a block the frozen side is the layer with all weights 0, since it may hold other mixtures.
        """
        if self.site.kind == "block":
            frozen = self.run(lambda r: weighted(r, torch.zeros_like(r.weights)))
        else:
            with _gathered(self.site):
                frozen = self._given(self.site.module.base_layer(*self.args, **self.kwargs))

        def alone(e: int) -> Tensor:
            return self.run(
                lambda r: one_hot(torch.full_like(r.weights[:, 0], e, dtype=torch.long), r.weights.shape[1])
            )

        return torch.stack([(alone(e) - frozen).flatten(0, -2) for e in range(len(self.site.experts))])

    @torch.no_grad()
    def removed(self) -> Tensor:
        """[E, T, d]: what the place gives as routed, minus what it gives with expert e's weight at 0. 0 where
        e was not selected."""
        whole = self.run(lambda r: r)

        def without(e: int) -> Tensor:
            return self.run(
                lambda r: weighted(
                    r, r.weights * (torch.arange(r.weights.shape[1], device=r.weights.device) != e)
                )
            )

        return torch.stack([(whole - without(e)).flatten(0, -2) for e in range(len(self.site.experts))])

    def run(self, change: Change) -> Tensor:
        """Output [B, L, d] of the place with the router's decision replaced, all else as in the pass."""
        context = replace(
            self.context, recorder=None, gates={}, seen=set(), shared={}, changes={self.site.name: change}
        )
        if self.site.kind == "block":
            return self._given(self.site.module(*self.args, **(self.kwargs | {"mixture_context": context})))
        with _gathered(self.site), self.site.layer.within(context):
            return self._given(self.site.module(*self.args, **self.kwargs))

    def _given(self, output: Any) -> Tensor:
        """Of what the module gives, the hidden states that the site's decision concerns."""
        return _hidden(output)[..., self.site.columns]


def weighted(routing: Routing, weights: Tensor) -> Routing:
    """The routing with other weights, of which any may be 0 or not."""
    return replace(routing, weights=weights, chosen=weights != 0, ids=None)


def can_run(site: Site) -> bool:
    """Whether `outputs` tells experts apart from the frozen model: not at a block whose experts replace a
    part of it."""
    return site.router is not None and not (
        site.kind == "block" and any(view.part.replaces for view in site.banks)
    )


def has_low_rank(site: Site) -> bool:
    """Whether the experts are one bank of low-rank pairs on one linear."""
    return site.kind == "linear" and len(site.banks) == 1 and site.banks[0].part.low_rank


@torch.no_grad()
def low_rank_pairs(site: Site) -> list[tuple[Tensor, Tensor]]:
    """(A_e [r, d_in], B_e [d, r]) of each expert of a bank on one linear, scale included: it adds `B_e A_e x`
    at weight 1."""
    (view,) = site.banks
    rank_side = _alone(site, torch.eye(len(view.A), dtype=view.A.dtype, device=view.A.device))  # [E, rows, R]
    found = []
    for m in rank_side:
        own = m.any(0)
        found.append((m[:, own].T @ view.A, view.B[:, own]))
    return found


def _alone(site: Site, s: Tensor) -> Tensor:
    """Rank-side outputs [E, T, R] of each expert alone, weight 1, for projections s [T, rows]: the bank's own
    mixture of one expert.

    A bank mixes projections linearly (`LinearExperts.mix`); what it gives without any expert is taken off.
    """
    part = site.banks[0].part
    constants = constant_tensors(part, s.device)
    given = [torch.zeros(part.n, device=s.device), *torch.eye(part.n, device=s.device)]
    nothing, *alone = (part.mix(s.unsqueeze(1), w.expand(len(s), 1, -1), constants)[:, 0] for w in given)
    return torch.stack(alone) - nothing


@contextmanager
def watch(model: nn.Module, names: Collection[str]) -> Iterator[dict[str, Watched]]:
    """Keeps how the routed places `names` of a PeftModel are called by the pass inside (the last one, where
    there are several)."""
    watched: dict[str, Watched] = {}
    handles = [h for site in model.base_model.sites() if site.name in names for h in _hooks(site, watched)]
    try:
        yield watched
    finally:
        for handle in handles:
            handle.remove()


def _hooks(site: Site, watched: dict[str, Watched]) -> Iterator[Any]:
    def called(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        read = args[0] if args else kwargs["hidden_states"]
        context = kwargs.get("mixture_context") or site.layer.context
        watched[site.name] = Watched(site, read.detach(), args, kwargs, context)

    def attends(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        watched[site.name].read = (args[0] if args else kwargs["hidden_states"]).detach()

    def gives(module: nn.Module, args: tuple, output: Tensor) -> None:
        watched[site.name].read = output.detach()[..., site.columns]

    yield site.module.register_forward_pre_hook(called, with_kwargs=True)
    if site.kind == "linear" and site.banks[0].part.reads_output(site.banks[0].place):
        yield site.module.base_layer.register_forward_hook(gives)
    if site.kind == "block" and site.mixture.input == "normed":
        yield site.layer.layer.attention.register_forward_pre_hook(attends, with_kwargs=True)


@contextmanager
def _gathered(site: Site) -> Iterator[None]:
    """The weights of a layer that FSDP has split, whole inside: it gathers them when the layer runs, and here
    only a part of it does."""
    layer = site.layer.layer.module
    if not hasattr(layer, "unshard"):
        yield
        return
    layer.unshard()
    try:
        yield
    finally:
        layer.reshard()


def _hidden(output: Any) -> Tensor:
    """A decoder layer may give its hidden states alone or first of several."""
    return output[0] if isinstance(output, tuple) else output
