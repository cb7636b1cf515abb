"""Tasks: each YAML of this folder is one lm-eval task, and the only place for the task's facts.

lm-eval reads the native protocol (templates, metrics, reported split). What several tasks share stands in the
two files that they include: `_choice.yaml` (compared by log-likelihood) and `_math.yaml` (generated).
`metadata` holds what lm-eval has no key for; a key that a task does not give is that of the included file:

    version      of the protocol; a change makes old results incomparable
    kind         what a row must have: choices (choices and label), number (a final answer), letter (choices
                 and the right one's letter)
    scorers      how a run's answers are judged beside accuracy (`scorers/`)
    chance       accuracy of guessing among the choices, 0..1
    blank        the question must have a blank `_`
    instruction  generate: what is asked, in the words of LLM-Adapters (template with the row's keys and those
                 of `formats.Instruction`)
    words        generate: how the choices are called, one stem that is numbered from 1 or a list
    extraction   generate: choice_word, number or letter (`extraction.py`)
    tokens       generate: how many at most; builtin_tokens: with data=builtin, whose answers are shorter
    local        folder of the task under data.root
    hub          public data set: path, name, revision (a commit), reader (`hub.py`), splits (the
                 labelled ones; a mapping where the hub calls them otherwise)
    unavailable  data source -> why this task cannot use it
    protocol     where the protocols come from
    checked      what they were compared with

The files work with plain lm-eval too, each with its native protocol:
    lm-eval run --model hf --model_args pretrained=... --include_path benchmarks/tasks --tasks arc_easy
Nothing here imports lm-eval, so that a mistyped task name is an instant error.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from moabench.methods.spec import ConfigError, nearest

from .file import FOLDER, TaskFile, load
from .formats import FORMS, Form

__all__ = ["PROTOCOLS", "SETS", "Form", "Task", "get", "names", "resolve", "suites", "title"]

PROTOCOLS = tuple(FORMS)
"""loglikelihood, generate, label."""

SETS = {"asdiv": "mawps", "mawps_asdiv_a": "mawps"}
"""Local sets that are no task, for training, and the task whose forms their rows take. Some answers of asdiv
are no numbers."""


@dataclass(frozen=True)
class Task(TaskFile):
    """One task."""

    def chance(self, protocol: str = "native") -> float:
        """Accuracy of guessing: 0 where a number is generated."""
        free = self.kind == "number" and self._protocol(protocol) == "generate"
        return 0.0 if free else float(self.facts["chance"])

    def unavailable(self, source: str, protocol: str | None = None) -> str | None:
        """Why this task cannot be had from `source` (with `protocol`, where one is given); None where it
        can."""
        if reason := (self.facts.get("unavailable") or {}).get(source):
            return reason
        if (
            protocol
            and self.kind == "number"
            and source != "builtin"
            and self._protocol(protocol) != "generate"
        ):
            return (
                f"its rows have a free answer and no choices, and {protocol} compares choices; "
                "expected protocol=generate or native"
            )
        return None

    def tokens(self, source: str) -> int:
        """Most tokens of a generated answer."""
        own = self.facts.get("builtin_tokens") if source == "builtin" else None
        return own or self.facts["tokens"]

    def form(self, protocol: str = "native", template: str | None = None) -> Form:
        """How a row becomes text under `protocol`. `template`: another layout of the instruction
        (`formats.TEMPLATES`)."""
        return _form(self.name, self._protocol(protocol), template)

    def _protocol(self, protocol: str) -> str:
        if protocol == "native":
            return self.native
        if protocol not in PROTOCOLS:
            known = ("native", *PROTOCOLS)
            raise ConfigError(
                f"protocol={protocol!r}: expected one of {', '.join(known)}.{nearest(protocol, known)}"
            )
        return protocol


def names() -> list[str]:
    """Names of all tasks, from the folder."""
    return sorted(path.stem for path in FOLDER.glob("[!_]*.yaml"))


def get(name: str, key: str = "task") -> Task:
    """The task called `name`; ConfigError, naming the config `key`, if there is none."""
    if not _is_task(name):
        raise ConfigError(f"{key}={name!r}: no such task.{nearest(name, names())}")
    return _read(name)


def _is_task(name: Any) -> bool:
    """Without a look through the whole folder: asked for every row."""
    return (
        isinstance(name, str)
        and re.fullmatch(r"[^\W_][\w-]*", name) is not None
        and (FOLDER / f"{name}.yaml").is_file()
    )


@lru_cache(maxsize=1)
def suites() -> dict[str, tuple[str, ...]]:
    """Suite -> its tasks, from the folder `suites/` (groups of lm-eval)."""
    found = {}
    for path in sorted((FOLDER / "suites").glob("*.yaml")):
        group = load(path)
        found[group["group"]] = tuple(group["task"])
    return found


def resolve(value: str | list[str] | tuple[str, ...], key: str = "task") -> tuple[str, tuple[str, ...]]:
    """(name, tasks) of a task, a suite or a list of both: "arc" -> ("arc", ("arc_easy", "arc_challenge")),
    ["arc", "gsm8k"] -> ("arc+gsm8k", ...). No task comes twice. Raises ConfigError that names `key`."""
    parts = [value] if isinstance(value, str) else list(value) if isinstance(value, list | tuple) else []
    known = [*names(), *suites()]
    if not parts:
        raise ConfigError(
            f"{key}={value!r}: expected a task, a suite ({', '.join(suites())}) or a list of them."
        )
    for part in parts:
        if part not in known:
            raise ConfigError(f"{key}={part!r}: no such task or suite.{nearest(str(part), known)}")
    parts = list(dict.fromkeys(parts))
    return "+".join(parts), tuple(
        dict.fromkeys(task for part in parts for task in suites().get(part, (part,)))
    )


def title(task: str, source: str, protocol: str = "native") -> str:
    """Name of a result, which says where the rows come from and how they were asked:
    "arc_easy@builtin:loglikelihood"."""
    return f"{task}@{source}:{get(task)._protocol(protocol)}"


@lru_cache
def _form(name: str, protocol: str, template: str | None) -> Form:
    return FORMS[protocol](get(name), template)


@lru_cache
def _read(name: str) -> Task:
    config = load(FOLDER / f"{name}.yaml")
    if config["task"] != name:
        raise ConfigError(f"{name}.yaml: task={config['task']!r}, expected the name of its file.")
    return Task(name, config)
