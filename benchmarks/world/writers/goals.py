"""What helps to reach a goal: `piqa` (two solutions that differ in one word) and `openbookqa` (the fact about
the kind given or not).

Both need an inherited fact of an entity. `axes.hops`:

    piqa        1  the goal names the kind, whose property must be recalled
                2  the kind must be recalled too (default)
    openbookqa  1  the fact about the kind is given, among those of other kinds; the kind must be recalled
                (skill open:given) 2  nothing is given (skill open:recall) default: half of the rows each
"""

from __future__ import annotations

import random
from collections import Counter

from moabench.benchmarks.world.facts import LIMITS, Axes, Entity, Relation, World
from moabench.benchmarks.world.text import capital, lexicon, people, sentences, with_article

from .arc import distractors, untold


def piqa(world: World, split: str, axes: Axes) -> list[dict]:
    """A goal, and two solutions of which one uses the value of the thing's kind."""
    named = axes.choose("hops", (1, 2), 2) == 1
    rng = random.Random(f"piqa-{world.seed}-{split}")
    drafts = []
    for entity, relation in _facts(world, split, rng, lambda entity, relation: relation.inherited):
        entry = lexicon("goals")[entity.domain][relation.name]
        phrase = f"{entity.phrase}, a {entity.kind}" if named else entity.phrase
        solution = rng.choice(entry["solutions"])
        right = world.value(entity, relation.name)
        drafts.append(
            {
                "question": with_article(capital(rng.choice(entry["goals"]).format(e=phrase)) + "."),
                "right": solution.format(v=right),
                "wrong": [solution.format(v=_other(world, entity, relation, right, rng))],
                "options": 2,
                "skill": f"goal:{relation.name}",
                "domain": entity.domain,
            }
        )
    return drafts


def openbookqa(world: World, split: str, axes: Axes) -> list[dict]:
    """A goal of a person, and values of which one serves it; for half of the rows the context gives the facts
    of three kinds."""
    hops = axes.choose("hops", (1, 2))
    rng = random.Random(f"openbookqa-{world.seed}-{split}")
    entry, drafts = lexicon("openbook"), []
    for i, (entity, relation) in enumerate(_facts(world, split, rng, untold)):
        given = hops == 1 or (hops is None and i % 2 == 0)
        person, goals = rng.choice(people(split)), lexicon("goals")[entity.domain][relation.name]["goals"]
        question = rng.choice(entry["questions"]).format(
            p=person, g=rng.choice(goals).format(e=entity.phrase)
        )
        wrong = distractors(world, entity, relation, rng)
        row = {"context": _book(world, entity, relation, wrong[:2], rng)} if given else {}
        row |= {"question": question, "right": world.value(entity, relation.name), "wrong": wrong}
        drafts.append(
            row | {"skill": f"open:{'given' if given else 'recall'}:{relation.name}", "domain": entity.domain}
        )
    return drafts


WRITERS = {"piqa": piqa, "openbookqa": openbookqa}


def _facts(world: World, split: str, rng: random.Random, wanted) -> list[tuple[Entity, Relation]]:
    """As many pairs as the split has rows, all pairs before any comes again."""
    pairs = [
        (entity, relation)
        for entity in world.entities
        if entity.split == split
        for relation in world.domains[entity.domain].relations.values()
        if wanted(entity, relation)
    ]
    return [pair for _ in range(-(-LIMITS[split] // len(pairs))) for pair in rng.sample(pairs, len(pairs))][
        : LIMITS[split]
    ]


def _other(world: World, entity: Entity, relation: Relation, right: str, rng: random.Random) -> str:
    """A value of another kind; values of one kind and values of two are drawn equally often, so that neither
    sort is a better guess."""
    owners = Counter(passed[relation.name] for passed in world.domains[entity.domain].kinds.values())
    owners.pop(right)
    groups = sorted({count for count in owners.values()})
    count = rng.choice(groups)
    return rng.choice(sorted(value for value in owners if owners[value] == count))


def _book(world: World, entity: Entity, relation: Relation, others: list[str], rng: random.Random) -> str:
    """The relation's fact of the entity's kind and of kinds that have `others`, in random order."""
    kinds = world.domains[entity.domain].kinds
    owners = [
        rng.choice([kind for kind, passed in kinds.items() if passed[relation.name] == value])
        for value in others
    ]
    statement, subject = rng.choice(relation.statements), lexicon("openbook")["given"]
    facts = [
        statement.format(s=subject.format(k=kind), v=kinds[kind][relation.name])
        for kind in (entity.kind, *owners)
    ]
    rng.shuffle(facts)
    return sentences(facts)
