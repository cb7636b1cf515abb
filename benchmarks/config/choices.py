"""What a user can choose: the groups of conf/, from its folders."""

from __future__ import annotations

from pathlib import Path

CONF = Path(__file__).resolve().parents[2] / "conf"
"""Folder of the Hydra groups, in the repository as in an installed package."""


def groups() -> dict[str, list[str]]:
    """Every choice a user can make: {"task": ["addsub", "arc", ...], ...}, read from the folders."""
    choices = {
        folder.name: sorted(f.stem for f in folder.glob("*.yaml"))
        for folder in sorted(CONF.iterdir())
        if folder.is_dir()
    }
    return {name: found for name, found in choices.items() if found}
