"""Specs: plain data in, validated parts out. Imports no torch, so that a bad config answers at once.

A part (a router, a bank of experts, a loss) is a frozen dataclass: its fields are its options, its methods
its equations, and its tensors are declared, not owned. `build` turns a mapping into such a dataclass and
refuses what does not fit with one error that names the key, the value, what was expected and the nearest
valid name. The same function validates every other config of the project.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import math
import pkgutil
import re
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

LATER = {"later": True}
"""Metadata of a field that came after runs were made: at its default it is in no run's hash, so that they are
still found."""


class ConfigError(ValueError):
    """A config value that cannot be used. The message names key, value, expectation and, where one is near,
    the valid name."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """' Did you mean 'x'?' for the valid name closest to `name`, or the list of valid names where none is
    close."""
    valid = sorted(map(str, valid))
    close = difflib.get_close_matches(str(name), valid, n=1, cutoff=0.5)
    return f" Did you mean '{close[0]}'?" if close else f" Valid: {', '.join(valid)}." if valid else ""


@dataclass(frozen=True)
class Bound:
    """Range of a number, used as `Annotated[int, Bound(ge=1)]`."""

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None

    def __str__(self) -> str:
        signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
        return " and ".join(
            f"{sign} {end:,}" if isinstance(end := getattr(self, k), int) else f"{sign} {end:g}"
            for k, sign in signs.items()
            if getattr(self, k) is not None
        )

    def holds(self, value: float) -> bool:
        return (
            (self.ge is None or value >= self.ge)
            and (self.gt is None or value > self.gt)
            and (self.le is None or value <= self.le)
            and (self.lt is None or value < self.lt)
        )


Count = typing.Annotated[int, Bound(ge=1, le=10**6)]
"""A size: of a part, a batch, a set of tokens. No number is without an end: what lies beyond fills the memory
before anything can be said about it."""
Many = typing.Annotated[int, Bound(ge=1, le=10**9)]
"""Steps, rows and the like, which cost time and no memory."""
Seed = typing.Annotated[int, Bound(ge=0, lt=2**32)]
"""What every generator takes: numpy's takes no more."""
Positive = typing.Annotated[float, Bound(gt=0, le=1e9)]
NonNegative = typing.Annotated[float, Bound(ge=0, le=1e9)]
Share = typing.Annotated[float, Bound(ge=0, lt=1)]


@dataclass(frozen=True)
class FileName:
    """Text that becomes part of a file's name, used as `Annotated[str, FileName()]`: it names no other
    folder, fits into a file system's 255 bytes with what is put around it, and holds nothing that a terminal
    obeys."""

    def __str__(self) -> str:
        return "that can stand in a file name: letters, digits and ._+@-, not first a dot, at most 100 bytes"

    def holds(self, value: str) -> bool:
        return bool(re.fullmatch(r"[\w+@-][\w.+@-]*", value)) and len(value.encode()) <= 100


Name = typing.Annotated[str, FileName()]


