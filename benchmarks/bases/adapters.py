"""`adapter/` of a run: what PEFT writes, and beside it what base it was made for.

An adapter may come from a stranger. Its config is data, and only what our methods write in it is read; its
tensors are safetensors, taken where they are all that the config declares and nothing else.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moabench.benchmarks.config.hashing import digest
from moabench.benchmarks.config.run import RunConfig
from moabench.benchmarks.machine import files
from moabench.methods.bank import Experts
from moabench.methods.spec import ConfigError, Count, Positive, Share, build

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import Tensor


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
        card |= {"sizes": base_sizes(model)}
        files.write_json(folder / "base.json", card | (contents(folder) if config.exists() else {}))

    files.write_folder(path / "adapter", fill)


def contents(folder: Path) -> dict[str, Any]:
    """What tells whether an adapter is what was written: hashes of its config, but for `IDENTITY`, and of its
    tensors."""
    config = {k: v for k, v in (files.read_json(folder / CONFIG) or {}).items() if k not in IDENTITY}
    with (folder / TENSORS).open("rb") as file:
        return {
            "contents": {CONFIG: digest(config), TENSORS: hashlib.file_digest(file, "sha256").hexdigest()}
        }


CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
SIZES = (
    "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "vocab_size",
)  # fmt: skip
"""What an adapter needs its base to agree with, as transformers' configs call it."""


def base_sizes(model: Any) -> dict[str, Any]:
    """The `SIZES` of a model."""
    return {key: getattr(model.config, key, None) for key in SIZES}


def load_adapter(model: Any, folder: str | Path, fingerprint: str | None = None) -> Any:
    """`model` with the trained adapter of a run (`<run>/adapter`), in evaluation mode.

    fingerprint: of the model's files (`model_fingerprint(...).digest`); None is not compared. Raises
    ConfigError if the adapter was made for another base, is no adapter of ours, or its tensors are not
    exactly what its config declares; `model` is then as it was.
    """
    folder = Path(folder)
    what = f"adapter={str(folder)!r}"
    if getattr(model, "peft_config", None):
        raise ConfigError(f"{what}: expected a base without an adapter; this one has some already.")
    data = _mapping(folder / CONFIG, what)
    card = _mapping(folder / "base.json", what, needed=False)
    _check_base(model, card, fingerprint, what)
    stored = _tensors(folder / TENSORS, what)
    if "contents" in card and card["contents"] != contents(folder)["contents"]:
        raise ConfigError(
            f"{what}: {CONFIG} or {TENSORS} is not what the run wrote, by the hashes in base.json. Expected "
            "the adapter/ folder as it was."
        )
    try:
        config = _config(data, max((n for t in stored.values() for n in t.shape), default=0), model, what)
        return _attached(model, config, stored, what)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        if isinstance(error, ConfigError):
            raise ConfigError(reason if reason.startswith("adapter") else f"{what}: {reason}") from error
        raise ConfigError(
            f"{what}: does not fit this base ({reason[:300]}). Expected the base it was made for."
        ) from error


def _attached(model: Any, config: PeftConfig, stored: Mapping[str, Tensor], what: str) -> Any:
    import torch
    from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    from moabench.methods.stored import check

    with torch.device("meta"):  # takes no memory, and the model is touched by a good adapter only
        skeleton = get_peft_model(type(model)(copy.deepcopy(model.config)), copy.deepcopy(config))
    check(stored, get_peft_model_state_dict(skeleton, save_embedding_layers=False), f"{what}: its file")
    adapted = get_peft_model(model, config).eval()
    set_peft_model_state_dict(adapted, dict(stored))
    return adapted


def _mapping(file: Path, what: str, needed: bool = True) -> dict[str, Any]:
    """A JSON file of the folder. Raises ConfigError."""
    try:
        found = files.read_json(file)
    except files.Unreadable as error:
        raise ConfigError(f"{what}: {error.said(file.parent)}") from error
    if found is None and needed:
        raise ConfigError(f"{what}: no {file.name} in it; expected the adapter/ folder of a finished run.")
    return found or {}


def _check_base(model: Any, card: Mapping[str, Any], fingerprint: str | None, what: str) -> None:
    """Raises ConfigError where `card`, the content of base.json, names another base."""
    found, wanted = base_sizes(model), card.get("sizes") or {}
    if not isinstance(wanted, dict) or not wanted.keys() <= found.keys():
        raise ConfigError(f"{what}: base.json has sizes={wanted!r}; expected some of {', '.join(SIZES)}.")
    for key, value in wanted.items():
        if found[key] != value:
            raise ConfigError(
                f"{what}: made for {card.get('name')} with {key}={value}, but this base has "
                f"{key}={found[key]}. Expected the same base."
            )
    known = card.get("fingerprint")
    if None not in (known, fingerprint) and known != fingerprint:
        raise ConfigError(
            f"{what}: made for {card.get('name')} with the fingerprint {known}, but this base has "
            f"{fingerprint}: its sizes are the same and its weights, tokenizer or configs are not. Expected "
            "the same base."
        )


