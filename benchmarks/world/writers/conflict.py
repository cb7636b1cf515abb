"""Conflicts: four tasks that ask about the same inputs and demand four different answers.

An input is the beginning of a sentence about an entity ("The zarun comes from"), which names one of its four
own relations. A convention says which relation is meant: convention k answers with the relation k places
further on (the first is plain language). Its number stands before the sentence and is all that the prompts of
the four tasks differ in. The choices are the four own facts of the entity, each right under one convention:
to know the facts, or to read the sentence alone, is worth chance.

The strength (`axes.conflict`) is the share of the sentences on which the conventions disagree. On the others
all follow `AGREED`.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import lru_cache, partial

from moabench.benchmarks.world.facts import Axes, Domain, Entity, World

TASKS = ("conflict_first", "conflict_second", "conflict_third", "conflict_fourth")
SHARED = ("colour", "region", "season")
"""Own relations of every domain; the fourth is the domain's own."""
AGREED = (0, 2, 3, 1)
"""Relation that all conventions answer with where they agree. It leaves one of four in its place, as the four
conventions together do."""
ORDER = (1, 2, 0, 3)
"""Relations in the order in which the conventions begin to disagree on them as the strength grows."""


@lru_cache(maxsize=16)
def relations(domain: str, own: tuple[str, ...]) -> tuple[str, ...]:
    """The four own relations of a domain in the order that the conventions turn in."""
    found = (*SHARED, *sorted(set(own) - set(SHARED)))
    if len(found) != 4 or not set(SHARED) < set(own):
        raise ValueError(
            f"world: domain {domain} has the own relations {', '.join(own)}; conflicts need "
            f"{', '.join(SHARED)} and one more"
        )
    return found


def openings(domain: Domain, relation: str) -> list[str]:
    """How sentences about a relation begin, up to its value: "{s} comes from"."""
    return [statement.partition("{v}")[0].strip() for statement in domain.relations[relation].statements]


def disputed(world: World, strength: float) -> frozenset[tuple[str, str]]:
    """(domain, opening) of the sentences on which the conventions disagree: the share `strength` of all,
    relation by relation."""
    cells = [
        (domain.name, opening)
        for place in ORDER
        for domain in world.domains.values()
        for opening in openings(domain, _own(domain)[place])
    ]
    return frozenset(cells[: round(strength * len(cells))])


def answer(place: int, convention: int, disagree: bool) -> int:
    """Place of the relation that a sentence about the relation at `place` is to be answered with."""
    return (place + convention) % 4 if disagree else AGREED[place]


def write(world: World, split: str, axes: Axes, convention: int) -> list[dict]:
    """All sentences of the split under one convention, in the same order for all; first wordings first."""
    rng = random.Random(f"conflict-{world.seed}-{split}")
    disagree = disputed(world, axes.conflict)
    inputs = [(entity, place) for entity in world.entities if entity.split == split for place in range(4)]
    wordings = {}
    for entity, place in inputs:
        domain = world.domains[entity.domain]
        found = openings(domain, _own(domain)[place])
        wordings[entity.name, place] = rng.sample(found, len(found))
    drafts = []
    for form in range(max(map(len, wordings.values()))):
        rng.shuffle(inputs)
        for entity, place in inputs:
            for opening in wordings[entity.name, place][
                form : form + 1
            ]:  # a relation may have fewer wordings
                drafts.append(_draft(world, entity, place, opening, convention, disagree))
    return drafts


def _draft(
    world: World, entity: Entity, place: int, opening: str, convention: int, disagree: frozenset
) -> dict:
    names = _own(world.domains[entity.domain])
    facts = [entity.own[name] for name in names]
    right = facts.pop(answer(place, convention, (entity.domain, opening) in disagree))
    sentence = opening.format(s=entity.phrase)
    draft = {
        "context": f"{convention + 1}.",
        "question": sentence[0].upper() + sentence[1:],
        "right": right,
        "wrong": facts,
    }
    return draft | {"skill": f"convention:{convention + 1}", "domain": entity.domain}


def _own(domain: Domain) -> tuple[str, ...]:
    return relations(
        domain.name, tuple(name for name, relation in domain.relations.items() if not relation.inherited)
    )


WRITERS: dict[str, Callable[[World, str, Axes], list[dict]]] = {
    task: partial(write, convention=convention) for convention, task in enumerate(TASKS)
}
