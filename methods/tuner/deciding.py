"""Decisions that are more than a router's equation on a token: one a sequence, made from its prompt and kept
beside the KV cache; one for all sites of a pass, from the facts of the batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moabench.kernels import lowrank

from ..recorder import Context
from ..router import FactRouter, Router
from ..routing import Routing
from ..spec import ConfigError


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


def sequence_decision(
    router: Router, name: str, hidden: Tensor, context: Context, decide: Callable[[Tensor], Routing]
) -> Routing:
    """One decision a sequence [B, G, E], made by `decide` from the pooled prompt [B, G, d] of hidden [B, L,
    G, d] at the prefill, and kept beside the cache under the site's name while decoding."""
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
        real = prompt[:, :, None, None]
        pooled = (x * real).sum(1) / real.sum(1).clamp(min=1)
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
