"""Where the parts of a stock transformers model are: decoder layers, and in each the linears a method may
name by role.

Roles are q, k, v, o, gate, up, down. A fused linear (Phi-3's qkv_proj, gate_up_proj) serves several roles,
each a slice of its output. Nothing here knows a model class: modules are found by the names in `ATTENTION`,
`FEED_FORWARD` and `LINEARS`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moabench.kernels import lowrank

from ..spec import ConfigError

ATTENTION = ("self_attn", "attention", "attn")
FEED_FORWARD = ("mlp", "feed_forward", "ffn")
# role(s) -> attribute names, within attention for q, k, v, o and within the feed-forward block for the rest
LINEARS = {
    ("q",): ("q_proj",),
    ("k",): ("k_proj",),
    ("v",): ("v_proj",),
    ("q", "k", "v"): ("qkv_proj",),
    ("o",): ("o_proj", "out_proj"),
    ("gate",): ("gate_proj", "w1"),
    ("up",): ("up_proj", "w3"),
    ("gate", "up"): ("gate_up_proj",),
    ("down",): ("down_proj", "w2"),
}
INPUTS = (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))  # roles that read the same tensor
PEFT_NAMES = {
    role: tuple(n for roles, names in LINEARS.items() if role in roles for n in names)
    for roles in INPUTS
    for role in roles
}


@dataclass
class Place:
    """One role of one decoder layer: `parent.attribute` is its linear, `columns` the role's slice of its
    output."""

    role: str
    parent: nn.Module
    attribute: str
    columns: slice
    shape: tuple[int, int]  # (d_in, d_out) of the role
    fused: bool = False  # the linear serves other roles too

    @property
    def linear(self) -> nn.Module:
        """The frozen linear, whether or not it is wrapped."""
        return base_of(getattr(self.parent, self.attribute))


class DecoderLayer:
    """The parts of one decoder layer by role."""

    def __init__(self, name: str, module: nn.Module, config) -> None:
        self.name, self.module = name, module
        self.attention = _child(module, ATTENTION)
        self.entry_norm = getattr(
            module, "input_layernorm", None
        )  # what it reads is the layer's raw input; OLMo2 has none
        self.feed_forward_name = next((n for n in FEED_FORWARD if hasattr(module, n)), None)
        self.config = config
        self.places = {place.role: place for place in self._find()}

    def _find(self) -> Iterator[Place]:
        text = getattr(self.config, "text_config", self.config)
        heads = text.num_attention_heads
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
        kv = (getattr(text, "num_key_value_heads", None) or heads) * head_dim
        widths = {"q": heads * head_dim, "k": kv, "v": kv}
        for roles, names in LINEARS.items():
            parent = self.attention if roles[0] in "qkvo" else base_of(self.feed_forward)
            attribute = next((n for n in names if parent is not None and hasattr(parent, n)), None)
            if attribute is None:
                continue
            linear = base_of(getattr(parent, attribute))
            start = 0
            for role in roles:
                width = (
                    linear.out_features
                    if len(roles) == 1
                    else widths.get(role, linear.out_features // len(roles))
                )
                yield Place(
                    role,
                    parent,
                    attribute,
                    slice(start, start + width),
                    (linear.in_features, width),
                    len(roles) > 1,
                )
                start += width

    @property
    def feed_forward(self) -> nn.Module | None:
        return getattr(self.module, self.feed_forward_name) if self.feed_forward_name else None

    @property
    def width(self) -> int:
        return self.places["q"].shape[0]

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.attention.head_dim

    def require(self, roles) -> None:
        """Raise ConfigError naming what was sought and what the layer has, unless every role is there."""
        missing = [r for r in roles if r not in self.places]
        if missing:
            sought = {r: "|".join(PEFT_NAMES[r]) for r in missing}
            there = ", ".join(n for n, m in self.module.named_modules() if n and not list(m.children()))
            raise ConfigError(
                f"no place for {', '.join(missing)} in decoder layer '{self.name}': sought linears named "
                f"{sought} in {'|'.join(ATTENTION)} or {'|'.join(FEED_FORWARD)}; the layer has: {there}."
            )


def base_of(module: nn.Module | None) -> nn.Module | None:
    """The module under our wrapper, or the module itself."""
    return getattr(module, "base_layer", module)


def _child(module: nn.Module, names) -> nn.Module | None:
    return next((base_of(getattr(module, n)) for n in names if hasattr(module, n)), None)


def keep_layout(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking its 4-bit linears for a CPU with avx512_bf16 in their first evaluation
    pass.

    Its repacked form (0.50.2) has no gradient to its input, and after a `state_dict()`, which every
    checkpoint calls, later passes differ or are garbage. Raises ConfigError for a layer that is repacked
    already.
    """
    for name, module in model.named_modules():
        if not hasattr(module, "support_avx512bf16_for_cpu"):
            continue
        if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
            raise ConfigError(
                f"{name}: bitsandbytes has repacked this 4-bit layer for this CPU in an evaluation pass, and "
                "so it cannot be trained or saved exactly; expected a base that is fresh from loading. Load "
                "it again, and attach before the first pass."
            )
        module.support_avx512bf16_for_cpu = False


def is_decoder_layer(module: nn.Module) -> bool:
    """True for a module that holds an attention with a query projection of its own."""
    attention = _child(module, ATTENTION)
    return attention is not None and any(hasattr(attention, n) for n in PEFT_NAMES["q"])


