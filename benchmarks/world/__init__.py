"""The built-in world: a seeded generator of a small consistent world, as a corpus and as benchmark tasks.

    from moabench.benchmarks.world import rows
    rows("arc_easy", "test")[0]
    # {"id": ..., "question": ..., "choices": [4 strings], "label": 0..3, "skill": "recall:colour", "domain": "animals"}

`seed` draws another world; the shipped base model (`tiny/`) has read the corpus of seed 0. Nothing here imports torch.
"""

from __future__ import annotations

import difflib
import hashlib
import random
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from .corpus import documents
from .facts import SPLITS, World, WorldConfig, build_world
from .questions import one_hop, two_hop
from .stories import addsub

__all__ = ["MODEL", "SPLITS", "TASKS", "WorldConfig", "build_world", "content_hash", "corpus", "rows"]

MODEL = Path(__file__).parent / "tiny"
"""Folder of the shipped base model."""

_WRITERS = {
    "addsub": lambda world, split: addsub(split, world.seed, world.config),
    "arc_challenge": two_hop,
    "arc_easy": one_hop,
}
TASKS = tuple(_WRITERS)

LIMITS = {"train": 2400, "validation": 300, "test": 800}
"""Most rows of a split."""


def rows(task: str, split: str, seed: int = 0, n: int | None = None, config: WorldConfig | None = None) -> list[dict]:
    """The first `n` rows (all when None) of a split; rows of one split are shuffled and label positions balanced."""
    _check("task", task, TASKS)
    _check("split", split, SPLITS)
    return [dict(row, choices=list(row["choices"])) for row in _rows(task, split, seed, config or WorldConfig())[:n]]


def corpus(seed: int = 0, config: WorldConfig | None = None) -> Iterator[str]:
    """The pre-training paragraphs that state every fact the rows ask for."""
    return documents(build_world(seed, config or WorldConfig()))


def content_hash(seed: int = 0, config: WorldConfig | None = None, paragraphs: int = 2000) -> str:
    """SHA-256 (first 16 hex digits) of the dials, all rows and the first `paragraphs` of the corpus; names a world in run records."""
    config = config or WorldConfig()
    digest = hashlib.sha256(repr(config).encode())
    for task in TASKS:
        for split in SPLITS:
            digest.update(repr(_rows(task, split, seed, config)).encode())
    for _, paragraph in zip(range(paragraphs), corpus(seed, config), strict=False):
        digest.update(paragraph.encode())
    return digest.hexdigest()[:16]


@lru_cache(maxsize=32)
def _rows(task: str, split: str, seed: int, config: WorldConfig) -> tuple[dict, ...]:
    world: World = build_world(seed, config)
    drafts = _WRITERS[task](world, split)
    rng = random.Random(f"rows-{task}-{split}-{seed}")
    if task == "addsub":
        rng.shuffle(drafts)
    drafts = drafts[: LIMITS[split]]
    rng.shuffle(drafts)
    labels = [i % 4 for i in range(len(drafts))]
    rng.shuffle(labels)
    return tuple(_finish(task, split, i, *pair, rng) for i, pair in enumerate(zip(drafts, labels, strict=True)))


def _finish(task: str, split: str, number: int, draft: dict, label: int, rng: random.Random) -> dict:
    """A draft (right, wrong) as a row with shuffled choices and the right one at `label`."""
    choices = rng.sample(draft["wrong"], 3)
    choices.insert(label, draft["right"])
    row = {"id": f"world/{task}-{split}-{number}", "question": draft["question"], "choices": choices, "label": label}
    return row | {key: value for key, value in draft.items() if key not in ("question", "right", "wrong")}


def _check(what: str, given: str, known: tuple[str, ...]) -> None:
    if given not in known:
        near = difflib.get_close_matches(str(given), known, n=1, cutoff=0.0)
        raise ValueError(f"world: unknown {what} {given!r}; expected one of {', '.join(known)}; nearest is {near[0]!r}")
