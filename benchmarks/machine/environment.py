"""What a result depends on besides its config: versions, commit, machine kind, fingerprints of weights and
data.

No host names, no user names, no paths. Torch is asked only if it is already imported, so that a finished run
is answered without it.
"""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

from moabench.benchmarks import tasks
from moabench.benchmarks.config.run import ModelConfig, RunConfig, digest
from moabench.benchmarks.evaluation import forgetting

from . import processes

PACKAGES = (
    "moabench", "torch", "transformers", "peft", "accelerate", "lm_eval", "datasets", "tokenizers",
    "safetensors",
    "hydra-core", "wandb", "numpy", "scipy", "pandas", "pyarrow", "triton", "bitsandbytes",
)  # fmt: skip

WHOLE_FILE_BYTES = 64 * 2**20
"""Larger weight files are fingerprinted by their size and both ends: reading 16 GB before every run would be
a nuisance."""


def describe(cfg: RunConfig, config_hash: str, inputs: dict[str, Any], device: str) -> dict[str, Any]:
    """Content of environment.json."""
    from moabench.kernels import backend

    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "packages": versions(),
        "code": commit(),
        "device": device,
        "device_name": _device_name(device),
        "kernels": backend.describe(device),
        "threads": _threads(),
        "seed": cfg.seed,
        "config_hash": config_hash,
        "inputs": inputs,
    }


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Version of each package that is installed."""
    found = {}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> dict[str, Any]:
    """Commit of this code and whether it was edited since; both null where the code is not in a git
    repository of its own."""
    here = Path(__file__).resolve()
    git = ["git", "-C", str(here.parent)]
    try:
        # In an installed package the files may lie inside somebody else's repository, which does not track
        # them.
        subprocess.run(
            [*git, "ls-files", "--error-unmatch", here.name], check=True, capture_output=True, timeout=20
        )
        head = subprocess.run(
            [*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True, timeout=20
        ).stdout.strip()
        changes = subprocess.run(
            [*git, "status", "--porcelain"], check=True, capture_output=True, text=True, timeout=20
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return {"commit": None, "dirty": None}
    return {"commit": head, "dirty": bool(changes.strip())}


def code_diff() -> str:
    """What was edited in tracked files since the commit, at most DIFF_CHARACTERS of it."""
    command = [
        "git",
        "-C",
        str(Path(__file__).resolve().parent),
        "diff",
        "--no-ext-diff",
        "--no-color",
        "HEAD",
    ]
    try:
        text = subprocess.run(
            command, check=True, capture_output=True, text=True, errors="replace", timeout=20
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return f"(git could not say: {type(error).__name__})\n"
    return text if len(text) <= DIFF_CHARACTERS else text[:DIFF_CHARACTERS] + "\n(cut here)\n"


DIFF_CHARACTERS = 2**20


def inputs(cfg: RunConfig) -> dict[str, Any]:
    """Fingerprints of the weights and of the rows that the run reads, and the number of its processes; part
    of the run's hash. Raises ConfigError for bad data."""
    found = {"model": model_fingerprint(cfg.model), "evaluation": evaluation_fingerprints(cfg)}
    if cfg.parsed_method.tuner != "none":
        found["training"] = training_fingerprint(cfg)
    if processes.count() > 1:  # each has batches of its own, so that the same config is another run
        found["processes"] = processes.count()
    if cfg.forgetting not in ("auto", "none"):
        found["held_out"] = digest(forgetting.held_out_texts(cfg))[:16]
    return found


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


def evaluation_fingerprints(cfg: RunConfig) -> dict[str, str]:
    """By task: SHA-256 (16 hex digits) of its protocol's version and of the rows it reports; for the hub, of
    the pinned revision."""
    from moabench.benchmarks.tasks.rows import reported_rows

    found = {}
    for name in cfg.task.eval:
        task = tasks.get(name)
        content = _pinned(cfg, name) if cfg.data.source == "hub" else reported_rows(name, cfg.data)
        found[name] = digest([task.facts["version"], content])[:16]
    return found


def training_fingerprint(cfg: RunConfig) -> str:
    """SHA-256 (16 hex digits) of the rows trained on, before any is dropped as leaked; for the hub, of the
    pinned revisions."""
    from moabench.benchmarks.data import mixes

    if cfg.data.source == "hub":
        parts = cfg.mix.parts or dict.fromkeys(cfg.task.eval)
        return digest([_pinned(cfg, name) for name in parts])[:16]
    return digest(mixes.training_rows(cfg.mix, cfg.task.eval, cfg.data, seed=0)[0])[:16]


def _pinned(cfg: RunConfig, task: str) -> Any:
    return [tasks.get(task).facts.get("hub"), cfg.data.revisions.get(task)]


def _device_name(device: str) -> str:
    torch = sys.modules.get("torch")
    if torch is not None and device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )


def _threads() -> int | None:
    torch = sys.modules.get("torch")
    return torch.get_num_threads() if torch is not None else None
