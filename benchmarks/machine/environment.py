"""What a result depends on besides its config: versions, commit, machine kind, fingerprints of weights and
data.

No host names, no user names, no paths. Torch is asked only if it is already imported, so that a finished run
is answered without it.
"""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = (
    "moabench", "torch", "transformers", "peft", "accelerate", "lm_eval", "datasets", "tokenizers",
    "safetensors",
    "hydra-core", "wandb", "numpy", "scipy", "pandas", "pyarrow", "triton", "bitsandbytes",
)  # fmt: skip


def describe(seed: int, config_hash: str, inputs: dict[str, Any], device: str) -> dict[str, Any]:
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
        "seed": seed,
        "config_hash": config_hash,
        "inputs": inputs,
    }


def after(earlier: dict[str, Any] | None, described: dict[str, Any]) -> dict[str, Any]:
    """`described`, with the environments of the attempts that a resumed run goes on from under `before`, the
    first one first, where they were others."""
    if earlier is None:
        return described
    before = list(earlier.get("before", []))
    now = {key: value for key, value in earlier.items() if key != "before"}
    if now != described:
        before.append(now)
    return described | ({"before": before} if before else {})


def changed(described: dict[str, Any]) -> list[str]:
    """Dotted keys in which the attempts of a run differ; empty for a run of one environment."""
    before = described.get("before") or []
    plain = [_flat({k: v for k, v in one.items() if k != "before"}) for one in (described, *before)]
    keys = dict.fromkeys(key for one in plain for key in one)
    return [key for key in keys if len({repr(one.get(key)) for one in plain}) > 1]


def _flat(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in data.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


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
