"""What a forward pass through somebody else's model cannot return: routings and auxiliary losses, collected
only while asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from .loss import Loss, auxiliary
from .routing import Routing


@dataclass
class Context:
    """Facts about one forward pass that its routers need; travels with the pass as a keyword argument of the
    decoder layers, so that a layer recomputed under gradient checkpointing meets the same context.

    mask, prompt [B, L] bool: real tokens, prompt tokens (None: all). gates: decisions of sequence routers
    made at the prefill, kept beside the KV cache. continues: the pass goes on from a cache. shape: (B, L).
    input_ids [B, L] int64 and skill_ids [B] int64 are facts of the batch, None where they were not given;
    skill_ids only where a router reads them. shared: decisions [B L, E] that all sites of this pass share.
    changes: by site name, what turns its router's decision into that which its experts are given
    (effects.py); the recorder sees what the router decided.
    """

    mask: Tensor | None = None
    prompt: Tensor | None = None
    shape: tuple[int, int] = (0, 0)
    input_ids: Tensor | None = None
    skill_ids: Tensor | None = None
    recorder: Recorder | None = None
    gates: dict[str, Routing] = field(default_factory=dict)
    continues: bool = False
    seen: set[tuple[str, ...]] = field(default_factory=set)
    shared: dict[str, Routing] = field(default_factory=dict)
    changes: dict[str, Callable[[Routing], Routing]] = field(default_factory=dict)

    @property
    def prompt_tokens(self) -> Tensor | None:
        """[B, L] bool, the real prompt tokens; a sequence without any is judged by its first real token.
        None: every token is one."""
        if self.mask is None and self.prompt is None:
            return None
        real = self.mask if self.mask is not None else torch.ones_like(self.prompt)
        prompt = real if self.prompt is None else real & self.prompt
        first = real & (real.cumsum(1) == 1)
        return prompt | (first & ~prompt.any(1, keepdim=True))

    def record(self, sites: tuple[str, ...], routing: Routing, losses: dict[str, Loss]) -> None:
        """Hand the routing [T, G, E] of G sites to the open recorder, once a pass however often the layer
        runs."""
        if self.recorder is None or sites in self.seen:
            return
        self.seen.add(sites)
        mask = None if self.mask is None else self.mask.reshape(-1)
        self.recorder.entries.append((sites, replace(routing, mask=mask), losses))


class Recorder:
    """Routings of every routed site met while it was open.

    entries: (site names, Routing with tensors [T, G, E] for the G sites, losses) in the order of execution.
    """

    def __init__(self) -> None:
        self.entries: list[tuple[tuple[str, ...], Routing, dict[str, Loss]]] = []

    @property
    def routing(self) -> dict[str, Routing]:
        """Routing [T, E] of each site by name; several forward passes are joined along T."""
        parts: dict[str, list[Routing]] = {}
        for sites, routing, _ in self.entries:
            for g, site in enumerate(sites):
                parts.setdefault(site, []).append(routing.at_site(g))
        return {site: _join(found) for site, found in parts.items()}

    @property
    def losses(self) -> dict[str, Tensor]:
        """Auxiliary losses by kind, each already multiplied by its coefficient; kinds whose coefficient is 0,
        or that were given nothing to read, are left out."""
        return auxiliary(self.entries)


def _join(routings: list[Routing]) -> Routing:
    if len(routings) == 1:
        return routings[0]
    first = routings[0]
    masks = [
        r.mask if r.mask is not None else torch.ones(r.weights.shape[0], dtype=torch.bool) for r in routings
    ]
    joined = {
        name: torch.cat([getattr(r, name) for r in routings])
        for name in ("weights", "chosen", "probs", "logits", "ids")
        if getattr(first, name) is not None
    }
    mask = (
        None
        if all(r.mask is None for r in routings)
        else torch.cat([m.to(first.weights.device) for m in masks])
    )
    shared = [k for k in first.extras if all(k in r.extras for r in routings)]
    extras = {k: torch.cat([r.extras[k] for r in routings]) for k in shared}
    return replace(first, **joined, mask=mask, extras=extras)


@contextmanager
def record(model: nn.Module) -> Iterator[Recorder]:
    """Collect routings and auxiliary losses of the forward passes inside the block.

        with record(model) as rec:
            out = model(**batch)
        loss = out.loss + sum(rec.losses.values())

    `model` is a PeftModel or anything that contains one; where it holds no mixture, the recorder stays empty.
    """
    tuners = [m for m in model.modules() if hasattr(m, "mixture_recorder")]
    recorder = Recorder()
    previous = [t.mixture_recorder for t in tuners]
    for tuner in tuners:
        tuner.mixture_recorder = recorder
    try:
        yield recorder
    finally:
        for tuner, old in zip(tuners, previous, strict=True):
            tuner.mixture_recorder = old


def capture_routing(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Routing]:
    """Routing of every routed site on one batch, by site name, without gradients and in evaluation mode."""
    training = {m: m.training for m in model.modules()}
    model.eval()
    try:
        with torch.no_grad(), record(model) as recorder:
            model(**batch)
    finally:
        for module, flag in training.items():
            module.training = flag
    return recorder.routing
