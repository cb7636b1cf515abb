"""The base model and its tokenizer, by the config group `model`. Nothing is frozen or adapted here."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from moabench.methods.spec import ConfigError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from moabench.benchmarks.config.sections import ModelConfig


def load_model(cfg: ModelConfig, seed: int, device: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """(model on `device`, in evaluation mode; tokenizer with a pad token). `seed` draws the weights of a
    random model.

    Raises ConfigError for what cannot be loaded.
    """
    check_folder(cfg)
    tokenizer = _tokenizer(cfg)
    model = _random(cfg, tokenizer, seed) if cfg.kind == "random" else _pretrained(cfg, device)
    if cfg.quantize:
        from moabench.methods.tuner.architecture import keep_layout

        keep_layout(model)  # the frozen base is evaluated before anything is attached
    return (model if cfg.quantize else model.to(device)).eval(), tokenizer


def skeleton(cfg: ModelConfig) -> PreTrainedModel:
    """The base without weights, on the meta device: for counting. Needs the model's config alone. Raises
    ConfigError."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    check_folder(cfg)
    if cfg.kind == "random":
        tokenizer = _tokenizer(cfg)
        with torch.device("meta"):
            return _random(cfg, tokenizer, seed=0)
    with _one_error(cfg), torch.device("meta"):
        config = AutoConfig.from_pretrained(cfg.folder or cfg.source, revision=cfg.revision or "main")
        return AutoModelForCausalLM.from_config(
            config, attn_implementation=cfg.attention, dtype=getattr(torch, cfg.dtype)
        )


def check_folder(cfg: ModelConfig) -> None:
    """ConfigError where a local folder lacks what is needed; a hub id is left to `from_pretrained`."""
    folder = cfg.folder
    if folder is None:
        return
    wanted = {"tokenizer.json": ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")}
    if cfg.kind != "random":
        wanted = {
            "config.json": ("config.json",),
            "weights (*.safetensors)": ("*.safetensors", "pytorch_model*.bin"),
        } | wanted
    what = f"model={cfg.name}, model.path={cfg.path!r}"
    hint = (
        "expected a folder written by save_pretrained"
        if cfg.kind == "pretrained"
        else "`make base` builds it"
    )
    if not folder.is_dir():
        raise ConfigError(f"{what}: no folder {folder}; {hint}, or a hub id (owner/name).")
    for part, patterns in wanted.items():
        if not any(any(folder.glob(pattern)) for pattern in patterns):
            raise ConfigError(f"{what}: no {part} in {folder}; {hint}.")


def _tokenizer(cfg: ModelConfig) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    with _one_error(cfg):
        tokenizer = AutoTokenizer.from_pretrained(cfg.folder or cfg.source, revision=cfg.revision or "main")
    if tokenizer.pad_token_id is None:  # padding is masked everywhere, so any existing token will do
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _pretrained(cfg: ModelConfig, device: str) -> PreTrainedModel:
    import torch
    from transformers import AutoModelForCausalLM

    options = {"dtype": getattr(torch, cfg.dtype), "attn_implementation": cfg.attention}
    if cfg.quantize:
        options |= {"quantization_config": _quantization(cfg), "device_map": {"": device}}
    with _one_error(cfg):
        return AutoModelForCausalLM.from_pretrained(
            cfg.folder or cfg.source, revision=cfg.revision or "main", **options
        )


def _quantization(cfg: ModelConfig):
    """4-bit NF4 with double quantisation (QLoRA, arXiv 2305.14314) or 8-bit; computation stays in
    `model.dtype`."""
    if importlib.util.find_spec("bitsandbytes") is None:
        hint = 'pip install "moabench[quantise]"'
        raise ConfigError(
            f"model.quantize={cfg.quantize}: needs the package bitsandbytes, which is not installed; "
            f"{hint}, or expected null."
        )
    import torch
    from transformers import BitsAndBytesConfig

    if cfg.quantize == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    dtype = getattr(torch, cfg.dtype)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def _random(cfg: ModelConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    """An untrained model with the tokenizer's vocabulary: for tests and dry runs, it knows nothing."""
    import torch
    from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

    sizes = cfg.random
    if sizes.architecture not in CONFIG_MAPPING:
        known = nearest(sizes.architecture, CONFIG_MAPPING)
        raise ConfigError(
            f"model.random.architecture={sizes.architecture!r}: no such model_type of transformers.{known}"
        )
    with _one_error(cfg), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = AutoConfig.for_model(
            sizes.architecture,
            hidden_size=sizes.hidden,
            intermediate_size=sizes.intermediate,
            num_hidden_layers=sizes.layers,
            num_attention_heads=sizes.heads,
            num_key_value_heads=sizes.kv_heads,
            head_dim=sizes.hidden // sizes.heads,
            vocab_size=len(tokenizer),
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        return AutoModelForCausalLM.from_config(
            config, attn_implementation=cfg.attention, dtype=getattr(torch, cfg.dtype)
        )


@contextmanager
def _one_error(cfg: ModelConfig) -> Iterator[None]:
    """Turns whatever transformers and the hub client raise into one ConfigError with the first line of their
    reason."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # they raise a dozen types, safetensors its own
        reason = next(
            (line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__
        )
        raise ConfigError(
            f"model={cfg.name}, model.path={cfg.path!r} (dtype={cfg.dtype}, attention={cfg.attention}) could "
            f"not be loaded: {reason} Expected a hub id within reach (a network, or a filled cache and "
            "HF_HUB_OFFLINE=1) or what save_pretrained writes."
        ) from error
