"""The memory that a run may take at most."""

from __future__ import annotations

import os
from pathlib import Path

CGROUP = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
"""Where Linux keeps what a container may take, by version of control groups."""


def total(device: str) -> int:
    """Bytes of the device, whoever else uses them; on a CPU those of the machine, swap included, or of the
    container."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.mem_get_info(device)[1]
    limits = [int(text) for file in CGROUP if (text := _text(file)).isdigit()]
    return min([_machine(), *(limit for limit in limits if limit > 0)])


def _machine() -> int:
    lines = dict(line.split(":", 1) for line in _text(Path("/proc/meminfo")).splitlines())
    found = [int(lines[name].split()[0]) * 1024 for name in ("MemTotal", "SwapTotal") if name in lines]
    return sum(found) or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _text(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""
