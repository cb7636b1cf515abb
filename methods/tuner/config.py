"""`MixtureConfig`: a method as a PEFT config. The spec in it is plain data that names parts by kind; loading
one runs no code it names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from peft import LoraConfig, PeftConfig, get_peft_model
from torch import nn

from .. import catalog
from ..catalog import Method
from ..experts.lora import LoRA
from ..spec import ConfigError
from .architecture import PEFT_NAMES, DecoderLayer, decoder_layers, keep_layout, require_whole

PEFT_TYPE = "MIXTURE"


@dataclass
class MixtureConfig(PeftConfig):
    """A mixture of adapters for `peft.get_peft_model`.

    spec: the method as plain data, as in conf/method/<name>.yaml. base: what the adapter was made for,
    checked when it is attached (hidden size and number of layers). Raises ConfigError where the spec does not
    validate.
    """

    spec: dict[str, Any] = field(default_factory=dict)
    base: dict[str, Any] = field(default_factory=dict)
    target_modules: str | None = None  # PEFT reads it; the spec says where a mixture attaches

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        if self.spec:
            method = self.method
            if method.tuner != "mixture":
                raise ConfigError(
                    f"spec.tuner={method.tuner!r}: expected 'mixture'; "
                    f"moabench.methods.load('{method.name}') gives its config."
                )

    @property
    def method(self) -> Method:
        """The validated method."""
        return catalog.parse(self.spec, "spec")


def peft_config(data: dict[str, Any]) -> PeftConfig:
    """PEFT config of a method given as plain data: MixtureConfig, or LoraConfig for tuner=peft.

    Raises ConfigError for methods without an adapter (full, none).
    """
    method = catalog.parse(data)
    if method.tuner == "mixture":
        return MixtureConfig(spec=dict(data), task_type="CAUSAL_LM")
    if method.tuner == "peft":
        bank = _only_bank(method)
        banks = {
            rf"layers\.({'|'.join(map(str, span))})\..*": _only_bank(variant)
            for span, variant in method.layers
        }
        return LoraConfig(
            r=bank.r,
            lora_alpha=bank.alpha,
            rank_pattern={layers: b.r for layers, b in banks.items()},
            alpha_pattern={layers: b.alpha for layers, b in banks.items()},
            lora_dropout=bank.dropout,
            use_rslora=bank.rslora,
            use_dora=method.dora,
            target_modules=sorted({name for role in bank.targets for name in PEFT_NAMES[role]}),
            task_type="CAUSAL_LM",
        )
    raise ConfigError(
        f"method={method.name!r}: has no adapter config; moabench.methods.attach(model, ...) prepares it."
    )


def _only_bank(method: Method) -> LoRA:
    return next(iter(method.mixtures[0].banks.values()))


def load(name: str, **overrides: Any) -> PeftConfig:
    """Config of a shipped method for `peft.get_peft_model`, with nested overrides: `load("moe_lora_topk",
    router={"k": 1})`.

    Raises ConfigError for an unknown method or option.
    """
    return peft_config(catalog.override(catalog.raw(name), overrides))


def attach(model: nn.Module, data: Mapping[str, Any]) -> nn.Module:
    """`model` under the method given as plain data: a PeftModel, or for `full` and `none` the model itself
    with every or no parameter trainable. Attach after the base's weights are loaded: a model class
    re-initialises modules it does not find in its checkpoint.

    Raises ConfigError for a spec that does not validate or an architecture without the modules it needs.
    """
    method = catalog.parse(data)
    if method.tuner in ("full", "none"):
        return model.requires_grad_(method.tuner == "full")
    keep_layout(model)  # PEFT's own tuners do not
    config = peft_config(dict(data))
    if method.tuner == "peft":
        _require_targets(model, config, method)
    return get_peft_model(model, config)


def _require_targets(model: nn.Module, config: LoraConfig, method: Method) -> None:
    """PEFT adapts whatever it finds of the targets, wherever it lies, and says nothing of the rest:
    ConfigError unless every text layer has them all, and nothing else has."""
    layers = decoder_layers(model)
    require_whole(model, layers)
    inside = {id(m) for layer in layers.values() for m in layer.modules()}
    for name, layer in layers.items():
        DecoderLayer(name, layer, model.config).require(_only_bank(method).targets)
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in config.target_modules and id(module) not in inside:
            raise ConfigError(
                f"{name}: tuner=peft would adapt it too, since PEFT goes by names, and it is no part of a "
                "text layer; expected a model of text alone."
            )
