"""The family of stages: the trainings of a method that is not trained all at once.

    stages:
      - kind: each_expert      # an expert for each label, alone on the rows of that label
      - kind: routers          # then the routers

A stage is options plus what it says of itself; benchmarks/run/stages/train.py does it, resumes it and times
it. Without stages a method has one training, of everything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from .spec import Part, Positive


@dataclass(frozen=True)
class Round:
    """One training of a stage. parts: `experts`, `routers` or both train; label: only on the rows of this
    label, and of tensors whose parts belong to one expert each only those of the expert of that number;
    share: of the length that the stage has."""

    name: str
    parts: tuple[Literal["experts", "routers"], ...]
    label: int | None = None
    share: float = 1.0


@dataclass(frozen=True)
class Stage(Part):
    """Base of all stages. label: the key of a row that is its label, where labels are read. length: of the
    stage, in units of the run's train.steps or train.epochs."""

    folder: ClassVar[str] = "moabench.methods.stages"
    reads_labels: ClassVar[bool] = False
    """Whether its rows have labels, of which each expert has one."""
    parts: ClassVar[tuple[Literal["experts", "routers"], ...]] = ("experts", "routers")

    label: Literal["skill", "task", "domain"] = "skill"
    length: Positive = 1.0

    def check(self, mixtures: tuple[Any, ...]) -> None:
        """Raise ConfigError where the method of these mixtures (catalog.Mixture), in any of its layers,
        cannot be trained so."""

    def rounds(self, counts: Sequence[int]) -> list[Round]:
        """Its trainings, in order. counts: rows of each label; [rows] where none are read."""
        return [Round(self.kind, ("experts", "routers"))]