def decoder_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Decoder layers by qualified name. Raises ConfigError listing what was looked for where there are
    none."""
    text = _text_part(model)
    layers = {name: m for name, m in model.named_modules() if is_decoder_layer(m) and id(m) in text}
    if not layers:
        kinds = sorted(
            {
                f"{n.rpartition('.')[2]} ({type(m).__name__})"
                for n, m in model.named_modules()
                if n and not list(m.children())
            }
        )
        raise ConfigError(
            f"{type(model).__name__} has no decoder layer that a mixture can attach to: sought modules with "
            f"a child {'|'.join(ATTENTION)} that has {'|'.join(PEFT_NAMES['q'])}; the model's innermost "
            f"modules are {', '.join(kinds[:40])}."
        )
    return layers


def _text_part(model: nn.Module) -> set[int]:
    """Ids of the modules of the text decoder: a vision or audio tower has layers of its own, which read no
    text."""
    towers = ("vision", "audio", "visual", "image")
    outside = {
        id(m)
        for name, tower in model.named_modules()
        if any(word in name.rpartition(".")[2].lower() for word in towers)
        for m in tower.modules()
    }
    return {id(m) for m in model.modules()} - outside


def require_whole(model: nn.Module, layers: dict[str, nn.Module]) -> None:
    """Raise ConfigError where some of the model's decoder layers are none that a mixture can attach to: it
    would adapt the others alone."""
    config = getattr(model, "config", None)
    count = getattr(getattr(config, "text_config", None) or config, "num_hidden_layers", len(layers))
    if count != len(layers):
        raise ConfigError(
            f"{type(model).__name__} has {count} decoder layers, of which {len(layers)} have an attention "
            f"with {'|'.join(PEFT_NAMES['q'])} ({', '.join(list(layers)[:3])}, ...): the others would be "
            "left as they are. Expected a model whose layers are all alike."
        )


def frozen_linears(places: list[Place]) -> list[nn.Module]:
    """The distinct linears of places that read the same input, in order."""
    return list({id(p.linear): p.linear for p in places}.values())


def project(
    linears: list[nn.Module], x: Tensor, a: Tensor, heads: Tensor | None, dropped: Tensor | None
) -> tuple[list[Tensor], Tensor, Tensor | None]:
    """Frozen outputs of `linears`, ours to write into, the projection `A x` [T, R] (of `dropped` where x
    loses entries in training) and router scores `H x` (or None) of x [T, d].

    Plain nn.Linear layers share one autograd node with the projection; quantised or otherwise special ones
    run as they are.
    """
    plain = all(type(m) is nn.Linear for m in linears)
    frozen = [(m.weight, m.bias) for m in linears] if plain else []
    ys, s, z = lowrank.linear_shrink(x, frozen, a if dropped is None else a[:0], heads)
    if dropped is not None:
        s = lowrank.shrink(dropped, a)
    return ys if plain else [owned(m, m(x)) for m in linears], s, z


def owned(linear: nn.Module, y: Tensor) -> Tensor:
    """`y`, what `linear` gave or ended in, as a tensor that may be written into. torch's own linear makes a
    new one; what another gives may be a view of something, or kept by it."""
    return y if type(linear) is nn.Linear else y.clone()


def drop(x: Tensor, share: float) -> Tensor | None:
    """x without a random `share` of its entries; None where that is 0."""
    return nn.functional.dropout(x, share) if share else None


class FeedForward:
    """The frozen feed-forward block of one layer, taken apart."""

    def __init__(self, layer: DecoderLayer) -> None:
        self.module = base_of(layer.feed_forward)
        self.places = layer.places

    @property
    def activation(self) -> str:
        """Name of the block's activation among kernels.mix_ffn.ACTIVATIONS. Raises ConfigError for one that
        is not there."""
        function = getattr(self.module, "act_fn", None) or getattr(self.module, "activation_fn", None)
        name = type(function).__name__
        known = {
            "SiLU": "silu",
            "SiLUActivation": "silu",
            "ReLU": "relu",
            "GELUTanh": "gelu_tanh",
            "PytorchGELUTanh": "gelu_tanh",
        }
        known |= {"GELU": "gelu", "GELUActivation": "gelu"}
        if name not in known:
            raise ConfigError(f"feed-forward activation {name}: expected one of {', '.join(sorted(known))}.")
        return known[name]

    def gate_up_shrink(self, x: Tensor, a: Tensor, dropout: float) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Frozen gate and up outputs [T, f] each, and `A drop(x)` [T, R]."""
        places = [self.places["gate"], self.places["up"]]
        ys, s, _ = project(frozen_linears(places), x, a, None, drop(x, dropout))
        return (ys[0], ys[1]) if len(ys) == 2 else tuple(ys[0][:, p.columns] for p in places), s

    def down(self, h: Tensor) -> Tensor:
        """The frozen down projection of h [T, f], ours to write into."""
        linear = self.places["down"].linear
        return owned(linear, linear(h))


def keys_values(layer: DecoderLayer, x: Tensor) -> tuple[Tensor, Tensor]:
    """Frozen keys and values of x [N, d] without positions, [N, H, head_dim] each, repeated over grouped
    query heads.

    A model that normalises its keys (Qwen3 by head, OLMo2 over all heads) does so here too.
    """
    attention, q, k = layer.attention, layer.places["q"], layer.places["k"]
    head_dim = attention.head_dim
    out = {r: layer.places[r].linear(x)[:, layer.places[r].columns] for r in ("k", "v")}
    norm = getattr(attention, "k_norm", None)
    keys, values = out["k"], out["v"].unflatten(-1, (-1, head_dim))
    if norm is not None and norm.weight.shape[0] == k.shape[1]:
        keys = norm(keys)
    keys = keys.unflatten(-1, (-1, head_dim))
    if norm is not None and norm.weight.shape[0] == head_dim != k.shape[1]:
        keys = norm(keys)
    groups = q.shape[1] // k.shape[1]
    if groups == 1:
        return keys, values
    return torch.repeat_interleave(keys, groups, 1), torch.repeat_interleave(values, groups, 1)
