"""The name of a run: the hash of everything that can change its result."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from moabench.methods.spec import LATER

__all__ = ["LATER", "digest", "plain"]

NOT_IN_HASH = {
    "runs_dir": None, "keep": None, "retry": None, "experiment": None, "logger": None, "quiet": None,
    "traceback": None, "threads": None, "recipe": None,
    "shard": None, "train": {"log_every", "save_every", "halve"}, "data": {"allow_cut"},
}  # fmt: skip
"""What cannot change the result: whole sections (None) or some of their keys."""


def digest(data: Any) -> str:
    """SHA-256 (hex) of plain data, independent of the order of keys."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, default=str).encode()).hexdigest()


def plain(value: Any, hashed: bool = False) -> Any:
    """Dataclasses as dicts; a part keeps its `kind`, which is a class attribute, since two kinds may have
    equal fields. hashed: without the `LATER` fields that are at their default."""
    if dataclasses.is_dataclass(value):
        kind = {"kind": value.kind} if isinstance(getattr(type(value), "kind", None), str) else {}
        fields = {
            f.name: getattr(value, f.name)
            for f in dataclasses.fields(value)
            if not (hashed and _later(value, f))
        }
        return kind | {name: plain(part, hashed) for name, part in fields.items()}
    if isinstance(value, Mapping):
        return {str(k): plain(v, hashed) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        ordered = sorted(value, key=str) if isinstance(value, set | frozenset) else value
        return [plain(v, hashed) for v in ordered]
    return value


def _later(value: Any, field: dataclasses.Field) -> bool:
    """Whether a field of `value` says what was so before there was the field."""
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return field.metadata.get("later", False) and getattr(value, field.name) == default
