"""`adapter/` of a run: what PEFT writes, and beside it what base it was made for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moabench.benchmarks.config.run import RunConfig
from moabench.benchmarks.machine import files
from moabench.methods.spec import ConfigError


def save_adapter(cfg: RunConfig, path: Path, inputs: dict[str, Any], model: Any) -> None:
    """`adapter/`: what PEFT writes (for method=full the whole model), and in base.json what it was made
    for."""

    def fill(folder: Path) -> None:
        model.save_pretrained(str(folder))
        config = folder / "adapter_config.json"
        # PEFT notes the place the base was read from; outside this machine only its name means something
        if config.exists():
            origin = {"base_model_name_or_path": cfg.model.path or f"moabench:{cfg.model.name}"}
            files.write_json(config, files.read_json(config) | origin)
        card = {
            "name": cfg.model.name,
            "path": cfg.model.path,
            "revision": cfg.model.revision,
            "fingerprint": inputs["model"],
        }
        files.write_json(folder / "base.json", card | {"sizes": base_sizes(model)})

    files.write_folder(path / "adapter", fill)


SIZES = (
    "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "vocab_size",
)  # fmt: skip
"""What an adapter needs its base to agree with, as transformers' configs call it."""


def base_sizes(model: Any) -> dict[str, Any]:
    """The `SIZES` of a model."""
    return {key: getattr(model.config, key, None) for key in SIZES}


def load_adapter(model: Any, folder: str | Path) -> Any:
    """`model` with the trained adapter of a run (`<run>/adapter`). Raises ConfigError if it was made for
    another base."""
    folder = Path(folder)
    if not (folder / "adapter_config.json").is_file():
        raise ConfigError(
            f"adapter={str(folder)!r}: no adapter_config.json in it; expected the adapter/ folder of "
            "a finished run."
        )
    card: Mapping[str, Any] = files.read_json(folder / "base.json") or {}
    sizes = base_sizes(model)
    for key, value in (card.get("sizes") or {}).items():
        if sizes[key] != value:
            made_for = f"made for {card.get('name')} with {key}={value}"
            raise ConfigError(
                f"adapter={str(folder)!r}: {made_for}, but this base has {key}={sizes[key]}. Expected "
                "the same base."
            )
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(model, str(folder))
    except (RuntimeError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"adapter={str(folder)!r}: does not fit this base ({reason}). Expected the base it was made for."
        ) from error
