"""The command line that makes a run again, from its config alone."""

from __future__ import annotations

import functools
import json
import re
import shlex
from collections.abc import Iterable, Mapping
from typing import Any

from moabench.benchmarks.config.choices import CONF, groups
from moabench.benchmarks.config.hashing import NOT_IN_HASH
from moabench.benchmarks.config.overrides import composed
from moabench.benchmarks.run.reading import flat
from moabench.methods.spec import ConfigError

CHOICES = ("method", "model", "data", "mix")
"""Groups that a config names itself; which file of `train` was used it does not say, so that with the fewest
changes is taken."""


def command(config: Mapping[str, Any], seeds: Iterable[int] = ()) -> str | None:
    """`python run.py ...` that composes this config again, with `-m seed=0,1` for several seeds.

    None where no command does: a method or key that this version does not have (a method of a notebook, an
    older run).
    """
    try:
        words = _words(config)
        if _result(_composed(tuple(words)), config) != _result(config, config):
            return None
    # a config that this version does not have, or of a shape of which nothing can be said
    except (ConfigError, LookupError, TypeError, AttributeError, ValueError):
        return None
    seeds = sorted({int(seed) for seed in seeds})
    if len(seeds) > 1:
        words = [
            "-m",
            *(word for word in words if not word.startswith("seed=")),
            f"seed={','.join(map(str, seeds))}",
        ]
    return " ".join(["python run.py", *map(shlex.quote, words)])


def _words(config: Mapping[str, Any]) -> list[str]:
    """Choices of groups, then every key that differs from what they compose."""
    words = [
        f"{group}={_named(config, group)}"
        for group in CHOICES
        if group in config and _named(config, group) in groups()[group]
    ]
    if _named(config, "model") not in groups()["model"]:
        words.append(f"model.path={_typed(config['model'].get('path'))}")
    if config["data"].get("root") is not None:  # without it `data=local` composes nothing
        words.append(f"data.root={_typed(config['data']['root'])}")
    task = config["task"]["name"].split("+")
    words += [f"task={task[0] if len(task) == 1 else _typed(task)}", f"train={_recipe(config['train'])}"]
    wanted, there = (_flat(_result(data, config)) for data in (config, _composed(tuple(words))))
    changed = [
        f"{key}={_typed(value)}" for key, value in wanted.items() if key not in there or there[key] != value
    ]
    defaults = {f"{key}={value}" for key, value in _defaults().items()}
    return [word for word in words if word not in defaults or word.startswith(("method=", "task="))] + changed


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """By dotted keys; what differs by layer is one value, since its keys ('0-3+6') are no words of a dotted
    key."""
    layers = (config.get("method") or {}).get("layers")
    if not layers:
        return flat(config)
    return flat({**config, "method": {k: v for k, v in config["method"].items() if k != "layers"}}) | {
        "method.layers": layers
    }


def _recipe(train: Mapping[str, Any]) -> str:
    """The file of conf/train that differs from `train` in the fewest keys."""

    def changes(recipe: str) -> int:
        there = _composed((f"train={recipe}",))["train"]
        return sum(there.get(key) != value for key, value in train.items())

    return min(groups()["train"], key=changes)


def _named(config: Mapping[str, Any], group: str) -> str:
    return config[group]["source" if group == "data" else "name"]


def _result(config: Mapping[str, Any], like: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a config that the result depends on, of the sections and keys that `like` has: an older run
    lacks some.

    `method.about` is prose, and a task is said by its name.
    """
    kept: dict[str, Any] = {}
    for section, value in config.items():
        if section not in like or (section in NOT_IN_HASH and NOT_IN_HASH[section] is None):
            continue
        if isinstance(value, Mapping):
            left_out = NOT_IN_HASH.get(section) or (
                {"about"} if section == "method" else {"eval"} if section == "task" else set()
            )
            value = {key: part for key, part in value.items() if key not in left_out and key in like[section]}
        kept[section] = value
    return json.loads(json.dumps(kept))


@functools.lru_cache(maxsize=256)
def _composed(words: tuple[str, ...]) -> dict[str, Any]:
    """The config that a command line composes, as config.yaml has it. Raises ConfigError for one that
    composes none."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    try:
        return composed(words).to_dict()
    except (HydraException, OmegaConfBaseException, TypeError, ValueError) as error:
        raise ConfigError(" ".join(str(error).split())) from error


@functools.cache
def _defaults() -> dict[str, str]:
    """Group -> its default choice."""
    import yaml

    chosen = yaml.safe_load((CONF / "config.yaml").read_text(encoding="utf-8"))["defaults"]
    return {group: choice for entry in chosen if isinstance(entry, dict) for group, choice in entry.items()}


def _typed(value: Any) -> str:
    """A value in the words of Hydra's command line."""
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{_typed(part)}" for key, part in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(_typed, value)) + "]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str) and not re.fullmatch(r"[A-Za-z_/][\w./-]*", value):
        return "'" + value.replace("'", r"\'") + "'"
    return str(value)
