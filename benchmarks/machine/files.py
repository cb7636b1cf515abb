"""Files that are whole or not there: written under another name beside their place, synced, then moved.

Whatever keeps a file from being written is one StorageError that says what to do.
"""

from __future__ import annotations

import errno
import functools
import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any


class RunError(RuntimeError):
    """A run that cannot go on for a reason that the message explains in full."""


class StorageError(RunError):
    """A file cannot be written. The run can go on once that is mended, so it counts as interrupted."""


def write(path: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` write a temporary file beside `path`, then move it there: readers see the old file or the
    whole new one."""
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        fill(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp gives 0600
        os.replace(temporary, path)
    except OSError as error:
        raise storage_error(error, path) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    write(path, lambda file: file.write_text(text, encoding="utf-8") and None)


def write_json(path: Path, data: Any) -> None:
    """Strict JSON: numbers that are not finite become null."""
    write_text(path, json.dumps(_finite(data), indent=2, default=str) + "\n")


def write_yaml(path: Path, data: Any) -> None:
    import yaml

    write_text(path, yaml.safe_dump(data, sort_keys=False, allow_unicode=True))


def write_parquet(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """One row a mapping; a key that a row lacks is null in it."""
    import pandas as pd

    write(path, lambda file: pd.DataFrame(list(rows)).to_parquet(file, index=False))


def write_folder(path: Path, fill: Callable[[Path], None]) -> None:
    """As `write`, for a folder; an old folder at `path` is replaced."""
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
        fill(temporary)
        os.chmod(temporary, 0o777 & ~_umask())
        shutil.rmtree(path, ignore_errors=True)
        os.replace(temporary, path)
    except OSError as error:
        raise storage_error(error, path) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def remove_unfinished(folder: Path) -> None:
    """Remove what `write` and `write_folder` left in `folder` when their process was killed. Nobody may be
    writing there."""
    for temporary in folder.glob(".*.tmp"):
        _remove(temporary)


def remove_folder(path: Path) -> None:
    """Remove a folder at once for its readers: whoever is killed on the way leaves none that is half there,
    but what `remove_unfinished` takes away."""
    hidden = path.with_name(f".{path.name}.tmp")
    _remove(hidden)
    if path.exists():
        os.replace(path, hidden)
        _remove(hidden)


def _remove(path: Path) -> None:
    """Of a link the link alone."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


class Unreadable(RunError):
    """A file that is there does not hold what it should; the message names it."""

    def said(self, folder: Path) -> str:
        """The message with the file as it is called in its folder."""
        return str(self).removeprefix(f"{folder}{os.sep}")


def read_json(path: Path) -> dict[str, Any] | None:
    """The mapping that the file holds; None if there is no such file. Raises Unreadable."""
    return _read(path, json.loads)


def read_yaml(path: Path) -> dict[str, Any] | None:
    """As `read_json`."""
    import yaml

    return _read(path, functools.partial(yaml.load, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)))


def cached(path: Path) -> dict[str, Any] | None:
    """As `read_json`, for a file that can be made anew: None, and a line on stderr, for one that cannot be
    read."""
    try:
        return read_json(path)
    except Unreadable as error:
        print(f"{error} It is made anew.", file=sys.stderr)
        return None


def _read(path: Path, parse: Callable[[str], Any]) -> dict[str, Any] | None:
    try:
        found = parse(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    # A cut or foreign file: parsers have errors of their own (ValueError, YAMLError), and some that they do
    # not foresee (deep nesting, odd dates).
    except Exception as error:
        raise Unreadable(f"{path}: cannot be read ({type(error).__name__}).") from error
    if not isinstance(found, dict):
        raise Unreadable(f"{path}: cannot be read (no mapping).")
    return found


ADVICE = {
    errno.ENOSPC: "the disk is full; free space or choose another runs_dir",
    errno.EDQUOT: "the disk quota is used up; free space or choose another runs_dir",
    errno.EACCES: "no permission; choose another runs_dir",
    errno.EPERM: "no permission; choose another runs_dir",
    errno.EROFS: "the file system is read-only; choose another runs_dir",
    errno.ENOTDIR: "a file stands where a folder is needed; choose another runs_dir",
    errno.EEXIST: "a file stands where a folder is needed; choose another runs_dir",
}
"""What to do when a file cannot be written, by errno."""


def storage_error(error: OSError, path: str | Path) -> StorageError:
    """One clear message for a full disk, an unwritable folder and the like."""
    return StorageError(f"cannot write {path}: {ADVICE.get(error.errno) or error.strerror or error}.")


@functools.cache
def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _finite(data: Any) -> Any:
    if isinstance(data, Mapping):
        return {k: _finite(v) for k, v in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(v) for v in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data
