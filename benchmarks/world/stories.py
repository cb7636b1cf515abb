"""Arithmetic: stories and sums for the corpus, word problems for `addsub`.

Names and number pairs of the three splits are disjoint in the questions; the corpus uses all of them.
"""

from __future__ import annotations

import random
from functools import lru_cache

import yaml

from .facts import LEXICON, SPLITS, WorldConfig, split_sizes

OPERATIONS = {"add": lambda a, b: a + b, "sub": lambda a, b: a - b}
SIGNS = {"add": "+", "sub": "-"}


@lru_cache(maxsize=1)
def lexicon() -> dict:
    """The entries of `lexicon/stories.yaml`."""
    return yaml.safe_load((LEXICON / "stories.yaml").read_text(encoding="utf-8"))


def story(rng: random.Random, max_number: int) -> str:
    """One story, or three sums, as prose for the corpus."""
    if rng.random() < 0.35:
        return " ".join(_sum(rng, max_number) for _ in range(3))
    words = lexicon()
    skill = words["skills"][rng.choice(sorted(words["skills"]))]
    names = [name for split in SPLITS for name in words["names"][split]]
    objects = [o for theme in words["themes"].values() for o in theme]
    p, q = rng.sample(names, 2)
    a, b = _operands(rng, max_number)
    c = OPERATIONS[skill["operation"]](a, b)
    return rng.choice(skill["statements"]).format(p=p, q=q, o=rng.choice(objects), a=a, b=b, c=c)


def number_pairs(seed: int, config: WorldConfig) -> dict[str, list[tuple[int, int]]]:
    """The pairs a > b that each split's questions may use."""
    pairs = [(a, b) for a in range(3, config.max_number + 1) for b in range(2, a)]
    random.Random(f"pairs-{seed}").shuffle(pairs)
    owners = split_sizes(len(pairs), config.split_shares)
    return {split: [pair for pair, owner in zip(pairs, owners, strict=True) if owner == split] for split in SPLITS}


def addsub(split: str, seed: int, config: WorldConfig) -> list[dict]:
    """Word problems of one split: every number pair with every skill and wording, twice, with names and objects at random."""
    words, rows = lexicon(), []
    rng = random.Random(f"addsub-{seed}-{split}")
    for a, b in number_pairs(seed, config)[split] * 2:
        for skill, entry in words["skills"].items():
            for form in entry["questions"]:
                p, q = rng.sample(words["names"][split], 2)
                theme = rng.choice(sorted(words["themes"]))
                question = form.format(p=p, q=q, o=rng.choice(words["themes"][theme]), a=a, b=b)
                answer = OPERATIONS[entry["operation"]](a, b)
                wrong = wrong_numbers(a, b, entry["operation"], rng)
                equation = f"{a}{SIGNS[entry['operation']]}{b}={answer}"
                rows.append({"question": question, "right": str(answer), "wrong": [str(n) for n in wrong], "skill": skill})
                rows[-1] |= {"domain": theme, "answer": str(answer), "equation": equation}
    return rows


def wrong_numbers(a: int, b: int, operation: str, rng: random.Random) -> list[int]:
    """Three different wrong numbers: the other operation's result, an operand, and a near miss (a farther one on a clash)."""
    right = OPERATIONS[operation](a, b)
    other = OPERATIONS["sub" if operation == "add" else "add"](a, b)
    near = rng.sample((right - 2, right - 1, right + 1, right + 2), 4)
    picked: list[int] = []
    for group in ([other], rng.sample((a, b), 2), near, near, near):
        fresh = [n for n in group if n > 0 and n != right and n not in picked]
        picked += fresh[:1]
    return picked[:3]


def _sum(rng: random.Random, max_number: int) -> str:
    a, b = _operands(rng, max_number)
    operation = rng.choice(("add", "sub"))
    return rng.choice(lexicon()["sums"][operation]).format(a=a, b=b, c=OPERATIONS[operation](a, b)).capitalize()


def _operands(rng: random.Random, max_number: int) -> tuple[int, int]:
    """A pair with `max_number` >= a > b >= 2."""
    a = rng.randint(3, max_number)
    return a, rng.randint(2, a - 1)
