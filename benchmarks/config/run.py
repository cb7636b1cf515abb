"""The typed configuration of one run. Torch-free: a bad value is refused before anything heavy is imported.

`conf/` holds the choices, Hydra composes them, `RunConfig.from_composed` turns the result into frozen
dataclasses. Units stand beside the fields here and in the YAML files. Whatever is wrong raises ConfigError
with the key, the value, what was expected and the nearest name.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from moabench.benchmarks import tasks
from moabench.benchmarks.data.mixes import MixConfig
from moabench.benchmarks.fairness.budget import BudgetConfig
from moabench.benchmarks.world.facts import Axes
from moabench.methods import catalog
from moabench.methods.spec import Bound, ConfigError, Count, NonNegative, Positive, Share, build, nearest

CONF = Path(__file__).resolve().parent.parent / "conf"
"""Folder of the Hydra groups, in the repository as in an installed package."""


def groups() -> dict[str, list[str]]:
    """Every choice a user can make: {"task": ["addsub", "arc", ...], ...}, read from the folders."""
    choices = {
        folder.name: sorted(f.stem for f in folder.glob("*.yaml"))
        for folder in sorted(CONF.iterdir())
        if folder.is_dir()
    }
    return {name: found for name, found in choices.items() if found}


@dataclass(frozen=True)
class RandomModel:
    """Sizes of an untrained model (`model=random_tiny`); the vocabulary is that of the built-in tokenizer."""

    architecture: str = "llama"
    """A `model_type` of transformers."""
    hidden: Count = 64
    intermediate: Count = 128
    layers: Count = 2
    heads: Count = 4
    kv_heads: Count = 2

    def __post_init__(self) -> None:
        if self.hidden % self.heads or self.heads % self.kv_heads:
            sizes = f"hidden={self.hidden}, heads={self.heads}, kv_heads={self.kv_heads}"
            raise ConfigError(f"{sizes}: expected hidden divisible by heads, and heads by kv_heads.")


@dataclass(frozen=True)
class ModelConfig:
    """The frozen base model."""

    name: str
    kind: Literal["builtin", "pretrained", "random"] = "pretrained"
    """builtin: the model shipped in benchmarks/world/tiny; pretrained: `path`; random: untrained, of the
    sizes in `random`."""
    path: str | None = None
    """Hub id (`org/name`) or folder; null unless kind is pretrained."""
    revision: str | None = None
    """Commit, tag or branch on the hub."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    quantize: Literal[4, 8] | None = None
    """Bits of the base's linear layers (bitsandbytes); null: not quantised."""
    random: RandomModel | None = None

    def __post_init__(self) -> None:
        if (self.kind == "pretrained") != (self.path is not None):
            raise ConfigError(
                f"path={self.path!r}: expected a hub id or folder with kind=pretrained only "
                f"(kind={self.kind})."
            )
        if (self.kind == "random") != (self.random is not None):
            raise ConfigError(
                f"random={self.random!r}: expected sizes with kind=random only (kind={self.kind})."
            )
        if self.quantize and self.kind == "random":
            raise ConfigError(
                f"quantize={self.quantize}: expected null with kind=random, which has no weights to "
                "read packed."
            )

    @property
    def source(self) -> str:
        """What `from_pretrained` takes for the weights and the tokenizer (for kind=random the tokenizer
        only)."""
        if self.path is not None:
            return self.path
        from moabench.benchmarks.world import MODEL

        return str(MODEL)

    @property
    def folder(self) -> Path | None:
        """The local folder that `source` names; None for a hub id. A folder wins over a hub id of the same
        spelling."""
        path = Path(self.source).expanduser()
        looks_like_hub_id = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", self.source) and not self.source.startswith(
            "."
        )
        return None if looks_like_hub_id and not path.is_dir() else path


@dataclass(frozen=True)
class TaskConfig:
    """What is evaluated: tasks of benchmarks/tasks, under the name of their suite (`arc`), or joined
    (`arc+gsm8k`)."""

    name: str
    eval: tuple[str, ...]

    def __post_init__(self) -> None:
        known = tasks.names()
        if not self.eval:
            raise ConfigError(f"eval=[]: expected at least one task.{nearest('', known)}")
        for name in self.eval:
            if name not in known:
                raise ConfigError(f"eval names {name!r}: no such task.{nearest(name, known)}")

    @classmethod
    def of(cls, value: Any) -> TaskConfig:
        """From what stands on the command line: a task, a suite, or a list of them."""
        return cls(*tasks.resolve(value))


