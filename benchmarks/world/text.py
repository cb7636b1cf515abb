"""Words and sentences that the corpus and the forms share: lexicon files, sentence building, names, splits of
any list of items."""

from __future__ import annotations

import random
import zlib
from functools import lru_cache
from typing import Any

import yaml

from .facts import LEXICON, SPLITS, World, invent, split_sizes

BUCKETS = {
    "corpus": range(0, 60),
    "train": range(60, 84),
    "validation": range(84, 88),
    "test": range(88, 100),
}
"""Which invented names a passage may use, by a hash of the name in 0..99: the corpus and the splits have none
in common."""


KIND_FORMS = ("{s} is a {v}", "{s} is one kind of {v}", "{s} belongs to the {v} family")
"""How a kind (v) is stated of its member."""


@lru_cache
def lexicon(name: str) -> Any:
    """The entries of `lexicon/<name>.yaml`."""
    return yaml.safe_load((LEXICON / f"{name}.yaml").read_text(encoding="utf-8"))


def with_article(clause: str) -> str:
    """`a otter` -> `an otter`."""
    words = clause.split(" ")
    for i in range(len(words) - 1):
        if words[i] in ("a", "A") and words[i + 1][:1] in "aeiou":
            words[i] += "n"
    return " ".join(words)


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def sentences(clauses: list[str]) -> str:
    """Clauses as sentences in a row; a clause may hold several, parted by ". "."""
    return " ".join(f"{capital(part)}." for clause in clauses for part in with_article(clause).split(". "))


def people(split: str | None = None) -> list[str]:
    """First names of the everyday tasks: those of a split, or all."""
    names = lexicon("names")
    return [name for part in SPLITS if split in (None, part) for name in names[part]]


def stranger(world: World, bucket: str, rng: random.Random) -> str:
    """An invented name that no entity of the world has. Names of different buckets differ."""
    while True:
        name = invent(rng)
        if zlib.crc32(name.encode()) % 100 in BUCKETS[bucket] and name not in world.names:
            return name


def deal(items: list, world: World, rng: random.Random) -> dict[str, list]:
    """`items` in random order, dealt to the splits by the world's `split_shares`."""
    items = rng.sample(items, len(items))
    owners = split_sizes(len(items), world.config.split_shares)
    return {
        split: [item for item, owner in zip(items, owners, strict=True) if owner == split] for split in SPLITS
    }
