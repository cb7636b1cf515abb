"""Whether a base is what its files say: every tensor was there, none is left over, all numbers are finite."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from moabench.methods.spec import ConfigError
from moabench.methods.stored import is_finite, listed

from .folder import with_adapter

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from moabench.benchmarks.config.sections import ModelConfig


def check(cfg: ModelConfig, model: PreTrainedModel, report: Mapping[str, Any]) -> None:
    """Raises ConfigError naming what is wrong with a loaded base. report: transformers' loading info, in
    which tied weights and what the architecture itself ignores do not appear."""
    if getattr(model, "_hf_peft_config_loaded", False):
        raise with_adapter(cfg)
    what = f"model={cfg.name}, model.path={cfg.path!r}"
    # transformers draws the first and the last at random and passes over the second
    for kind, names in {
        "lack": sorted(report["missing_keys"]),
        "hold, but the model has no place for,": sorted(report["unexpected_keys"]),
        "have another shape for": [
            f"{name} ({tuple(there)}, expected {tuple(wanted)})"
            for name, there, wanted in sorted(report["mismatched_keys"])
        ],
    }.items():
        if names:
            raise ConfigError(
                f"{what}: its weights {kind} {listed(names)}. Expected all the weights that its config.json "
                "describes and no others."
            )
    if report["error_msgs"]:
        raise ConfigError(f"{what}: {' '.join(str(report['error_msgs'][0]).split())}")
    if found := [name for name, tensor in _tensors(cfg, model) if not is_finite(tensor)]:
        why = f" (or beyond the range of model.dtype={cfg.dtype})" if cfg.dtype == "float16" else ""
        raise ConfigError(
            f"{what}: numbers that are not finite{why} in {listed(found)}. Expected a model whose weights "
            "are numbers; every loss would be NaN."
        )


def _tensors(cfg: ModelConfig, model: PreTrainedModel) -> Iterable[tuple[str, Tensor]]:
    """The weights by name; those that were quantised on the way as their files have them, since a packed NaN
    is some number."""
    if not cfg.quantize:
        yield from model.state_dict().items()
        return
    yield from model.named_parameters()
    if cfg.folder is not None:
        yield from _stored(sorted(cfg.folder.glob("*.safetensors")))


def _stored(paths: Iterable[Any]) -> Iterator[tuple[str, Tensor]]:
    from safetensors import safe_open

    for path in paths:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  it is no mapping
                yield name, file.get_tensor(name)
