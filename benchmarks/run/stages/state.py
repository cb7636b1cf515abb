"""What the stages of a run hand on to each other."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moabench.benchmarks.run.loggers import Logger
from moabench.benchmarks.run.prepared import Prepared, TrainingRows

if TYPE_CHECKING:
    from moabench.benchmarks.observing.probe import Probe

TABLES = ("history", "routing", "samples", "matrices", "probes")
"""The parquet files of a run folder."""


@dataclass
class Measured:
    """A model as it was evaluated: metrics (`eval/`, `load/`, ...) and rows of samples, routing and
    matrices."""

    metrics: dict[str, Any]
    samples: list[dict[str, Any]]
    routing: list[dict[str, Any]]
    matrices: list[dict[str, Any]]


@dataclass
class State:
    """path: where tables and adapter are written; checkpoints: the run folder, also where only the first of
    several processes writes to it; resume: the run was interrupted. model: the frozen base until a training
    stage attaches the method."""

    prepared: Prepared
    path: Path
    checkpoints: Path
    device: str
    logger: Logger
    resume: bool
    training: TrainingRows = field(default_factory=lambda: TrainingRows([]))
    model: Any = None
    tokenizer: Any = None
    base: Measured | None = None
    found: Measured | None = None
    probe: Probe | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: {name: [] for name in TABLES})
