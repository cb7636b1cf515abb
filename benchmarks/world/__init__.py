"""The built-in world: a seeded generator of a small consistent world, as a corpus and as benchmark tasks.

    from moabench.benchmarks.world import rows
    rows("arc_easy", "test")[0]
    # {"id": ..., "question": ..., "choices": [4 strings], "label": 0..3, "skill": "recall:colour", "domain":
    "animals"}

`seed` draws another world; the shipped base model (`tiny/`) has read the corpus of seed 0. Nothing here
imports torch.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from moabench.methods.spec import ConfigError, nearest

from .corpus import documents
from .facts import LIMITS, SPLITS, Axes, WorldConfig, build_world
from .writers import writers

__all__ = [
    "LIMITS",
    "MODEL",
    "SPLITS",
    "TASKS",
    "Axes",
    "WorldConfig",
    "build_world",
    "content_hash",
    "corpus",
    "corpus_hash",
    "rows",
]

MODEL = Path(__file__).parent / "tiny"
"""Folder of the shipped base model."""

TASKS = tuple(writers())
"""All tasks of the world, from the families in `forms/`."""


def rows(
    task: str,
    split: str,
    seed: int = 0,
    n: int | None = None,
    config: WorldConfig | None = None,
    axes: Axes | None = None,
) -> list[dict]:
    """The first `n` rows (all when None) of a split; rows of one split are shuffled and label positions
    balanced."""
    _check("task", task, TASKS)
    _check("split", split, SPLITS)
    found = _rows(task, split, seed, config or WorldConfig(), axes or Axes())
    return [dict(row, choices=list(row["choices"])) for row in found[:n]]


def corpus(seed: int = 0, config: WorldConfig | None = None, heldout: bool = False) -> Iterator[str]:
    """The pre-training paragraphs that state every fact the rows ask for. `heldout`: other paragraphs of the
    same distribution, of which none is in the corpus."""
    return documents(build_world(seed, config or WorldConfig()), heldout)


def content_hash(seed: int = 0, config: WorldConfig | None = None, paragraphs: int = 2000) -> str:
    """SHA-256 (first 16 hex digits) of the dials, all rows and the first `paragraphs` of the corpus; names a
    world in run records."""
    config = config or WorldConfig()
    digest = hashlib.sha256(corpus_hash(seed, config, paragraphs).encode())
    for task in TASKS:
        for split in SPLITS:
            digest.update(repr(_rows(task, split, seed, config, Axes())).encode())
    return digest.hexdigest()[:16]


def corpus_hash(seed: int = 0, config: WorldConfig | None = None, paragraphs: int = 2000) -> str:
    """The same of the dials and the corpus alone: what a base model has read."""
    config = config or WorldConfig()
    digest = hashlib.sha256(repr(config).encode())
    for _, paragraph in zip(range(paragraphs), corpus(seed, config), strict=False):
        digest.update(paragraph.encode())
    return digest.hexdigest()[:16]


@lru_cache(maxsize=64)
def _rows(task: str, split: str, seed: int, config: WorldConfig, axes: Axes) -> tuple[dict, ...]:
    drafts = writers()[task](build_world(seed, config), split, axes)[: LIMITS[split]]
    rng = random.Random(f"rows-{task}-{split}-{seed}")
    rng.shuffle(drafts)
    labels = {options: _labels(options, n, rng) for options, n in Counter(map(_options, drafts)).items()}
    return tuple(
        {"id": f"world/{task}-{split}-{i}"}
        | (draft if "label" in draft else _placed(draft, labels[_options(draft)].pop(), rng))
        for i, draft in enumerate(drafts)
    )


def _options(draft: dict) -> int:
    """How many choices a draft gets; 0 where it brings them in fixed order."""
    return 0 if "label" in draft else draft.get("options", 4)


def _labels(options: int, n: int, rng: random.Random) -> list[int]:
    """`n` positions of the right choice among `options`, each equally often (up to one), in random order."""
    labels = [i % options for i in range(n)] if options else []
    rng.shuffle(labels)
    return labels


def _placed(draft: dict, label: int, rng: random.Random) -> dict:
    """A draft with `right` and `wrong` as one with shuffled choices and the right one at `label`."""
    choices = rng.sample(draft["wrong"], _options(draft) - 1)
    choices.insert(label, draft["right"])
    rest = {key: value for key, value in draft.items() if key not in ("right", "wrong", "options")}
    return {"question": rest.pop("question"), "choices": choices, "label": label} | rest


def _check(what: str, given: str, known: tuple[str, ...]) -> None:
    if given not in known:
        raise ConfigError(f"world: unknown {what} {given!r}.{nearest(given, known)}")
