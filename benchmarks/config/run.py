"""The typed configuration of one run: `conf/` holds the choices, Hydra composes them,
`RunConfig.from_composed` turns the result into frozen dataclasses."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from moabench.benchmarks.machine.globals import MOST_THREADS
from moabench.methods import catalog
from moabench.methods.spec import Bound, ConfigError, Seed, build

from .budget import BudgetConfig
from .hashing import NOT_IN_HASH, digest, plain
from .mix import MixConfig
from .recipe import Recipe, taken
from .sections import DataConfig, LoggerConfig, ModelConfig, ProbeConfig, TaskConfig, TrainConfig
from .study import ExperimentConfig


@dataclass(frozen=True)
class RunConfig:
    """Everything that one run depends on."""

    method: dict
    model: ModelConfig
    task: TaskConfig
    data: DataConfig
    train: TrainConfig
    mix: MixConfig = field(default_factory=lambda: MixConfig(own=True))
    protocol: Literal["native", "loglikelihood", "generate", "label"] = "native"
    """How questions are put and answers read; native: each task's own."""
    leakage: Literal["drop", "refuse", "mark"] = "drop"
    """What becomes of training rows that are also evaluated."""
    forgetting: str = "auto"
    """Text whose loss is measured before and after training: auto (the corpus of the shipped model), none, or
    a text file."""
    recipe: Recipe | None = None
    """The published setting that `train` belongs to, filled in from its file; null on the command line: what
    differs from it is meant, and is not told."""
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    experiment: ExperimentConfig = field(default_factory=ExperimentConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    runs_dir: str = "runs"
    keep: Literal["adapter", "all", "none"] = "adapter"
    """Weights in the run folder: the adapter, the last checkpoint (optimiser and random states) too, or
    none."""
    retry: bool = False
    """In a sweep: runs that failed before start again, instead of being passed over."""
    seed: Seed = 0
    device: str = "auto"
    backend: Literal["auto", "torch", "triton"] = "auto"
    """Kernels of the mixtures: moabench.kernels.backend."""
    shard: bool = False
    """Split the frozen base's weights over the processes of a torchrun (FSDP):
    benchmarks/machine/processes.py."""
    threads: Annotated[int, Bound(ge=1, le=MOST_THREADS)] | None = None
    """CPU threads of torch; null: OMP_NUM_THREADS, else every core this process may use."""
    quiet: bool = False
    traceback: bool = False

    def __post_init__(self) -> None:
        if not self.runs_dir.strip():
            raise ConfigError(f"runs_dir={self.runs_dir!r}: expected a folder; the default is runs.")
        if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", self.device):
            raise ConfigError(f"device={self.device!r}: expected auto, cpu, mps, cuda or cuda:<number>.")
        if self.model.quantize and self.parsed_method.tuner == "full":
            raise ConfigError(
                f"model.quantize={self.model.quantize}: expected null with method=full, which trains "
                "the weights themselves."
            )

    @classmethod
    def from_composed(cls, data: Mapping[str, Any], overrides: Iterable[str] = ()) -> RunConfig:
        """Validated config from what Hydra composed; `overrides`, as the user typed them, win over the
        recipes of `train`."""
        data = {key: dict(value) if isinstance(value, Mapping) else value for key, value in data.items()}
        chosen = keys(overrides)
        typed = frozenset(chosen)
        if data.get("experiment"):
            experiment = build(ExperimentConfig, data["experiment"], "experiment")
            data = experiment.applied(data)
            chosen |= experiment.changes.keys()
        if isinstance(data.get("method"), dict):
            method = catalog.parse(data["method"], "method")
            if isinstance(data.get("train"), dict):
                data["train"] = _merge_recipe(data["train"], method.name, chosen)
                recipe = data["train"].pop("recipe", None) or data.get("recipe")
                data["recipe"] = taken(recipe, chosen) if recipe and "recipe" not in chosen else None
        if isinstance(data.get("task"), str | list | tuple):
            data["task"] = TaskConfig.of(data["task"])
        if isinstance(data.get("model"), dict) and "model.path" in chosen:
            data["model"] = _own_model(data["model"], chosen)
        return build(cls, data).trusting(typed)

    def trusting(self, typed: Collection[str] = ()) -> RunConfig:
        """This config. Raises ConfigError where it would run a model's own code and `typed`, the keys on the
        command line, does not have the key: a file may be somebody else's."""
        if self.model.trust_remote_code and "model.trust_remote_code" not in typed:
            raise ConfigError(
                "model.trust_remote_code=true: runs the Python files of model.path, which the file of a "
                "study, a run or an adapter may not ask for; expected it on the command line of this run."
            )
        return self

    @cached_property
    def parsed_method(self) -> Any:
        """The validated method (`.name`, `.tuner`)."""
        return catalog.parse(self.method, "method")

    @property
    def departures(self) -> list[str]:
        """What this run has other than the published setting that `train` belongs to."""
        if self.recipe is None:
            return []
        return self.recipe.departures(self.parsed_method, self.method, self.model, self.train)

    @property
    def globals(self) -> dict[str, Any]:
        """What `machine.globals.set_globals` takes."""
        dtype = self.model.dtype
        return {
            "seed": self.seed,
            "threads": self.threads,
            "device": self.device,
            "backend": self.backend,
        } | {"dtype": dtype}

    def to_dict(self) -> dict[str, Any]:
        """Plain nested data, as written to config.yaml."""
        return plain(self)


def keys(overrides: Iterable[str]) -> set[str]:
    """The keys of overrides as on the command line."""
    return {re.sub(r"^[+~]*", "", text).partition("=")[0] for text in overrides}


def _merge_recipe(train: dict, method: str, chosen: set[str]) -> dict:
    """`train` with the recipe of `method` put over the common fields, except where the user set a field on
    the command line."""
    recipes = train.pop("recipes", None) or {}
    recipe = recipes.get(method) or {} if isinstance(recipes, Mapping) else recipes
    if not isinstance(recipe, Mapping):
        raise ConfigError(f"train.recipes={recipes!r}: expected a mapping from methods to options of train.")
    train |= {key: value for key, value in recipe.items() if f"train.{key}" not in chosen}
    for given, other in (("steps", "epochs"), ("epochs", "steps")):
        if f"train.{given}" in chosen and f"train.{other}" not in chosen:
            train[other] = None  # a length on the command line replaces the file's, whichever unit that used
    return train


def _own_model(model: dict, chosen: set[str]) -> dict:
    """A model named by its path: it is pretrained, and unless the user says otherwise its name is the path's
    last part."""
    model |= {"kind": "pretrained", "random": None}
    if "model.name" not in chosen and isinstance(model.get("path"), str):
        cleaned = re.sub(r"[^\w.-]+", "_", Path(model["path"]).name).lstrip(".")
        model["name"] = cleaned.encode()[:100].decode(errors="ignore") or "model"
    return model


def run_hash(cfg: RunConfig, inputs: Mapping[str, Any] | None = None) -> str:
    """SHA-256 (hex) of everything that can change the result, `inputs` (fingerprints of weights and data)
    included."""
    method = plain(cfg.parsed_method, hashed=True)
    method.pop("data")  # as typed; the rest of a parsed method says the same with every default spelled out
    cut = cfg.train.accumulation > 1 or "processes" in (inputs or {})
    data = plain(cfg, hashed=True) | {"method": _losses_as_they_count(method, cut)}
    for section, keys in NOT_IN_HASH.items():
        if keys is None:
            del data[section]
        else:
            data[section] = {k: v for k, v in data[section].items() if k not in keys}
    if cfg.train.weight_decay:
        data["train"]["decays"] = "matrices"  # vectors too in runs of older versions, which are other runs
    return digest({"config": data, "inputs": dict(inputs or {})})


def _losses_as_they_count(value: Any, cut: bool) -> Any:
    """A parsed method as plain data without `batch` of the losses where it changes nothing: each optimiser
    step is one pass (not cut), or the coefficient is 0."""
    if isinstance(value, list):
        return [_losses_as_they_count(v, cut) for v in value]
    if not isinstance(value, dict):
        return value
    return {
        key: {
            kind: {k: v for k, v in loss.items() if k != "batch" or (cut and loss["coef"])}
            for kind, loss in entry.items()
        }
        if key == "losses"
        else _losses_as_they_count(entry, cut)
        for key, entry in value.items()
    }
