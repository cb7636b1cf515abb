"""The committed study that a run belongs to: one file of conf/experiment, its variants."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from moabench.methods import catalog
from moabench.methods.spec import ConfigError, nearest


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
