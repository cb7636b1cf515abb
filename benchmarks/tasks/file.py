"""A task's file as lm-eval reads it, over the file that it includes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class TaskFile:
    """One task file."""

    name: str
    config: dict[str, Any] = field(repr=False)

    @property
    def split(self) -> str:
        """The split that papers report."""
        return self.config.get("test_split") or self.config["validation_split"]

    @property
    def facts(self) -> dict[str, Any]:
        return self.config["metadata"]

    @property
    def scorers(self) -> tuple[str, ...]:
        """Names of the scorers of its runs, beside accuracy."""
        return tuple(self.facts.get("scorers") or ())

    @property
    def kind(self) -> str:
        """choices, number or letter: what the rows must have."""
        return self.facts["kind"]

    @property
    def native(self) -> str:
        """The task's own protocol: the one that its file describes to lm-eval."""
        return {"multiple_choice": "loglikelihood", "generate_until": "generate"}[self.config["output_type"]]


def load(path: Path) -> dict[str, Any]:
    """A file over the one that it includes, `metadata` key by key; a task that includes none gets the
    metadata of `_choice.yaml`."""
    config = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    plain = "task" in config and "group" not in config and "include" not in config
    base = load(path.parent / config.pop("include", "_choice.yaml")) if plain or "include" in config else {}
    metadata = {**base.get("metadata", {}), **(config.get("metadata") or {})}
    return {**({} if plain else base), **config, **({"metadata": metadata} if metadata else {})}


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads lm-eval's `!function` as text: this module needs names, not callables."""


_Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))
