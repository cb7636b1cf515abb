"""Tokenised texts, kept by content: the same texts with the same tokenizer are encoded once for all runs of a
folder.

    examples = encoded(runs_dir / ".cache", tokenizer, pairs, eos=True, encode=batches.encode)

A file's name is the hash of all that the tokens depend on: the texts, the tokenizer with its special tokens,
`eos`, the source of `encode`'s module, and the versions of the libraries. Nothing has to be invalidated by
hand. Files appear whole (`files.write`), so processes may share a folder; a file that cannot be read, or
whose checksums are wrong, is made anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import os
import time
import zipfile
import zlib
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from moabench.benchmarks.machine import files

from .batches import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Pairs = Sequence[tuple[str, str]]

FEWEST = 500
"""Smaller sets are encoded each time: that takes as long as looking for a file."""
LIMIT = 2**30
"""Bytes of a folder. When a file is added, those that have not been used for longest go until the rest
fits."""
ABANDONED = 24 * 3600
"""Seconds after which a half-written file belongs to nobody."""


def encoded(
    folder: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Pairs,
    eos: bool,
    encode: Callable[..., list[Example]],
    limit: int = LIMIT,
) -> list[Example]:
    """`encode(tokenizer, pairs, eos)`, from `folder` where it was done before. Tokenizers written in Python
    are not cached."""
    if len(pairs) < FEWEST or not tokenizer.is_fast:
        return encode(tokenizer, pairs, eos)
    path = Path(folder).expanduser() / f"{key(tokenizer, pairs, eos, encode)}.npz"
    known = _read(path, len(pairs))
    if known is not None:
        with contextlib.suppress(OSError):  # it may have gone since
            os.utime(path)
        return known
    examples = encode(tokenizer, pairs, eos)
    _write(path, examples)
    _trim(path, limit)
    return examples


def key(
    tokenizer: PreTrainedTokenizerBase, pairs: Pairs, eos: bool, encode: Callable[..., list[Example]]
) -> str:
    """SHA-256 (hex) of everything that the tokens depend on."""
    content = hashlib.sha256()
    state = {
        "tokenizer": tokenizer.backend_tokenizer.to_str(),
        "class": type(tokenizer).__qualname__,
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "eos": bool(eos),
        "encode": encode.__qualname__,
        "code": inspect.getsource(inspect.getmodule(encode)),
        "versions": [metadata.version(name) for name in ("tokenizers", "transformers")],
        "format": 1,
    }
    content.update(json.dumps(state, sort_keys=True).encode())
    for prompt, answer in pairs:
        one, other = prompt.encode("utf-8", "surrogatepass"), answer.encode("utf-8", "surrogatepass")
        content.update(b"%d %d " % (len(one), len(other)) + one + other)
    return content.hexdigest()


def _read(path: Path, count: int) -> list[Example] | None:
    """The examples of a file; None if there is none, or none that can be used. A zip file checks its members'
    CRC when they are read."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            ids, lengths, starts = stored["ids"], stored["lengths"], stored["starts"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        return None
    if not (len(lengths) == len(starts) == count and lengths.sum() == len(ids)):
        return None
    flat, ends = ids.tolist(), np.cumsum(lengths).tolist()
    return [
        Example(flat[end - length : end], start)
        for end, length, start in zip(ends, lengths.tolist(), starts.tolist(), strict=True)
    ]


def _write(path: Path, examples: Sequence[Example]) -> None:
    """ids (all after one another), lengths, starts; two bytes a token where the vocabulary allows."""
    ids = np.fromiter((token for example in examples for token in example.ids), dtype=np.int32)
    small = len(ids) and ids.min() >= 0 and ids.max() < 2**16
    arrays = {
        "ids": ids.astype(np.uint16) if small else ids,
        "lengths": np.array([len(example.ids) for example in examples], dtype=np.int32),
        "starts": np.array([example.start for example in examples], dtype=np.int32),
    }

    def fill(temporary: Path) -> None:
        with temporary.open("wb") as file:
            np.savez(file, **arrays)

    files.write(path, fill)


def _trim(newest: Path, limit: int) -> None:
    """Remove the files used longest ago until the folder holds at most `limit` bytes; `newest` stays. Others
    may do the same meanwhile."""
    found = []
    for path in newest.parent.iterdir():
        with contextlib.suppress(FileNotFoundError):
            state = path.stat()
            if path.suffix == ".npz":
                found.append((path == newest, state.st_mtime, path, state.st_size))
            elif path.suffix == ".tmp" and time.time() - state.st_mtime > ABANDONED:
                path.unlink()
    total = sum(size for *_, size in found)
    for is_newest, _, path, size in sorted(found):
        if total <= limit or is_newest:
            return
        path.unlink(missing_ok=True)
        total -= size
