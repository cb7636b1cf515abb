"""The base model and its tokenizer, by the config group `model`. Nothing is frozen or adapted here."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from moabench.methods.spec import ConfigError, nearest

from . import gguf
from .fingerprint import model_fingerprint
from .folder import check_folder, own_code

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from moabench.benchmarks.config.sections import ModelConfig


def load_model(cfg: ModelConfig, seed: int, device: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """(model on `device`, in evaluation mode; tokenizer with a pad token). `seed` draws the weights of a
    random model.

    Raises ConfigError for what cannot be loaded.
    """
    check_folder(cfg)
    cfg = _readable(cfg)
    tokenizer = load_tokenizer(cfg)
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
    cfg = _readable(cfg)
    if cfg.kind == "random":
        tokenizer = load_tokenizer(cfg)
        with torch.device("meta"):
            return _random(cfg, tokenizer, seed=0)
    with _one_error(cfg), torch.device("meta"):
        config = AutoConfig.from_pretrained(**_place(cfg))
        return AutoModelForCausalLM.from_config(
            config,
            attn_implementation=cfg.attention,
            dtype=getattr(torch, cfg.dtype),
            trust_remote_code=cfg.trust_remote_code,
        )


def _readable(cfg: ModelConfig) -> ModelConfig:
    """What `from_pretrained` can read: a GGUF file is converted first. Raises ConfigError."""
    if cfg.gguf is None:
        return cfg
    return gguf.converted(cfg, model_fingerprint(cfg, gguf.cache()).digest)


def _place(cfg: ModelConfig) -> dict[str, Any]:
    """Where `from_pretrained` reads, and whether it may run what it finds there: said at every call, since
    transformers asks on the terminal otherwise."""
    return {
        "pretrained_model_name_or_path": cfg.folder or cfg.source,
        "revision": cfg.revision or "main",
        "trust_remote_code": cfg.trust_remote_code,
    }


def load_tokenizer(cfg: ModelConfig) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    cfg = _readable(cfg)
    with _one_error(cfg):
        tokenizer = AutoTokenizer.from_pretrained(**_place(cfg))
    if tokenizer.pad_token_id is None:  # padding is masked everywhere, so any existing token will do
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _pretrained(cfg: ModelConfig, device: str) -> PreTrainedModel:
    import torch
    from transformers import AutoModelForCausalLM

    from . import complete

    options = {"dtype": getattr(torch, cfg.dtype), "attn_implementation": cfg.attention}
    if cfg.quantize:
        options |= {"quantization_config": _quantization(cfg), "device_map": {"": device}}
    with _one_error(cfg), _without_report():
        model, report = AutoModelForCausalLM.from_pretrained(
            **_place(cfg), **options, output_loading_info=True, ignore_mismatched_sizes=True
        )
    complete.check(cfg, model, report)
    return model


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
            config,
            attn_implementation=cfg.attention,
            dtype=getattr(torch, cfg.dtype),
            trust_remote_code=False,
        )


@contextmanager
def _without_report() -> Iterator[None]:
    """Without transformers' table of tensors that did not fit: they are one error of ours."""
    logger = logging.getLogger("transformers.modeling_utils")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def _one_error(cfg: ModelConfig) -> Iterator[None]:
    """Turns whatever transformers and the hub client raise into one ConfigError with the first line of their
    reason."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # they raise a dozen types, safetensors its own
        if "trust_remote_code" in str(error):
            raise own_code(cfg) from error
        reason = next(
            (line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__
        )
        raise ConfigError(
            f"model={cfg.name}, model.path={cfg.path!r} (dtype={cfg.dtype}, attention={cfg.attention}) could "
            f"not be loaded: {reason} Expected a hub id within reach (a network, or a filled cache and "
            "HF_HUB_OFFLINE=1) or what save_pretrained writes."
        ) from error
