"""The user's overrides, checked before Hydra composes anything, so that a mistake is answered at once with
the nearest valid name.

They are read with Hydra's own parser. Plain assignments `a.b=c` become `++a.b=c`: an option that a method's
YAML does not spell out (`method.router.k` after `method.router.kind=topk`) then reaches our typed validation
instead of being refused as an unknown key.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import shlex
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from moabench.benchmarks import tasks
from moabench.methods.spec import ConfigError, nearest

from .budget import Goal
from .choices import CONF, groups
from .run import RunConfig
from .sections import TrainConfig


def prepare(argv: list[str]) -> list[str]:
    """`argv` as Hydra gets it. Raises ConfigError for an unknown group, choice or key."""
    from hydra._internal.utils import get_args_parser
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    texts = get_args_parser().parse_known_args(argv)[0].overrides
    rewritten = {}
    for text in texts:
        try:
            (override,) = OverridesParser.create().parse_overrides([text])
            rewritten[text] = _checked(override, text)
        except (HydraException, RecursionError, ValueError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(_unreadable(text, error)) from None
    return [*(rewritten.get(arg, arg) for arg in argv), *_tuning(texts)]


def _unreadable(text: str, error: Exception) -> str:
    """Why Hydra's grammar does not take an override, and what to write instead."""
    key, equals, value = text.partition("=")
    long = isinstance(error, RecursionError) or len(text) > 1000
    why = "too long or too deep" if long else re.sub(r"^\w+Exception: ", "", one_line(error)).rstrip(" ^")
    quoted = shlex.quote(f'{key}="{value}"')
    hint = (
        f" A value with one of {SIGNS} in it needs quotes of its own: {quoted}."
        if equals and not long and any(sign in value for sign in SIGNS.split()) and '"' not in value
        else ""
    )
    return f"cannot read {text[:200]!r}: {why}. Expected key=value.{hint}"


SIGNS = "~ ( ) [ ] { } = # , : ' \\ %"
"""What Hydra's grammar reads as something else than text."""


