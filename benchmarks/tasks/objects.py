"""JSON objects of a data file: one list, or one object a line. The same rule for the files of tasks and of
mixes: UTF-8, with or without a byte order mark; what is not read is an error that names file and line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moabench.methods.spec import ConfigError

DEEPEST = 50
"""Most lists and objects inside of each other. What reads far deeper ones ends in a RecursionError, here or
where the row is written."""


def objects(content: bytes, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, object) one after the other, from line 1 on. `content`: of the file `path`. Raises
    ConfigError."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}, line {line}: not UTF-8 text ({error.reason}).") from None
    for line, source, item in _listed(text, path) if text.lstrip()[:1] == "[" else _lines(text, path):
        where = f"{path}, line {line}"
        if not isinstance(item, dict):
            raise ConfigError(f"{where}: expected a JSON object, got {type(item).__name__}.")
        _check(item, source, where)
        yield line, item


def _lines(text: str, path: Path) -> Iterator[tuple[int, str, Any]]:
    """(line, its text, its value) of JSONL."""
    for line, source in enumerate(text.split("\n"), 1):
        if source.strip():
            item, end = _decoded(source, _blanks(source, 0), path, line)
            if (rest := _blanks(source, end)) < len(source):
                raise ConfigError(f"{path}, line {line}: not JSON (more at column {rest + 1}).")
            yield line, source, item


def _listed(text: str, path: Path) -> Iterator[tuple[int, str, Any]]:
    """(line, its text, its value) of each entry of a JSON list."""
    position, counted, line = _blanks(text, 0) + 1, 0, 1
    while (position := _blanks(text, position)) < len(text):
        line, counted = line + text.count("\n", counted, position), position
        if text[position] == "]":
            if (rest := _blanks(text, position + 1)) < len(text):
                line += text.count("\n", position, rest)
                raise ConfigError(
                    f"{path}, line {line}: more after the end of the list. Expected one list, or one object "
                    "a line."
                )
            return
        item, end = _decoded(text, position, path, line)
        yield line, text[position:end], item
        position = _blanks(text, end)
        if text[position : position + 1] not in (",", "]"):
            line += text.count("\n", counted, position)
            raise ConfigError(f"{path}, line {line}: not JSON (expected ',' or ']' after an object).")
        position += text[position] == ","
    line = text.count("\n") + 1
    raise ConfigError(f"{path}, line {line}: not JSON (the list has no end).")


def _decoded(text: str, position: int, path: Path, line: int) -> tuple[Any, int]:
    """(value, where it ends) of what begins at `position`, on `line`."""
    try:
        return json.JSONDecoder().raw_decode(text, position)
    except json.JSONDecodeError as error:
        line += text.count("\n", position, error.pos)
        raise ConfigError(f"{path}, line {line}: not JSON ({error.msg} at column {error.colno}).") from None
    except RecursionError:
        raise ConfigError(_too_deep(f"{path}, line {line}")) from None
    except ValueError:  # of Python, for whole numbers of thousands of digits
        raise ConfigError(f"{path}, line {line}: a number of thousands of digits in it.") from None


def _check(item: dict[str, Any], source: str, where: str) -> None:
    """ConfigError for what no later step could write down again."""
    if source.count("[") + source.count("{") > DEEPEST and _depth(item) > DEEPEST:
        raise ConfigError(_too_deep(where))
    # Half a character comes from an escape alone: the text itself was decoded strictly.
    if "\\ud" in source.lower():
        for key, value in item.items():
            try:
                json.dumps([key, value], ensure_ascii=False).encode()
            except UnicodeEncodeError:
                shown = json.dumps(key)
                raise ConfigError(
                    f"{where}: {shown} holds half of a surrogate pair (\\ud800 to \\udfff alone), which is "
                    "no text."
                ) from None


def _too_deep(where: str) -> str:
    return f"{where}: more than {DEEPEST} lists and objects inside of each other."


def _depth(item: Any) -> int:
    """How deep lists and objects lie inside of each other, counted level by level."""
    level, depth = [item], 0
    while level := [entry for entry in level if isinstance(entry, dict | list)]:
        depth += 1
        level = [inner for entry in level for inner in (entry.values() if isinstance(entry, dict) else entry)]
    return depth


def _blanks(text: str, position: int) -> int:
    """The first place from `position` on that is no blank."""
    while position < len(text) and text[position].isspace():
        position += 1
    return position
