"""`mix=`: what is trained on, as written. Its rows are gathered in benchmarks/data/mixes.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from moabench.benchmarks import tasks
from moabench.methods.spec import Bound, ConfigError, Many, build, nearest


@dataclass(frozen=True)
class PartConfig:
    """The train split of one task in a mix."""

    weight: Annotated[float, Bound(ge=0, le=1000)] = 1.0
    """How often a row is in the mix: 2 takes each twice, 0.5 a seeded half, 1.5 each once and a half of them
    twice; 0: left out."""
    cap: Many | None = None
    """Most distinct rows, a seeded choice; null: all."""
    optional: bool = False
    """Left out, and recorded, where the source has no train split of the task; false: an error."""


@dataclass(frozen=True)
class HubConfig:
    """A data set on the hub whose columns are instruction, input, output, answer."""

    path: str
    name: str | None = None
    """Its configuration; null: the only one."""
    file: str | None = None
    """One data file of it; null: as the data set says."""
    split: str = "train"
    revision: str | None = None
    """Commit; has to be given, since what a name stands for changes."""


@dataclass(frozen=True)
class Published:
    """Facts about the published file; a difference is recorded, not refused."""

    rows: Many | None = None
    git_blob: str | None = None
    """SHA-1 that git gives to the file's content (`git hash-object FILE`)."""


@dataclass(frozen=True)
class MixConfig:
    """A training set."""

    name: str = "own"
    own: bool = False
    parts: dict = field(default_factory=dict)
    """Task, or local set that is no task (tasks.SETS) -> PartConfig."""
    file: str | None = None
    hub: HubConfig | None = None
    published: Published | None = None

    def __post_init__(self) -> None:
        parts = {}
        for task, part in self.parts.items():
            if task not in part_names():
                raise ConfigError(f"parts.{task}: no such task.{nearest(task, part_names())}")
            parts[task] = (
                part if isinstance(part, PartConfig) else build(PartConfig, part or {}, f"parts.{task}")
            )
        object.__setattr__(self, "parts", parts)
        if self.file is not None and self.hub is not None and self.hub.revision is not None:
            raise ConfigError(f"file={self.file!r}, hub.path={self.hub.path!r}: expected one of the two.")
        if not (self.own or parts or self.file or (self.hub and self.hub.revision)):
            known = f" (known: hub.path={self.hub.path})" if self.hub else ""
            raise ConfigError(
                f"name={self.name!r}, file=null: expected mix.file=path/to/{self.name}.json, or "
                f"mix.hub.path and mix.hub.revision{known}."
            )


def part_names() -> list[str]:
    """What a part can name."""
    return [*tasks.names(), *tasks.SETS]
