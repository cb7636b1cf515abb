"""Which weights a base is, by the whole content of every file that is read of it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from moabench.benchmarks.config.sections import ModelConfig
from moabench.benchmarks.machine import files
from moabench.benchmarks.machine.files import RunError, StorageError

from . import gguf

READ = ("json", "txt", "model", "jinja", "tiktoken", "safetensors", "bin")
"""Endings of the files that transformers may read of a model's folder: configs, tokenizers, chat templates,
weights."""
SHIPPED = {
    "builtin": ("config.json", "tokenizer*.json", "*.safetensors", "*.bin"),
    "random": ("tokenizer*.json",),
}
"""By kind: what is hashed of the folder that comes with this version. The rest of it is the version's."""

LARGE = 64 * 2**20
"""Bytes from which a file's hash is kept."""
SETTLED = 2 * 10**9
"""Nanoseconds since a file's last change from which its hash is kept: a write in the same tick of the file
system's clock leaves no trace."""
BLOCKS, BLOCK = 64, 4096
"""Number and bytes of the blocks that are compared before a kept hash is believed."""


@dataclass(frozen=True)
class Fingerprint:
    """What a base was when its files were read.

    digest: SHA-256 (16 hex digits) of all of them; None for a hub id, which its name and revision say.
    contents: file -> SHA-256 (hex).
    """

    digest: str | None
    contents: Mapping[Path, str]
    model: ModelConfig
    runs_dir: str | Path

    def check(self) -> None:
        """Raises RunError naming the file that is not what it was: weights on a CPU are the file itself,
        mapped into memory, so that a write to it changes a loaded model."""
        found = model_fingerprint(self.model, self.runs_dir).contents
        if self.model.gguf is not None:
            self._check_converted()
        for file in sorted({*found, *self.contents}):
            if found.get(file) != self.contents.get(file):
                raise RunError(
                    f"{file} was changed while the run used it, so the result would belong to no model; "
                    "expected the files of a base to stay as they are until its runs have ended. The same "
                    "command starts a run of the files as they are now."
                )

    def _check_converted(self) -> None:
        cache = Path(self.runs_dir).expanduser() / ".cache"
        for file, written in gguf.contents(self.digest).items():
            if _content(file, cache) != written:
                raise RunError(
                    f"{file} is not what was made of {self.model.gguf}; expected the user's cache as it was "
                    f"written. `rm -r {file.parent}`, and the same command makes it anew."
                )


def model_fingerprint(model: ModelConfig, runs_dir: str | Path) -> Fingerprint:
    """Of the files of a base. The hashes of large ones are kept in `<runs_dir>/.cache` by inode, size and
    times, so that reading 16 GB is not part of every run. Raises RunError for a file that changes meanwhile
    or cannot be read."""
    cache = Path(runs_dir).expanduser() / ".cache"
    if (file := model.gguf) is not None:
        content = _content(file, cache)
        return Fingerprint(gguf.digest(content), {file: content}, model, runs_dir)
    folder = model.folder
    if folder is None:
        return Fingerprint(None, {}, model, runs_dir)
    contents = {file: _content(file, cache) for file in _files(model, folder)}
    whole = hashlib.sha256()
    for file, content in contents.items():
        if model.kind == "pretrained":
            whole.update(json.dumps([file.relative_to(folder).as_posix(), content]).encode())
        else:  # small, and named so since the first version: their runs are found again
            whole.update(file.name.encode() + file.read_bytes())
    return Fingerprint(whole.hexdigest()[:16], contents, model, runs_dir)


def _files(model: ModelConfig, folder: Path) -> list[Path]:
    """What is read of the folder, in order."""
    if model.kind != "pretrained":
        return sorted({file for pattern in SHIPPED[model.kind] for file in folder.glob(pattern)})
    patterns = [*(f"*.{ending}" for ending in READ), "additional_chat_templates/*.jinja"]
    if model.trust_remote_code:
        patterns.append("**/*.py")
    return sorted({file for pattern in patterns for file in folder.glob(pattern) if file.is_file()})


def _content(path: Path, cache: Path) -> str:
    """SHA-256 (hex) of a file, from the cache where it was made before of the same file."""
    with _opened(path) as file:
        stamp = _stamp(file)
        if stamp["size"] < LARGE:
            return hashlib.file_digest(file, "sha256").hexdigest()
        kept = cache / f"file-{hashlib.sha256(json.dumps(stamp).encode()).hexdigest()[:32]}.json"
        sample = _sample(file, stamp["size"])
        known = files.cached(kept) or {}
        if known.get("sample") == sample and "sha256" in known:
            return known["sha256"]
        file.seek(0)
        content = hashlib.file_digest(file, "sha256").hexdigest()
        if _stamp(file) != stamp:
            raise RunError(f"{path} was changed while it was read; expected files that stay as they are.")
    if time.time_ns() - max(stamp["modified"], stamp["changed"]) > SETTLED:
        with contextlib.suppress(StorageError):  # the next run hashes it again
            files.write_json(kept, {"sample": sample, "sha256": content})
    return content


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror}.") from error


def _stamp(file: BinaryIO) -> dict[str, int]:
    """What changes when a file is written to or replaced."""
    state = os.fstat(file.fileno())
    return {
        "device": state.st_dev,
        "inode": state.st_ino,
        "size": state.st_size,
        "modified": state.st_mtime_ns,
        "changed": state.st_ctime_ns,
    }


def _sample(file: BinaryIO, size: int) -> str:
    """SHA-256 (hex) of blocks spread over the file, both ends among them: against clocks that lie."""
    content = hashlib.sha256()
    for i in range(BLOCKS):
        file.seek((size - BLOCK) * i // (BLOCKS - 1))
        content.update(file.read(BLOCK))
    return content.hexdigest()