def _tensors(file: Path, what: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file, mapped into memory and not read. Raises ConfigError."""
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        raise ConfigError(f"{what}: no {file.name} in it; expected weights as safetensors, and no others.")
    try:
        with safe_open(file, "pt") as stored:
            found = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118  it is no mapping
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"{what}: {file.name} is broken or cut ({reason}).") from error
    if not found:
        raise ConfigError(f"{what}: {file.name} holds no tensor.")
    return found


# ---- the config of an adapter

LAYERS = re.compile(r"layers\\\.\(\d+(\|\d+)*\)\\\.\.\*")
"""How our methods name the layers of a LoRA with ranks of their own. Another expression could take for ever
to match."""


@dataclass(frozen=True)
class _LoRA:
    """What our methods set in PEFT's LoraConfig; everything else is at PEFT's default."""

    r: Count
    target_modules: tuple[str, ...]
    lora_alpha: Positive = 8.0
    lora_dropout: Share = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    rank_pattern: dict = field(default_factory=dict)
    alpha_pattern: dict = field(default_factory=dict)


IDENTITY = (
    "peft_type", "task_type", "inference_mode", "base_model_name_or_path", "revision", "auto_mapping",
    "peft_version",
)  # fmt: skip
"""Keys of a PEFT config that change nothing in how it computes."""


def _config(data: Mapping[str, Any], largest: int, model: Any, what: str) -> PeftConfig:
    """The PEFT config, made anew from the keys that our methods write. largest: dimension of a tensor in the
    file. Raises ConfigError, also for sizes that the file has no tensors for, before anything is made of
    them."""
    from moabench.methods.tuner import MixtureConfig

    kind, spec = data.get("peft_type"), data.get("spec")
    if kind == "LORA":
        return _lora(data, largest, what)
    if kind != MixtureConfig().peft_type:
        raise ConfigError(f"{what}: peft_type={kind!r}; expected {MixtureConfig().peft_type} or LORA.")
    base = data.get("base") or {}
    if not isinstance(spec, dict) or not spec or not isinstance(base, dict):
        raise ConfigError(f"{what}: spec={spec!r}, base={base!r}; expected a method as plain data.")
    depth = model.config.get_text_config().num_hidden_layers
    for path, value in _sizes(spec, "spec"):
        in_layers = path.endswith(".layers")
        if value > (limit := depth - 1 if in_layers else largest):
            beyond = "the last layer of this base" if in_layers else "every dimension of its file's tensors"
            raise ConfigError(f"{what}: {path} has {value}, beyond {beyond} ({limit}).")
    return MixtureConfig(spec=spec, base=base, task_type="CAUSAL_LM", inference_mode=True)


@functools.cache
def _counts() -> set[str]:
    """Options of experts that are sizes, by their types."""
    options = {f.name: str(f.type) for part in Experts.kinds().values() for f in dataclasses.fields(part)}
    return {name for name, hint in options.items() if re.search(r"\b(Count|int)\b", hint) and name != "seed"}


def _sizes(data: Any, path: str, counted: bool = False) -> Iterator[tuple[str, int]]:
    """(key, number) of the sizes of experts, and of the layers in the keys of `layers`."""
    if isinstance(data, list):
        for part in data:
            yield from _sizes(part, path, counted)
    elif isinstance(data, dict):
        for key, part in data.items():
            if key == "layers" and isinstance(part, dict):
                yield from ((f"{path}.layers", int(n[:9])) for name in part for n in re.findall(r"\d+", name))
            yield from _sizes(part, f"{path}.{key}", ".experts" in path and key in _counts())
    elif counted and isinstance(data, int):
        yield path, data


def _lora(data: Mapping[str, Any], largest: int, what: str) -> PeftConfig:
    from peft import LoraConfig

    own = _LoRA.__dataclass_fields__.keys()
    default = json.loads(json.dumps(LoraConfig().to_dict(), default=str))
    for key, value in data.items():
        if key not in (*own, *IDENTITY) and value is not None and value != default.get(key):
            raise ConfigError(f"{what}: {key}={value!r}; expected {default.get(key)}, as in our methods.")
    if not isinstance(data.get("target_modules"), list):  # PEFT reads a text as an expression
        raise ConfigError(f"{what}: target_modules={data.get('target_modules')!r}; expected a list of names.")
    found = build(_LoRA, {key: value for key, value in data.items() if key in own}, "adapter_config")
    ranks = {"r": found.r, **found.rank_pattern}
    for pattern, number in (*ranks.items(), *found.alpha_pattern.items()):
        if pattern != "r" and not LAYERS.fullmatch(pattern):
            raise ConfigError(f"{what}: {pattern!r} names no layers as our methods do.")
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise ConfigError(f"{what}: {number!r} for {pattern!r}; expected a number.")
    for pattern, rank in ranks.items():
        if not (isinstance(rank, int) and 1 <= rank <= largest):
            raise ConfigError(f"{what}: rank {rank} for {pattern!r}; its file has 1 to {largest}.")
    options = vars(found) | {"target_modules": list(found.target_modules)}
    return LoraConfig(**options, task_type="CAUSAL_LM", inference_mode=True)