def build(cls: type, data: Mapping[str, Any], path: str = "") -> Any:
    """Instance of the dataclass `cls` from `data`; `path` is the dotted key under which the user knows
    `data`.

    Raises ConfigError for unknown or missing keys, wrong types, values out of range, and what
    `cls.__post_init__` refuses.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(f"{path or cls.__name__}: expected a mapping of options, got {data!r}.")
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    for key in data:
        if key not in fields:
            raise ConfigError(
                f"unknown key '{_join(path, key)}' (value {data[key]!r}).{nearest(key, fields)}"
            )
    for name, f in fields.items():
        if name not in data and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise ConfigError(f"missing key '{_join(path, name)}': expected {_describe(_hints(cls)[name])}.")
    values = {key: _convert(value, _hints(cls)[key], _join(path, key)) for key, value in data.items()}
    try:
        return cls(**values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}" if path else str(error)) from None


def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls, include_extras=True)


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else str(key)


def _describe(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return f"{_describe(args[0])} {args[1]}"
    if origin is Literal:
        return "one of " + ", ".join(map(str, args))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_describe(a) for a in args)
    if origin is tuple:
        return f"a list of {_describe(args[0])}"
    if hint is type(None):
        return "null"
    return {int: "a whole number", float: "a number", str: "text", bool: "true or false"}.get(
        hint, getattr(hint, "__name__", str(hint))
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 400 else f"{text[:400]} ..."


def _quoted(value: Any, hint: Any) -> str:
    """What helps where text was wanted that reads as something else, as a commit of digits does."""
    is_text = hint is str or str in typing.get_args(hint)
    return (
        " Text that reads as a number needs quotes of its own: '\"...\"'."
        if is_text and isinstance(value, int | float)
        else ""
    )


def _convert(value: Any, hint: Any, path: str) -> Any:
    """`value` as the type `hint` asks for, or ConfigError."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    wrong = ConfigError(f"{path}={_short(value)}: expected {_describe(hint)}.{_quoted(value, hint)}")
    if hint is Any:
        return value
    if origin is typing.Annotated:
        found = _convert(value, args[0], path)
        if not args[1].holds(found):
            raise wrong
        return found
    if origin is Literal:
        if value not in args:
            near = (
                nearest(value, args)
                if isinstance(value, str) and all(isinstance(a, str) for a in args)
                else ""
            )
            raise ConfigError(f"{wrong}{near if 'mean' in near else ''}")
        return value
    if origin in (typing.Union, types.UnionType):
        errors = []
        for option in args:
            try:
                return _convert(value, option, path)
            except ConfigError as error:
                errors += [] if option is type(None) else [error]
        raise errors[0] if len(errors) == 1 and value is not None else wrong
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, Iterable):
            raise wrong
        return tuple(_convert(v, args[0], f"{path}[{i}]") for i, v in enumerate(value))
    if origin in (dict, Mapping) or hint in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise wrong
        return {k: _convert(v, args[1], _join(path, k)) for k, v in value.items()} if args else dict(value)
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else build(hint, value, path)
    if hint is type(None):
        if value is not None:
            raise wrong
        return None
    if hint is float and not isinstance(value, bool):
        try:
            number = float(value)  # YAML 1.1 reads 1e-3 as text
        except (TypeError, ValueError, OverflowError):
            raise wrong from None
        if not math.isfinite(number):
            raise wrong
        return number
    if isinstance(value, bool) != (hint is bool) or not isinstance(value, hint):
        raise wrong
    return value


class Part:
    """Base of the kinds that a spec names by `kind`. A subclass with a `kind` registers itself under its
    family.

    A family (Router, Experts, Loss) is a direct subclass; the files of the folder named by `folder` are its
    members.
    """

    kind: ClassVar[str]
    registry: ClassVar[dict[str, Any]]
    folder: ClassVar[str | None] = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if Part in cls.__bases__:
            cls.registry = {}
        elif "kind" in cls.__dict__:
            cls.registry[cls.kind] = cls

    @classmethod
    def kinds(cls) -> dict[str, Any]:
        """Every kind of this family, by name; imports the family's folder on first use."""
        if cls.folder:
            package = importlib.import_module(cls.folder)
            for module in pkgutil.iter_modules(package.__path__):
                importlib.import_module(f"{cls.folder}.{module.name}")
        return cls.registry

    @classmethod
    def of_kind(cls, kind: Any, path: str) -> Any:
        """The class registered as `kind`; ConfigError with the nearest name otherwise."""
        kinds = cls.kinds()
        if not isinstance(kind, str) or kind not in kinds:
            raise ConfigError(f"{path}.kind={kind!r}: no such {cls.__name__.lower()}.{nearest(kind, kinds)}")
        return kinds[kind]

    @classmethod
    def parse(cls, data: Mapping[str, Any], path: str) -> Any:
        """Part from `{"kind": ..., option: value, ...}`."""
        if not isinstance(data, Mapping) or "kind" not in data:
            raise ConfigError(
                f"{path}={data!r}: expected a mapping with 'kind', one of {', '.join(sorted(cls.kinds()))}."
            )
        return build(cls.of_kind(data["kind"], path), {k: v for k, v in data.items() if k != "kind"}, path)

    @classmethod
    def options(cls) -> set[str]:
        """Names of the options of this kind."""
        return {f.name for f in dataclasses.fields(cls) if f.init}


def drop_stale(
    data: dict[str, Any], original: Mapping[str, Any], family: type[Part], path: str
) -> dict[str, Any]:
    """`data` without the options that `original` had set for another kind and the present kind does not know.

    With it `router.kind=topk` alone turns an AdaMoLE into a top-k mixture, and a mistyped option is still an
    error.
    """
    kind = data.get("kind")
    if kind is None or kind == original.get("kind"):
        return data
    known = family.of_kind(kind, path).options() | {"kind"}
    return {k: v for k, v in data.items() if k in known or k not in original}
