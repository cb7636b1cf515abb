"""Questions that start from properties and not from a name: `commonsenseqa`, five choices.

    which:kind          "Which of these eats seeds and moves by hopping?"          two properties -> the kind
    concept:<relation>  "Some animal eats seeds and moves by hopping. Where ...?"  two properties -> (the
                        kind) -> a third

The two properties are true of one kind only. A split has its own combinations of given properties and asked
property; each kind, and each value of a relation, is right about equally often.
"""

from __future__ import annotations

import random
from itertools import combinations

from moabench.benchmarks.world.facts import LIMITS, Axes, Domain, World, spread
from moabench.benchmarks.world.text import deal, lexicon, sentences, with_article

SHARE = 0.03


def commonsenseqa(world: World, split: str, axes: Axes) -> list[dict]:
    """Both sorts of questions in turn."""
    rng = random.Random(f"commonsenseqa-{world.seed}")
    which, concepts = [], []
    for domain in world.domains.values():
        which += _which(world, domain, split, rng)
        concepts += _concepts(world, domain, split, rng)
    rng = random.Random(f"commonsenseqa-{world.seed}-{split}")
    rng.shuffle(which)
    rng.shuffle(concepts)
    return [row for pair in zip(which, concepts, strict=True) for row in pair]


WRITERS = {"commonsenseqa": commonsenseqa}


def paragraph(world: World, rng: random.Random) -> str:
    """Kinds by their properties, the kind last."""
    domain = world.domains[rng.choice(sorted(world.domains))]
    kind, entry = rng.choice(sorted(domain.kinds)), lexicon("reverse")
    pairs = [rng.sample(sorted(domain.kinds[kind]), 2) for _ in range(2)]
    return sentences(
        [
            rng.choice(entry["statements"]).format(
                n=_noun(domain), c=_clause(domain, kind, pair, rng), k=kind
            )
            for pair in pairs
        ]
    )


def _which(world: World, domain: Domain, split: str, rng: random.Random) -> list[dict]:
    combos = {
        kind: deal(_pairs(domain, kind, sorted(passed)), world, rng)[split]
        for kind, passed in domain.kinds.items()
    }
    rng = random.Random(f"{domain.name}-{world.seed}-{split}")
    rows = []
    for kind in spread(tuple(domain.kinds), _size(world, split), rng):
        pair = rng.choice(combos[kind])
        others = [other for other in domain.kinds if other != kind]
        question = rng.choice(lexicon("reverse")["kinds"]).format(
            c=_clause(domain, kind, pair, rng), n=_noun(domain)
        )
        rows.append(
            {
                "question": question,
                "right": kind,
                "wrong": others,
                "options": 5,
                "skill": "which:kind",
                "domain": domain.name,
            }
        )
    return rows


def _concepts(world: World, domain: Domain, split: str, rng: random.Random) -> list[dict]:
    inherited = [relation for relation in domain.relations.values() if relation.inherited]
    combos: dict[tuple[str, str], list] = {}
    for asked in inherited:
        given = [relation.name for relation in inherited if relation is not asked]
        for value in asked.values:
            kinds = [kind for kind, passed in domain.kinds.items() if passed[asked.name] == value]
            found = [(kind, pair) for kind in kinds for pair in _pairs(domain, kind, given)]
            combos[asked.name, value] = deal(found, world, rng)[split] if len(found) >= 3 else []
    rng = random.Random(f"{domain.name}-{world.seed}-{split}")
    rows, entry = [], lexicon("reverse")
    for asked, value in spread(tuple(key for key in combos if combos[key]), _size(world, split), rng):
        kind, pair = rng.choice(combos[asked, value])
        query = rng.choice(domain.relations[asked].questions).format(e=entry["such"].format(n=_noun(domain)))
        question = rng.choice(entry["concepts"]).format(
            n=_noun(domain), c=_clause(domain, kind, pair, rng), q=query
        )
        wrong = [other for other in domain.relations[asked].values if other != value]
        row = {"question": with_article(question), "right": value, "wrong": wrong, "options": 5}
        rows.append(row | {"skill": f"concept:{asked}", "domain": domain.name})
    return rows


def _size(world: World, split: str) -> int:
    """Rows of one sort and domain, half of the split in all."""
    return -(-LIMITS[split] // (2 * len(world.domains)))


def _pairs(domain: Domain, kind: str, relations: list[str]) -> list[tuple[str, str]]:
    """The pairs of `relations` whose values no other kind shares both of."""
    passed = domain.kinds[kind]
    others = [other for name, other in domain.kinds.items() if name != kind]
    return [
        pair
        for pair in combinations(relations, 2)
        if not any(all(other[r] == passed[r] for r in pair) for other in others)
    ]


def _clause(domain: Domain, kind: str, pair, rng: random.Random) -> str:
    """Two properties without a subject: "eats seeds and moves by hopping"."""
    parts = [
        rng.choice(domain.relations[name].statements).format(s="", v=domain.kinds[kind][name]).strip()
        for name in rng.sample(pair, 2)
    ]
    return " and ".join(parts)


def _noun(domain: Domain) -> str:
    return lexicon("reverse")["nouns"][domain.name]