@dataclass(frozen=True)
class DataConfig:
    """Where the rows of a task come from. The source is part of every result's name (`arc_easy@builtin`)."""

    source: Literal["builtin", "local", "hub"]
    root: str | None = None
    """Folder with `<task>/<split>.jsonl` (source=local)."""
    train_limit: Count | None = None
    """Rows per training task; null: all."""
    eval_limit: Count | None = None
    """Rows per evaluation task; null: all."""
    seed: int = 0
    """Seed of the built-in world; the shipped model knows world 0."""
    world: Axes = field(default_factory=Axes)
    """Difficulty of the built-in world's questions (source=builtin)."""
    held_out: bool = False
    """Evaluate on a tenth of each train split, which is then not trained on, instead of on the split that is
    reported."""
    revisions: dict[str, str] = field(default_factory=dict)
    """Task -> commit of its public data set (source=hub), instead of the pinned one of the task's file."""

    def __post_init__(self) -> None:
        if self.source != "builtin" and self.world != Axes():
            raise ConfigError(
                f"world={self.world}: only data=builtin has these dials, and source is {self.source}."
            )
        if self.revisions and self.source != "hub":
            raise ConfigError(
                f"revisions={self.revisions}: only data=hub reads public data sets, and source is "
                f"{self.source}."
            )
        for task in self.revisions:
            tasks.get(task, "revisions")
        if self.source == "local" and self.root is None:
            raise ConfigError(
                "root=null: data=local expects a folder with <task>/<split>.jsonl files, "
                "data.root=path/to/folder."
            )
        if self.source != "local" and self.root is not None:
            raise ConfigError(
                f"root={self.root!r}: only data=local reads a folder, and source is {self.source}."
            )

    @property
    def title(self) -> str:
        """The source as in a result's name, `arc_easy@builtin`."""
        return f"{self.source}-held_out" if self.held_out else self.source


@dataclass(frozen=True)
class TrainConfig:
    """One training recipe."""

    steps: Count | None = None
    """Optimiser steps; exactly one of `steps` and `epochs` is set."""
    epochs: Positive | None = None
    batch_size: Count = 16
    """Sequences per forward pass."""
    accumulation: Count = 1
    """Forward passes per optimiser step."""
    halve: bool = False
    """Out of memory: go on with half the sequences in a pass and twice the passes, until it fits;
    recorded."""
    lr: Positive = 2e-3
    """Peak learning rate of adapters."""
    lr_full: Positive = 5e-4
    """Peak learning rate when the whole model is trained (method=full)."""
    lr_grid: tuple[Positive, ...] = ()
    """Rates of which the best one on held-out training rows is taken instead of `lr`
    (benchmarks/tuning.py)."""
    warmup: NonNegative = 0.06
    """Below 1: share of all steps; from 1 on: steps."""
    schedule: Literal["cosine", "constant", "linear"] = "cosine"
    weight_decay: NonNegative = 0.0
    beta1: Share = 0.9
    beta2: Share = 0.999
    max_grad_norm: NonNegative = 1.0
    """Clipping norm; 0: off."""
    max_length: Annotated[int, Bound(ge=8)] = 256
    """Tokens a sequence."""
    loss: Literal["response", "whole"] = "response"
    """Tokens whose loss is trained on: those of the answer, or the prompt's too."""
    gradient_checkpointing: bool = False
    eval_batch_size: Count = 64
    """Sequences per forward pass in evaluation."""
    log_every: Count = 10
    """Steps between rows of history.parquet."""
    save_every: Count = 100
    """Steps between checkpoints for resume."""

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            raise ConfigError(f"steps={self.steps}, epochs={self.epochs}: expected exactly one of the two.")
        if len(set(self.lr_grid)) < len(self.lr_grid) or len(self.lr_grid) == 1:
            raise ConfigError(f"lr_grid={list(self.lr_grid)}: expected two or more different rates, or none.")


@dataclass(frozen=True)
class ProbeConfig:
    """Measures of experts and hidden states on a fixed set of tokens, while training goes on."""

    tokens: Annotated[int, Bound(ge=8)] = 1024
    """Real tokens of the set."""
    alone: Annotated[int, Bound(ge=8)] = 256
    """Most of them on which blocks and feed-forward experts are run again with one expert alone, one left
    out."""
    sites: Count = 8
    """Most routed places, and most layers, that are measured, spread over depth."""
    times: Annotated[int, Bound(ge=0)] = 10
    """Probes after step 0, the last one at the end; 0: none at all."""


@dataclass(frozen=True)
class LoggerConfig:
    """Weights & Biases; the run folder is the record, this is a view of it."""

    kind: Literal["wandb", "none"] = "wandb"
    mode: Literal["offline", "online"] = "offline"
    project: str = "moabench"
    group: str | None = None
    """null: the experiment, else the study: task, model, and a digest of all but method and seed."""


