"""`MixtureModel`: attaches a MixtureConfig to a stock transformers model, as a PEFT tuner."""

from __future__ import annotations

from typing import Any

import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake

from .. import stored
from ..recorder import Context
from ..router import Router
from ..spec import ConfigError
from . import attention, proof
from .architecture import DecoderLayer, decoder_layers, keep_layout, require_whole
from .config import PEFT_TYPE, MixtureConfig
from .layer import MixtureLayer
from .plan import Plan
from .sites import Site, layer_sites

CACHE_NAMES = ("cache", "past_key_values")
"""The KV cache among a model's inputs and outputs: from transformers 5.24 on, and before."""


class MixtureModel(BaseTuner):
    """The tuner that PEFT creates for MixtureConfig. Users reach it as `peft_model.base_model`."""

    prefix = "mixture"
    tuner_layer_cls = MixtureLayer
    target_module_mapping: dict[str, list[str]] = {}
    accepts_prompt_mask = True
    accepts_skill_ids = True

    def __init__(self, model, peft_config, adapter_name: str, **kwargs: Any) -> None:
        if not isinstance(peft_config, dict):  # PEFT's inject_adapter_in_model, which transformers calls
            raise ConfigError(
                "a mixture is attached with peft.get_peft_model(model, config) and loaded with "
                "peft.PeftModel.from_pretrained(model, folder); transformers' own add_adapter and "
                "load_adapter put it into the model without what generation and recording need."
            )
        self.__dict__["mixture_recorder"] = None
        self.__dict__["prompt_length"] = None  # while generating
        self.__dict__["prompt_padding"] = None
        self.__dict__["generating_skills"] = None
        super().__init__(model, peft_config, adapter_name, **kwargs)
        self.model.register_forward_pre_hook(self._open_context, with_kwargs=True)
        self.model.register_forward_hook(self._keep_gates, with_kwargs=True)
        self.model.register_forward_hook(self._close_context, always_call=True)

    # Attaching

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: MixtureConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """PEFT's hook for the tensors of a file, by the names that the model has. PEFT itself takes half an
        adapter, and writes a tensor that is named like one of the base's into the base."""
        found = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        own = cls._get_adapter_state_dict(model, config, adapter_name, model.state_dict(), [])
        declared = {
            name: tensor
            for name, tensor in own.items()
            if name != cls._remove_adapter_name_from_key(name, adapter_name)
        }
        stored.check(found, declared, f"adapter {adapter_name!r}: its file")
        return found

    def _prepare_adapter_config(self, peft_config: MixtureConfig, model_config: dict) -> MixtureConfig:
        if not peft_config.spec:
            raise ConfigError(
                "spec={}: expected a method as plain data; moabench.methods.load(name) gives a "
                "config that has one."
            )
        return peft_config

    def _prepare_model(self, peft_config: MixtureConfig, model: nn.Module) -> None:
        refuse_adapted(model)
        self._layers = decoder_layers(model)
        require_whole(model, self._layers)
        keep_layout(model)
        shape = {
            "layers": len(self._layers),
            "hidden_size": next(iter(self._described(model).values())).width,
        }
        wrong = {k: v for k, v in peft_config.base.items() if k in shape and shape[k] != v}
        if wrong:
            found = {k: shape[k] for k in wrong}
            raise ConfigError(
                f"adapter was made for another base: it expects {wrong}, this model has {found}."
            )
        peft_config.base = shape
        method = peft_config.method
        if outside := {i for span, _ in method.layers for i in span if i >= len(self._layers)}:
            raise ConfigError(
                f"layers: layer {min(outside)} is named, but this model's are 0 to {len(self._layers) - 1}."
            )
        # refuse before anything is attached
        described = list(self._described(model).values())
        plans = [Plan(method.in_layer(i), layer) for i, layer in enumerate(described)]
        adds = any(plan.attention for plan in plans)
        if adds:
            attention.route_attention(model)
        try:
            for plan, layer in zip(plans, described, strict=True):
                for seam in plan.seams if proof.possible(layer) else ():
                    seam.prove(model, layer)
        except ConfigError:
            if adds and not self._has_mixtures(model):
                attention.stock_attention(model)
            raise

    def _has_mixtures(self, model: nn.Module) -> bool:
        return any(isinstance(m, MixtureLayer) for m in model.modules())

    def _described(self, model: nn.Module) -> dict[str, DecoderLayer]:
        return {name: DecoderLayer(name, m, model.config) for name, m in self._layers.items()}

    def _check_target_module_exists(self, peft_config: MixtureConfig, key: str) -> bool:
        return key in self._layers

    def _create_and_replace(
        self, peft_config, adapter_name, target, target_name, parent, current_key, **kwargs
    ) -> None:
        if not hasattr(target, "mixture"):
            target.mixture = MixtureLayer(DecoderLayer(current_key, target, self.model.config))
        target.mixture.add(adapter_name, peft_config.method.in_layer(list(self._layers).index(current_key)))

    def mixture_layers(self) -> list[MixtureLayer]:
        """The MixtureLayer of each decoder layer, in order."""
        return [m for m in self.model.modules() if isinstance(m, MixtureLayer)]

    def set_adapter(self, adapter_name: str | list[str], *args: Any, **kwargs: Any) -> None:
        """Make one adapter the active one. Raises ConfigError for several: a mixture's output is that of one
        adapter, and they cannot be added up."""
        if not isinstance(adapter_name, str) and len(adapter_name) != 1:
            raise ConfigError(
                f"set_adapter({list(adapter_name)}): expected one adapter; mixtures are not combined."
            )
        super().set_adapter(adapter_name, *args, **kwargs)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove one adapter and its tensors."""
        super().delete_adapter(adapter_name)
        for layer in self.mixture_layers():  # PEFT passes over modules whose name holds our prefix
            layer.delete_adapter(adapter_name)
            layer.forget(adapter_name)
        self.active_adapter = list(self.mixture_layers()[0].active_adapters)

    def unload(self) -> nn.Module:
        """The base model without any wrapper or tensor of ours."""
        for layer in self.mixture_layers():
            layer.detach()
        attention.stock_attention(self.model)
        for hooks in (self.model._forward_pre_hooks, self.model._forward_hooks):
            for key, hook in list(hooks.items()):
                if getattr(hook, "__self__", None) is self:
                    del hooks[key]
        return self.model

    def _unload_and_optionally_merge(self, merge: bool = True, **kwargs: Any) -> nn.Module:
        if merge:
            raise ConfigError(
                "merge_and_unload: a mixture's update depends on the token, so it cannot be merged; "
                "use unload()."
            )
        return self.unload()

    def merge_adapter(self, *args: Any, **kwargs: Any) -> None:
        raise ConfigError("merge_adapter: a mixture's update depends on the token, so it cannot be merged.")

    # A forward pass

    def generate(self, *args: Any, skill_ids: Tensor | None = None, **kwargs: Any) -> Any:
        """The model's own. Without a KV cache every pass sees the whole text again; sequence routers must
        pool over the prompt alone.

        skill_ids [B]: true skill of each prompt, for routers that read it.
        """
        tokens = next(
            (kwargs[k] for k in ("inputs", "input_ids", "inputs_embeds") if kwargs.get(k) is not None),
            args[0] if args else None,
        )
        chunk = kwargs.get("prefill_chunk_size") or getattr(
            kwargs.get("generation_config") or self.model.generation_config, "prefill_chunk_size", None
        )
        if chunk and self._active_layers()[0].plan is not None and self._pools():
            raise ConfigError(
                f"prefill_chunk_size={chunk}: expected none, since a router of this adapter decides from the "
                "whole prompt, and would see its first part alone."
            )
        self.__dict__["prompt_length"] = None if tokens is None else tokens.shape[1]
        self.__dict__["prompt_padding"] = kwargs.get("attention_mask")
        self.__dict__["generating_skills"] = skill_ids
        try:
            return self.model.generate(*args, **kwargs)
        finally:
            for name in ("prompt_length", "prompt_padding", "generating_skills"):
                self.__dict__[name] = None

    def _open_context(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]):
        prompt, skills = kwargs.pop("prompt_mask", None), kwargs.pop("skill_ids", None)
        if all(layer.plan is None for layer in self._active_layers()):
            return args, kwargs
        names = ("input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds", "labels")
        given = dict(zip(names, args, strict=False)) | kwargs
        tokens = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
        length = tokens.shape[1]
        mask = given.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2:
            mask = mask[:, -length:].bool()
        elif mask is not None and self.prompt_length is not None:  # a static cache's mask, made by generate()
            padding = self.prompt_padding if length == self.prompt_length else None
            mask = None if padding is None else padding.bool()
        elif mask is not None and (self.mixture_recorder is not None or self._pools()):
            raise ConfigError(
                "attention_mask: expected [batch, length] where routing is recorded or pooled; "
                "padding is not seen otherwise."
            )
        else:
            mask = None
        if given.get("attention_mask") is None and any(
            r.reads_prompt or r.granularity == "sequence" for r in self._routers()
        ):
            refuse_packed(given.get("position_ids"))
        cache = next((given[name] for name in CACHE_NAMES if given.get(name) is not None), None)
        labels = given.get("labels")
        if prompt is None and labels is not None:
            prompt = labels == -100
            if self._pools():
                check_prompts(prompt, mask)
        if prompt is None and self.prompt_length is not None:
            prompt = (torch.arange(length, device=tokens.device) < self.prompt_length).expand(
                tokens.shape[:2]
            )
        if self._active_layers()[0].plan.attention:
            # a no-op, unless somebody has set another implementation since
            attention.route_attention(self.model)
            if given.get("position_ids") is None and mask is not None and len(args) < 3:
                # Prompts have no positions, so that for them a shift by left padding is no mere shift.
                whole = given["attention_mask"].long().cumsum(-1) - 1
                kwargs = {**kwargs, "position_ids": whole.clamp(min=0)[:, -length:]}
        context = Context(
            mask=mask,
            prompt=None if prompt is None else prompt.bool(),
            shape=tuple(tokens.shape[:2]),
            input_ids=given.get("input_ids"),
            skill_ids=self._skills(skills, tokens),
            recorder=self.mixture_recorder,
            gates=dict(getattr(cache, "mixture_gates", {})),
            continues=cache is not None and cache.get_seq_length() > 0,
        )
        for layer in self._active_layers():
            layer.pending = context
        return args, {**kwargs, "mixture_context": context}

    def _close_context(self, module: nn.Module, args: tuple, output: Any) -> None:
        for layer in self._active_layers():
            layer.pending = None

    def _routers(self) -> list[Router]:
        """Of the active adapter."""
        return [mixture.router for mixture in self._active_layers()[0].plan.mixtures]

    def _pools(self) -> bool:
        """True where a router of the active adapter reads the prompt as a whole."""
        return any(router.reads_prompt for router in self._routers())

    def _skills(self, given: Tensor | None, tokens: Tensor) -> Tensor | None:
        """Skill ids [B] for the routers that read them, checked; None where none does or none were given."""
        if not any(router.reads_skills(self.training) for router in self._routers()):
            return None
        count = tokens.shape[0]
        if given is None and self.generating_skills is not None:
            given = self.generating_skills
            # beams and returned sequences of a prompt lie together
            if given.dim() == 1 and len(given) and count % len(given) == 0:
                given = given.repeat_interleave(count // len(given))
        if given is None:
            return None
        return checked_skills(given, count, self._labels()).to(tokens.device)

    def _labels(self) -> int | None:
        """How many labels the routers know that are taught by them; None where no router is."""
        counts = [
            len(mixture.expert_names)
            for layer in self._active_layers()
            for mixture in layer.plan.mixtures
            if mixture.router.reads_skills(self.training) and not mixture.router.reads_facts
        ]
        return min(counts, default=None)

    def _active_layers(self) -> list[MixtureLayer]:
        layers = self.__dict__.get("_layer_list")
        if layers is None:
            layers = self.__dict__["_layer_list"] = self.mixture_layers()
        return layers

    def _keep_gates(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        context = kwargs.get("mixture_context")
        cache = next(
            (found for name in CACHE_NAMES if (found := getattr(output, name, None)) is not None), None
        )
        if context is None or not context.gates or cache is None or hasattr(cache, "mixture_gates"):
            return
        cache.mixture_gates = context.gates
        for name in ("reorder_cache", "batch_repeat_interleave", "batch_select_indices"):
            setattr(cache, name, _following(cache, getattr(cache, name), name))
        cache.reset = _forgetting(cache, cache.reset)

    # What a user asks

    def sites(self) -> list[Site]:
        """Routers and banks of the active adapter, place by place, with their tensors."""
        return [site for layer in self.mixture_layers() for site in layer_sites(layer)]


def refuse_packed(positions: Tensor | None) -> None:
    """ConfigError for position_ids [B, L] that restart within a row. Without a mask transformers reads such a
    row as several sequences, and a decision once a sequence would be one for all of them."""
    if positions is not None and positions.dim() == 2 and bool((positions.diff(dim=-1) != 1).any()):
        raise ConfigError(
            "position_ids: they restart within a row, which packs several sequences into it; expected one "
            "sequence a row (padded, with an attention_mask) where a router decides once a sequence."
        )


def refuse_adapted(model: nn.Module) -> None:
    """Raise ConfigError for a model that carries another tuner's layers: a mixture runs the frozen modules
    under them, and they would be lost."""
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and not isinstance(module, MixtureLayer):
            raise ConfigError(
                f"{name} is a {type(module).__module__}.{type(module).__name__}: this model has an adapter "
                "of PEFT already, which a mixture would not run. Expected a model without one: "
                "merge_and_unload() or unload() it first."
            )


def checked_skills(ids: Tensor, count: int, labels: int | None = None) -> Tensor:
    """`ids` [count] int64, all at least 0, and below `labels` where they are labels. Raises ConfigError; on a
    GPU a wrong id stops the device instead, without a wait."""
    if ids.dtype != torch.int64 or tuple(ids.shape) != (count,):
        found = f"{tuple(ids.shape)} {str(ids.dtype).removeprefix('torch.')}"
        raise ConfigError(f"skill_ids={found}: expected ({count},) int64, the id of each sequence's skill.")
    if labels is None:
        what = "expected ids from 0 on; -1 is a row whose skill is unknown, and an oracle cannot route it."
    else:
        what = f"expected 0 to {labels - 1}, since the router has {labels} experts, one for each label."
    wrong = ids < 0 if labels is None else (ids < 0) | (ids >= labels)
    if ids.device.type != "cpu" or is_fake(ids):
        torch._assert_async(~wrong.any(), f"skill_ids: {what}")
    elif (rows := wrong.nonzero()).numel():
        row = int(rows[0])
        raise ConfigError(f"skill_ids[{row}]={int(ids[row])}: {what}")
    return ids


def check_prompts(prompt: Tensor, mask: Tensor | None) -> None:
    """Raise ConfigError unless every sequence has a real token that its labels leave out: routers would take
    the first token for all of the prompt. On a GPU the device stops instead, without a wait."""
    there = (prompt if mask is None else prompt & mask).any(1)
    what = (
        "expected -100 at the prompt's tokens, or prompt_mask, since a router of this adapter decides from "
        "the prompt and labels=input_ids does not say where it ends."
    )
    try:
        torch._assert_async(there.all(), f"labels: a sequence has no -100; {what}")
    except RuntimeError as error:  # on a CPU, at once
        raise ConfigError(str(error)) from None


def _forgetting(cache: Any, reset: Any):
    """A cache's `reset` that also drops the sequence decisions kept beside it: the next text is another
    one."""

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if hasattr(cache, "mixture_gates"):
            del cache.mixture_gates
        for name in ("reorder_cache", "batch_repeat_interleave", "batch_select_indices", "reset"):
            cache.__dict__.pop(name, None)
        return reset(*args, **kwargs)

    return wrapped


def _following(cache: Any, method: Any, name: str):
    """A cache method that also reorders, repeats or selects the sequence decisions kept beside the cache."""
    change = {
        "reorder_cache": lambda t, beams: t.index_select(0, beams.to(t.device)),
        "batch_repeat_interleave": lambda t, repeats: t.repeat_interleave(repeats, dim=0),
        "batch_select_indices": lambda t, indices: t[indices],
    }[name]

    def wrapped(argument):
        cache.mixture_gates = {
            k: r.map(lambda t: change(t, argument)) for k, r in cache.mixture_gates.items()
        }
        return method(argument)

    return wrapped


def param_count(model: nn.Module) -> dict[str, int]:
    """Number of parameters: `trainable`, `total`, and of the active mixture `routers`, `experts` and each
    bank's own share.

    `total` counts the base too. Where no mixture is attached, only the first two are given.
    """
    counts = {
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "total": sum(p.numel() for p in model.parameters()),
    }
    for layer in (m for m in model.modules() if isinstance(m, MixtureLayer)):
        for name, tensor in layer.tensors[layer.active_adapters[0]]._parameters.items():
            part = name.split("__")[1]
            kinds = ("routers",) if part == "router" else ("experts", part)
            for kind in kinds:
                counts[kind] = counts.get(kind, 0) + tensor.numel()
    return counts


def register() -> None:
    """Make PEFT know the tuner, so that get_peft_model, save_pretrained and PeftModel.from_pretrained
    work."""
    PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE] = MixtureConfig
    PEFT_TYPE_TO_TUNER_MAPPING[PEFT_TYPE] = MixtureModel
    PEFT_TYPE_TO_PREFIX_MAPPING[PEFT_TYPE] = MixtureModel.prefix
