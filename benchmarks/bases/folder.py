"""The folder of a base, judged by its names and small files before torch is imported."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moabench.methods.spec import ConfigError

from . import gguf

if TYPE_CHECKING:
    from moabench.benchmarks.config.sections import ModelConfig


def check_folder(cfg: ModelConfig) -> None:
    """ConfigError where a local folder lacks what is needed, or holds what must not be read in silence or
    run, and for a GGUF file that cannot be read; a hub id is left to `from_pretrained`."""
    if cfg.gguf is not None:
        return gguf.check(cfg)
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
    if cfg.kind == "pretrained" and (folder / "adapter_config.json").exists():
        raise with_adapter(cfg)
    for part, patterns in wanted.items():
        if not any(any(folder.glob(pattern)) for pattern in patterns):
            raise ConfigError(f"{what}: no {part} in {folder}; {hint}.")
    if cfg.kind != "pretrained":
        return
    for shard in _shards(folder):
        if Path(shard).name != shard or not (folder / shard).is_file():
            raise ConfigError(
                f"{what}: the index of its weights names {shard!r}, which is no file in {folder}; {hint}."
            )
    if not cfg.trust_remote_code and _needs_code(folder):
        raise own_code(cfg)


def with_adapter(cfg: ModelConfig) -> ConfigError:
    """The error for a base that comes with a PEFT adapter."""
    return ConfigError(
        f"model={cfg.name}, model.path={cfg.path!r}: holds a PEFT adapter (adapter_config.json), which "
        "would be in the frozen base and be lost where a method is attached. Expected a model alone: PEFT's "
        "merge_and_unload and save_pretrained make one of the two, or name the adapter's base."
    )


def own_code(cfg: ModelConfig) -> ConfigError:
    """The error for a base that only its own Python files can load."""
    return ConfigError(
        f"model={cfg.name}, model.path={cfg.path!r}: transformers has no such architecture or tokenizer; "
        "it is made by Python files that come with the model (auto_map), and nothing of them was run. "
        "Expected a model that transformers knows; or, where you have read these files and trust them, "
        "model.trust_remote_code=true on the command line."
    )


def _needs_code(folder: Path) -> bool:
    """Whether transformers would ask for the folder's code: it does not for what it has a class of its own
    for."""
    config = _read(folder / "config.json")
    if "auto_map" not in config:
        return False
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return config.get("model_type") not in CONFIG_MAPPING_NAMES


def _shards(folder: Path) -> Iterator[str]:
    """The files that an index of weights names."""
    for index in folder.glob("*.index.json"):
        names = _read(index).get("weight_map")
        yield from sorted({str(name) for name in names.values()}) if isinstance(names, dict) else ()


def _read(file: Path) -> dict[str, Any]:
    """A JSON file; empty where it holds something else, which the loader then words."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
