"""Tasks: each YAML of this folder is one lm-eval task, and the only place for the task's facts.

lm-eval reads the protocol (templates, metrics, reported split); `metadata` holds what it has no key for:

    version      of the protocol; a change makes old results incomparable
    chance       accuracy of guessing, 0..1
    local        folder of the task under data.root
    hub          public data set: path, name, revision (a commit), fields (where our row's keys are found in theirs)
    unavailable  data source -> why this task cannot use it
    protocol     where the protocol comes from and what it was checked against

The files work with plain lm-eval too:
    lm-eval run --model hf --model_args pretrained=... --include_path benchmarks/tasks --tasks arc_easy
Nothing here imports lm-eval, so that a mistyped task name is an instant error.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import yaml

from moabench.methods.spec import ConfigError, nearest

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Task:
    """One task file. `prompt` and `answer` render a row as lm-eval renders it, for training."""

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
    def chance(self) -> float:
        return float(self.facts["chance"])

    def unavailable(self, source: str) -> str | None:
        """Why this task cannot be had from `source`; None where it can."""
        return (self.facts.get("unavailable") or {}).get(source)

    def prompt(self, row: dict[str, Any]) -> str:
        """The text before the answer, without a trailing blank."""
        return self._template.render(**row)

    def answer(self, row: dict[str, Any]) -> str:
        """The right answer as it continues the prompt: " Paris"."""
        return self.config.get("target_delimiter", " ") + row["choices"][row["label"]]

    @cached_property
    def _template(self):
        from jinja2 import Environment, StrictUndefined

        return Environment(undefined=StrictUndefined, keep_trailing_newline=True).from_string(self.config["doc_to_text"])


def names() -> list[str]:
    """Names of all tasks, from the folder."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def get(name: str, key: str = "task") -> Task:
    """The task called `name`; ConfigError, naming the config `key`, if there is none."""
    if name not in names():
        raise ConfigError(f"{key}={name!r}: no such task.{nearest(name, names())}")
    return _read(name)


@lru_cache
def _read(name: str) -> Task:
    config = yaml.load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"), Loader=_Loader)
    if config["task"] != name:
        raise ConfigError(f"{name}.yaml: task={config['task']!r}, expected the name of its file.")
    return Task(name, config)


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads lm-eval's `!function` as text: this module needs names, not callables."""


_Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))
