"""Whether the frozen parts that experts share are what we take them for, tried on a few numbers when a
mixture is attached: a block may clip, scale or sparsify, a key may be normalised or scaled where no name says
so."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moabench.kernels import mix_ffn

from ..spec import ConfigError
from . import attention
from .architecture import DecoderLayer, FeedForward, base_of, keys_values

TOKENS = 4
BOUNDS = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}
"""Largest RMS of a difference, relative; packed weights round like bfloat16."""


def possible(layer: DecoderLayer) -> bool:
    """Whether the layer's weights are here: not on the meta device, fake, or split over processes."""
    return all(
        type(p) in (nn.Parameter, Tensor) and p.device.type != "meta" for p in layer.module.parameters()
    ) and not hasattr(layer.module, "unshard")


@torch.no_grad()
def feed_forward(layer: DecoderLayer) -> None:
    """Raise ConfigError unless the block is `W_d (act(W_g x) * W_u x)`, as experts inside it assume."""
    block, ffn, x = base_of(layer.feed_forward), FeedForward(layer), _probe(layer)
    (gate, up), _ = ffn.gate_up_shrink(x, x.new_zeros(1, x.shape[-1]), 0.0)
    ours = ffn.down(mix_ffn.ACTIVATIONS[ffn.activation][0](gate) * up)
    given = block(x.unsqueeze(0))
    theirs = (given[0] if isinstance(given, tuple) else given).view_as(ours)
    if (error := _error(ours, theirs)) > _bound(layer, x):
        raise ConfigError(
            f"feed-forward block {type(block).__name__} of '{layer.name}': it is no down(act(gate x) * up x) "
            f"(off by {error:.1g} on random inputs), which experts that share it need; expected experts "
            "beside it (parallel_adapter) or on its linears (lora)."
        )


@torch.no_grad()
def keys(model: nn.Module, layer: DecoderLayer) -> None:
    """Raise ConfigError unless keys and values are what `keys_values` makes, at a position where rotation
    does nothing."""
    x, seen = _probe(layer), {}
    try:
        with attention.seeing(layer.attention, lambda key, value: seen.update(key=key, value=value)):
            layer.attention(
                hidden_states=x.unsqueeze(0),
                position_embeddings=_unrotated(model, layer, x.unsqueeze(0)),
                attention_mask=None,
            )
    except Exception as error:  # an attention that is called otherwise
        raise ConfigError(
            f"{type(layer.attention).__name__} of '{layer.name}': its keys could not be checked "
            f"({type(error).__name__}: {str(error).splitlines()[0][:100] if str(error) else ''}), which "
            "prompts inside attention need; expected a method without `prompt`."
        ) from error
    ours = keys_values(layer, x)  # [N, H, hd], repeated over grouped heads
    repeat = ours[0].shape[1] // seen["key"].shape[1]
    for name, mine in zip(("key", "value"), ours, strict=True):
        theirs = seen[name][0].transpose(0, 1).repeat_interleave(repeat, 1)
        if (error := _error(mine, theirs)) > _bound(layer, x):
            raise ConfigError(
                f"{type(layer.attention).__name__} of '{layer.name}': it transforms its {name}s in a way "
                f"that is not known here (off by {error:.1g} on random inputs), which prompts inside "
                "attention need; expected a method without `prompt`."
            )


def _unrotated(model: nn.Module, layer: DecoderLayer, x: Tensor) -> Any:
    """The model's position embeddings for tokens that are all at position 0."""
    rotary = next((m for n, m in model.named_modules() if n.endswith("rotary_emb")), None)
    if rotary is None:
        return None
    places = torch.zeros(x.shape[:2], dtype=torch.long, device=x.device)
    kinds = getattr(getattr(layer.config, "text_config", layer.config), "layer_types", None)
    try:
        return rotary(x, places)
    except TypeError:  # another rotation for each kind of layer
        return rotary(x, places, kinds[layer.attention.layer_idx])


def _probe(layer: DecoderLayer) -> Tensor:
    """The same random numbers at every call, without a draw from the global generator."""
    weight: Any = next(layer.module.parameters())
    norm = next((p for n, p in layer.module.named_parameters() if "norm" in n), weight)
    dtype = norm.dtype if norm.is_floating_point() else torch.float32
    drawn = torch.randn(TOKENS, layer.width, generator=torch.Generator().manual_seed(0))
    return drawn.to(weight.device, dtype)


def _error(ours: Tensor, theirs: Tensor) -> float:
    difference = (ours.double() - theirs.double()).square().mean().sqrt()
    return float(difference / theirs.double().square().mean().sqrt().clamp(min=1e-30))


def _bound(layer: DecoderLayer, x: Tensor) -> float:
    plain = all(type(place.linear) is nn.Linear for place in layer.places.values())
    return BOUNDS[x.dtype if plain else torch.bfloat16]
