"""Task families of the world. A family is one file of this folder; a new file is a new family, and nothing
else lists it.

A family has

    WRITERS      task name -> writer(world, split, axes) -> list of drafts, best first (a split keeps a
                 prefix)
    SHARE        optional: its share (0..1) of the corpus paragraphs, with
    paragraph    (world, rng) -> one paragraph that states what its questions take for known

A draft is a dict with question, skill (what must be done) and domain (what it is about), and either `right`,
`wrong` (at least options - 1 texts) and `options` (how many choices, default 4), which `rows` shuffles with
balanced labels, or `choices` and `label` in fixed order. Further keys (context, answer, solution, equation)
go into the row as they are.
"""

from __future__ import annotations

import importlib
import pkgutil
import random
from collections.abc import Callable
from functools import lru_cache
from types import ModuleType

from moabench.benchmarks.world.facts import Axes, World

Writer = Callable[[World, str, Axes], list[dict]]
Paragraph = Callable[[World, random.Random], str]


@lru_cache(maxsize=1)
def families() -> dict[str, ModuleType]:
    """The family modules by name, from the folder."""
    names = sorted(entry.name for entry in pkgutil.iter_modules(__path__))
    return {name: importlib.import_module(f"{__name__}.{name}") for name in names}


@lru_cache(maxsize=1)
def writers() -> dict[str, Writer]:
    """The writer of every task."""
    found: dict[str, Writer] = {}
    for name, family in families().items():
        for task, writer in getattr(family, "WRITERS", {}).items():
            if task in found:
                raise ValueError(f"world: writers/{name}.py and another family both write {task}")
            found[task] = writer
    return dict(sorted(found.items()))


@lru_cache(maxsize=1)
def shares() -> tuple[tuple[float, Paragraph], ...]:
    """(share, paragraph) of every family that writes for the corpus."""
    return tuple(
        (family.SHARE, family.paragraph) for family in families().values() if hasattr(family, "SHARE")
    )