@dataclass(frozen=True)
class ExperimentConfig:
    """The committed study that a run belongs to (conf/experiment); the run itself is the same as one given by
    hand."""

    name: str | None = None
    about: str = ""
    variant: str | None = None
    """Which of `variants` this run is."""
    variants: dict[str, dict] = field(default_factory=dict)
    """Variant -> what differs in it: dotted keys of the config, or `method` with the name of one."""

    def __post_init__(self) -> None:
        if (self.variant is None) != (not self.variants) or (
            self.variants and self.variant not in self.variants
        ):
            raise ConfigError(
                f"variant={self.variant!r}: expected a variant of the "
                f"experiment.{nearest(str(self.variant), self.variants)}"
            )

    @property
    def changes(self) -> dict[str, Any]:
        """What differs in this run's variant."""
        return self.variants.get(self.variant, {})

    def applied(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """A composed config with the changes of the variant."""
        changes = dict(self.changes)
        if "method" in changes:
            data = {**data, "method": catalog.raw(changes.pop("method"))}
        return catalog.override(data, changes)


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
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    probe: ProbeConfig = ProbeConfig()
    experiment: ExperimentConfig = field(default_factory=ExperimentConfig)
    logger: LoggerConfig = LoggerConfig()
    runs_dir: str = "runs"
    keep: Literal["adapter", "all", "none"] = "adapter"
    """Weights in the run folder: the adapter, the last checkpoint (optimiser and random states) too, or
    none."""
    retry: bool = False
    """In a sweep: runs that failed before start again, instead of being passed over."""
    seed: Annotated[int, Bound(ge=0)] = 0
    device: str = "auto"
    backend: Literal["auto", "torch", "triton"] = "auto"
    """Kernels of the mixtures: moabench.kernels.backend."""
    shard: bool = False
    """Split the frozen base's weights over the processes of a torchrun (FSDP): benchmarks/processes.py."""
    threads: Count | None = None
    """CPU threads of torch; null: OMP_NUM_THREADS, else every core this process may use."""
    quiet: bool = False
    traceback: bool = False

    def __post_init__(self) -> None:
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
        chosen = {re.sub(r"^[+~]*", "", text).partition("=")[0] for text in overrides}
        if data.get("experiment"):
            experiment = build(ExperimentConfig, data["experiment"], "experiment")
            data = experiment.applied(data)
            chosen |= experiment.changes.keys()
        if isinstance(data.get("method"), dict):
            method = catalog.parse(data["method"], "method")
            if isinstance(data.get("train"), dict):
                data["train"] = _merge_recipe(data["train"], method.name, chosen)
        if isinstance(data.get("task"), str | list | tuple):
            data["task"] = TaskConfig.of(data["task"])
        if isinstance(data.get("model"), dict) and "model.path" in chosen:
            data["model"] = _own_model(data["model"], chosen)
        return build(cls, data)

    @cached_property
    def parsed_method(self) -> Any:
        """The validated method (`.name`, `.tuner`)."""
        return catalog.parse(self.method, "method")

    def to_dict(self) -> dict[str, Any]:
        """Plain nested data, as written to config.yaml."""
        return _plain(self)


def composed(overrides: Iterable[str]) -> RunConfig:
    """The config of overrides as on the command line. Raises ConfigError and Hydra's own errors."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    from .overrides import prepare

    with initialize_config_dir(str(CONF), version_base="1.3"):
        return RunConfig.from_composed(
            OmegaConf.to_container(compose("config", prepare([*overrides])), resolve=True), overrides
        )


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
        model["name"] = re.sub(r"[^\w.-]+", "_", Path(model["path"]).name) or "model"
    return model


NOT_IN_HASH = {
    "runs_dir": None, "keep": None, "retry": None, "experiment": None, "logger": None, "quiet": None,
    "traceback": None, "threads": None,
    "shard": None, "train": {"log_every", "save_every", "halve"},
}  # fmt: skip
"""What cannot change the result: whole sections (None) or some of their keys."""


def run_hash(cfg: RunConfig, inputs: Mapping[str, Any] | None = None) -> str:
    """SHA-256 (hex) of everything that can change the result, `inputs` (fingerprints of weights and data)
    included."""
    method = _plain(cfg.parsed_method)
    method.pop("data")  # as typed; the rest of a parsed method says the same with every default spelled out
    data = _plain(cfg) | {"method": method}
    for section, keys in NOT_IN_HASH.items():
        if keys is None:
            del data[section]
        else:
            data[section] = {k: v for k, v in data[section].items() if k not in keys}
    return digest({"config": data, "inputs": dict(inputs or {})})


def digest(data: Any) -> str:
    """SHA-256 (hex) of plain data, independent of the order of keys."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, default=str).encode()).hexdigest()


def _plain(value: Any) -> Any:
    """Dataclasses as dicts; a part keeps its `kind`, which is a class attribute, since two kinds may have
    equal fields."""
    if dataclasses.is_dataclass(value):
        kind = {"kind": value.kind} if isinstance(getattr(type(value), "kind", None), str) else {}
        return kind | {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(v) for v in (sorted(value, key=str) if isinstance(value, set | frozenset) else value)]
    return value
