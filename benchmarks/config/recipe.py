"""The published setting that the values of `train` belong to (conf/train/paper.yaml), and what a run has
other than that."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moabench.methods import catalog
from moabench.methods.spec import ConfigError

from .hashing import NOT_IN_HASH, plain
from .sections import ModelConfig, TrainConfig


@dataclass(frozen=True)
class Recipe:
    """What was published together with the values of `train`."""

    follows: str | None = None
    """Which of paper, original code and port; null: nothing is published for this method."""
    model: tuple[str, ...] = ()
    """Hub ids of the bases."""
    method: dict[str, Any] = field(default_factory=dict)
    """Keys below `method` that have another value than in the method's file."""
    own: tuple[str, ...] = ()
    """Keys of `train` that were set over it."""

    def departures(
        self, method: catalog.Method, data: Mapping[str, Any], model: ModelConfig, train: TrainConfig
    ) -> list[str]:
        """What a run has other than the recipe, as `key=value (published)`; data: the method as it was
        parsed from.

        Empty where it is the published setting, and for the frozen base, which does not train. Data and task
        are not compared.
        """
        if method.tuner == "none":
            return []
        found = [] if self.follows else [f"method={method.name} (no recipe of its own)"]
        names = [Path(hub_id).name for hub_id in self.model]
        if names and Path(model.path or "").name not in names:
            found.append(f"model={model.name} ({' or '.join(names)})")
        if self.follows:
            found += self._of_method(method.name, data)
        return found + [
            f"{key}={_typed(getattr(train, key.partition('.')[2]))} (set by hand)" for key in self.own
        ]

    def _of_method(self, name: str, data: Mapping[str, Any]) -> list[str]:
        """The options of the method that differ, where they make another method."""
        if name not in catalog.names():
            return [f"method={name} (not a shipped one)"]
        published = catalog.override(catalog.raw(name), self.method)
        if _means(published) == _means(data):
            return []
        return list(_differences(data, published, "method."))


def taken(recipe: Mapping[str, Any], chosen: Collection[str]) -> dict[str, Any]:
    """`recipe` as data with the keys of `train` among `chosen`, those that the user set, but for those that
    change no result."""
    if not isinstance(recipe, Mapping):
        raise ConfigError(f"recipe={recipe!r}: expected a mapping, or null.")
    free = {"train.recipes", *(f"train.{key}" for key in NOT_IN_HASH["train"])}
    own = {key for key in chosen if key.startswith("train.") and not key.startswith(tuple(free))}
    return {**recipe, "own": sorted({*recipe.get("own", ()), *own})}


def _means(data: Mapping[str, Any]) -> Any:
    """A method as data, with every default spelled out and without words about it."""
    method = plain(catalog.parse(data, "method"))
    return [method["mixtures"], method["dora"], method["stages"], bool(method["layers"])]


def _differences(here: Mapping[str, Any], there: Mapping[str, Any], prefix: str) -> Iterator[str]:
    """Keys with other values, as `key=value (value there)`."""
    for key in sorted({*here, *there} - {"about", "paper"}):
        one, other = here.get(key), there.get(key)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            yield from _differences(one, other, f"{prefix}{key}.")
        elif one != other:
            yield f"{prefix}{key}={_typed(one)} ({_typed(other)})"


def _typed(value: Any) -> str:
    """As on the command line."""
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {_typed(v)}' for key, v in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_typed, value))}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
