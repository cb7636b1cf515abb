"""Multiple-choice rows about single entities: `arc_easy` (own facts) and `arc_challenge` (inherited facts).

`axes.hops` counts the facts that must be joined:

    arc_easy       1  an own fact of the entity, stated in the corpus (default)
                   2  an own fact of the thing that a person has: the thing must be recalled first
    arc_challenge  1  an inherited fact that the corpus states for the entity
                   2  one that it states for the entity's kind and, for this entity, nowhere: the kind must be
                      recalled first (default)
                   3  the same of the thing that a person has: thing, kind, fact
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

from moabench.benchmarks.world.facts import Axes, Entity, Relation, World
from moabench.benchmarks.world.text import lexicon, sentences

SHARE = 0.03
"""Paragraphs about people and their things."""


def easy(world: World, split: str, axes: Axes) -> list[dict]:
    """Questions on own relations."""
    linked = axes.choose("hops", (1, 2), 1) == 2
    return _ask(
        world, split, "link" if linked else "recall", lambda entity, relation: not relation.inherited, linked
    )


def challenge(world: World, split: str, axes: Axes) -> list[dict]:
    """Questions on inherited relations."""
    hops = axes.choose("hops", (1, 2, 3), 2)
    if hops == 1:
        return _ask(world, split, "told", lambda entity, relation: relation.name in entity.told)
    return _ask(world, split, "inherit" if hops == 2 else "chain", untold, linked=hops == 3)


WRITERS = {"arc_easy": easy, "arc_challenge": challenge}


def paragraph(world: World, rng: random.Random) -> str:
    """A person's thing: whose it is, its kind or an own fact, and again whose it is."""
    person = rng.choice([entity for entity in world.entities if entity.domain == "people"])
    thing = world.links[person.name]
    entry = lexicon("links")[thing.domain]
    first, last = rng.sample(entry["statements"], 2)
    phrase = rng.choice(entry["phrase"]).format(p=person.phrase)
    own = world.domains[thing.domain].relations[rng.choice(sorted(thing.own))]
    middle = [
        f"{phrase} is {thing.phrase}",
        rng.choice(own.statements).format(s=rng.choice((phrase, thing.phrase)), v=thing.own[own.name]),
    ]
    rng.shuffle(middle)
    return sentences(
        [first.format(p=person.phrase, e=thing.phrase), *middle, last.format(p=person.phrase, e=thing.phrase)]
    )


def untold(entity: Entity, relation: Relation) -> bool:
    """Whether the corpus states the relation for the entity's kind only."""
    return relation.inherited and relation.name not in entity.told


def _ask(
    world: World, split: str, skill: str, wanted: Callable[[Entity, Relation], bool], linked: bool = False
) -> list[dict]:
    """One or more rows for each (entity, relation) of the split that `wanted` accepts, each in another
    wording; all first wordings come before all second ones, so that a prefix of the rows covers as many facts
    as possible. `linked`: asked of the entity as the thing of its owner, who is named in its place."""
    rng = random.Random(f"{skill}-{world.seed}-{split}")
    subjects = [(entity, entity.phrase) for entity in world.entities if entity.split == split]
    if linked:
        subjects = [
            (thing, rng.choice(lexicon("links")[thing.domain]["phrase"]).format(p=owner.phrase))
            for owner, _ in subjects
            if (thing := world.links.get(owner.name))
        ]
    facts = [
        (entity, phrase, relation)
        for entity, phrase in subjects
        for relation in world.domains[entity.domain].relations.values()
        if wanted(entity, relation)
    ]
    wordings = {
        (entity.name, relation.name): rng.sample(relation.questions, len(relation.questions))
        for entity, _, relation in facts
    }
    rows = []
    for form in range(max(len(forms) for forms in wordings.values())):
        rng.shuffle(facts)
        for entity, phrase, relation in facts:
            question = wordings[entity.name, relation.name][form].format(e=phrase)
            right = world.value(entity, relation.name)
            row = {"question": question, "right": right, "wrong": distractors(world, entity, relation, rng)}
            rows.append(row | {"skill": f"{skill}:{relation.name}", "domain": entity.domain})
    return rows


def distractors(world: World, entity: Entity, relation: Relation, rng: random.Random) -> list[str]:
    """Three other values of the same relation, true of others.

    Own relation: values of siblings (same kind), any as likely. Inherited relation: values of other kinds,
    those of more kinds first. With 8 kinds on 6 values a value of two kinds is then in every row and right in
    a quarter of them, like any other: knowing how common the answers are is worth nothing.
    """
    if relation.inherited:
        weight = Counter(passed[relation.name] for passed in world.domains[entity.domain].kinds.values())
    else:
        weight = Counter(world.own_values[entity.kind, relation.name])
    pool = [value for value in relation.values if value != world.value(entity, relation.name)]
    rng.shuffle(pool)
    return sorted(pool, key=lambda value: -weight[value])[:3]
