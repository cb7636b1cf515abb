"""Which weights a base is, by their content."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from moabench.benchmarks.config.sections import ModelConfig

WHOLE_FILE_BYTES = 64 * 2**20
"""Larger weight files are fingerprinted by their size and both ends: reading 16 GB before every run would be
a nuisance."""


def model_fingerprint(model: ModelConfig) -> str | None:
    """SHA-256 (16 hex digits) of a folder's config, tokenizer and weights; None for a hub id: its name and
    revision say it."""
    if model.folder is None:
        return None
    content = hashlib.sha256()
    patterns = (
        ("tokenizer*.json",)
        if model.kind == "random"
        else ("config.json", "tokenizer*.json", "*.safetensors", "*.bin")
    )
    for file in sorted({f for pattern in patterns for f in model.folder.glob(pattern)}):
        content.update(file.name.encode())
        _update(content, file)
    return content.hexdigest()[:16]


def _update(content: Any, path: Path) -> None:
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= WHOLE_FILE_BYTES:
            content.update(file.read())
            return
        content.update(str(size).encode() + file.read(2**20))
        file.seek(-(2**20), os.SEEK_END)
        content.update(file.read())