def composed(overrides: Iterable[str]) -> RunConfig:
    """The config of overrides as on the command line. Raises ConfigError and Hydra's own errors."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    with initialize_config_dir(str(CONF), version_base="1.3"):
        return RunConfig.from_composed(
            OmegaConf.to_container(compose("config", prepare([*overrides])), resolve=True), overrides
        )


def tunes(argv: list[str]) -> bool:
    """Whether a sweep is a search for the best config."""
    return "hydra/sweeper=optuna" in argv


def _tuning(texts: list[str]) -> Iterator[str]:
    """What a search needs that Optuna's sweeper does not assume: accuracy is to be high, and a trial may
    fail. ConfigError where the trials would be judged on the rows that are reported."""
    if not tunes(texts):
        return
    if not any(text.lstrip("+").lower() == "data.held_out=true" for text in texts):
        raise ConfigError(
            "hydra/sweeper=optuna: expected data.held_out=true too, so that the reported split is "
            "not what was tuned on."
        )
    for key, value in {"direction": "maximize", "max_failure_rate": "1.0"}.items():
        if not any(text.startswith(f"hydra.sweeper.{key}=") for text in texts):
            yield f"hydra.sweeper.{key}={value}"


def _checked(override: Any, text: str) -> str:
    """The override as Hydra gets it, or ConfigError."""
    key, known = override.key_or_group, groups()
    if override.is_hydra_override():
        _check_plugin(override)
    elif key in known:
        for choice in _choices(override):
            if choice not in known[key]:
                raise ConfigError(f"{key}={choice}: no such {key}.{nearest(choice, known[key])}")
        if key == "experiment" and override.type.name == "CHANGE":
            return f"+{text}"
    elif key == "task":
        for value in _values(override):
            tasks.resolve(value)
    elif key == "budget":
        for value in _values(override):
            Goal.read(value)
        return f"budget.size={text.partition('=')[2]}"
    else:
        _check_key(key, override.value(), known)
        if override.type.name == "CHANGE" and "." in key:
            return f"++{text}"
    return text


def _choices(override: Any) -> Iterator[str]:
    """The names that an override of a group asks for; nothing for a glob, which can only match what
    exists."""
    if override.is_delete() or (
        override.is_sweep_override() and override.value_type.name == "GLOB_CHOICE_SWEEP"
    ):
        return
    if override.is_sweep_override():
        yield from override.sweep_string_iterator()
    else:
        value = override.value()
        yield "null" if value is None else str(value)


def _values(override: Any) -> Iterator[Any]:
    """What an override asks for, in a sweep several values."""
    if override.is_sweep_override():
        yield from override.sweep_iterator(transformer=lambda element: element)
    else:
        yield override.value()


def _check_key(key: str, value: Any, known: dict[str, list[str]]) -> None:
    """Raise ConfigError unless `key` is a field of the config; what lies below `method` is judged when the
    method is built."""
    fields: Any = {f.name for f in dataclasses.fields(RunConfig)} | set(known)
    cls: Any = RunConfig
    parts = key.split(".")
    for depth, part in enumerate(parts):
        if part not in fields:
            raise ConfigError(f"unknown key '{key}' (value {value!r}).{nearest_key(parts, depth, fields)}")
        cls = nested(cls, part)
        if cls is None:
            if part not in ("method", "recipes", "parts", "revisions") and parts[depth + 1 :]:
                raise ConfigError(
                    f"unknown key '{key}' (value {value!r}). '{'.'.join(parts[: depth + 1])}' holds "
                    "one value."
                )
            return
        fields = {f.name for f in dataclasses.fields(cls)} | ({"recipes"} if cls is TrainConfig else set())


def nearest_key(parts: list[str], depth: int, fields: set[str]) -> str:
    """The tail of the error for an unknown key, with the whole dotted name."""
    prefix = ".".join(parts[:depth])
    return nearest(".".join(parts[: depth + 1]), {f"{prefix}.{name}" if prefix else name for name in fields})


def nested(cls: type, name: str) -> type | None:
    """The dataclass that the field `name` of `cls` holds, if it holds one."""
    text = {f.name: str(f.type) for f in dataclasses.fields(cls)}.get(name, "")
    found = getattr(sys.modules[cls.__module__], text.split("|")[0].strip(), None)
    return found if dataclasses.is_dataclass(found) else None


def _check_plugin(override: Any) -> None:
    """A launcher or sweeper that is not installed gets a message that says what to install."""
    module = (
        _PLUGINS.get(str(override.value()))
        if override.key_or_group in ("hydra/launcher", "hydra/sweeper")
        else None
    )
    if module and not installed(f"hydra_plugins.{module}"):
        raise ConfigError(
            f"{override.key_or_group}={override.value()}: not installed; pip install "
            f"{module.replace('_', '-')}."
        )


def installed(module: str) -> bool:
    """Whether a dotted module can be imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent is not there either
        return False


_PLUGINS = {
    "joblib": "hydra_joblib_launcher",
    "workers": "hydra_joblib_launcher",
    "slurm": "hydra_submitit_launcher",
    "submitit_local": "hydra_submitit_launcher",
    "submitit_slurm": "hydra_submitit_launcher",
    "ray": "hydra_ray_launcher",
    "optuna": "hydra_optuna_sweeper",
}
"""Hydra launchers and sweepers that are packages of their own, or files of conf/hydra for such, and their
modules."""


def one_line(error: Any) -> str:
    """The message without Hydra's pointers to its manual and OmegaConf's notes on its internals."""
    lines = [
        line
        for line in str(error).splitlines()
        if not line.strip().startswith(("See https://hydra.cc", "full_key:", "object_type="))
    ]
    return " ".join(" ".join(lines).split()) or type(error).__name__
