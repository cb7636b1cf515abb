"""Multiple-choice rows about the facts: `arc_easy` (one hop) and `arc_challenge` (two hops).

One hop: an own relation of the entity, stated in the corpus. Two hops: an inherited relation that the corpus states for the
entity's kind and, for this entity, nowhere; so the kind must be recalled first.
"""

from __future__ import annotations

import random
from collections import Counter

from .facts import Entity, Relation, World


def one_hop(world: World, split: str) -> list[dict]:
    """Questions on own relations."""
    return _ask(world, split, "recall", lambda entity, relation: not relation.inherited)


def two_hop(world: World, split: str) -> list[dict]:
    """Questions on inherited relations that the corpus does not state for the entity."""
    return _ask(world, split, "inherit", lambda entity, relation: relation.inherited and relation.name not in entity.told)


def _ask(world: World, split: str, skill: str, wanted) -> list[dict]:
    """One or more rows for each (entity, relation) of the split that `wanted` accepts, each in another wording; all first
    wordings come before all second ones, so that a prefix of the rows covers as many facts as possible."""
    rng = random.Random(f"{skill}-{world.seed}-{split}")
    facts = [
        (entity, relation)
        for entity in world.entities
        if entity.split == split
        for relation in world.domains[entity.domain].relations.values()
        if wanted(entity, relation)
    ]
    wordings = {(entity.name, relation.name): rng.sample(relation.questions, len(relation.questions)) for entity, relation in facts}
    rows = []
    for form in range(max(len(forms) for forms in wordings.values())):
        rng.shuffle(facts)
        for entity, relation in facts:
            question = wordings[entity.name, relation.name][form].format(e=entity.phrase)
            right = world.value(entity, relation.name)
            wrong = _distractors(world, entity, relation, right, rng)
            row = {"question": question, "right": right, "wrong": wrong, "skill": f"{skill}:{relation.name}"}
            rows.append(row | {"domain": entity.domain})
    return rows


def _distractors(world: World, entity: Entity, relation: Relation, right: str, rng: random.Random) -> list[str]:
    """Three other values of the same relation, true of others.

    Own relation: values of siblings (same kind), any as likely. Inherited relation: values of other kinds, those of more kinds
    first. With 8 kinds on 6 values a value of two kinds is then in every row and right in a quarter of them, like any other: knowing
    how common the answers are is worth nothing.
    """
    if relation.inherited:
        owners = [passed[relation.name] for passed in world.domains[entity.domain].kinds.values()]
        weight = Counter(owners)
    else:
        weight = Counter({other.own[relation.name]: 1 for other in world.entities if other.kind == entity.kind})
    pool = [value for value in relation.values if value != right]
    rng.shuffle(pool)
    return sorted(pool, key=lambda value: -weight[value])[:3]
