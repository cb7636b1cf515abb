"""The pre-training corpus: short paragraphs that state every fact of the world, and never ask for one.

Three sorts of paragraph: about an entity (its kind, own facts, and the inherited facts that are `told`), about a kind (all
that it passes on), and arithmetic stories with plain sums.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from .facts import Domain, Entity, World
from .stories import story

TOLD_FORMS = (
    "being a {kind}, {clause}",
    "like every {kind}, {clause}",
    "{clause}, as any {kind} does",
    "as a {kind}, {clause}",
)
KIND_FORMS = ("{s} is a {kind}", "{s} is one kind of {kind}", "{s} belongs to the {kind} family")
KIND_SUBJECTS = ("every {kind}", "a {kind}", "each {kind}")


def documents(world: World) -> Iterator[str]:
    """The corpus of `world`, paragraph by paragraph, without line breaks."""
    rng = random.Random(f"corpus-{world.seed}")
    config = world.config
    kinds = [(domain, kind) for domain in world.domains.values() for kind in domain.kinds]
    for _ in range(config.documents):
        draw = rng.random()
        if draw < config.story_documents:
            yield story(rng, config.max_number)
        elif draw < config.story_documents + config.kind_documents:
            yield _about_kind(world, *rng.choice(kinds), rng)
        else:
            yield _about_entity(world, rng.choice(world.entities), rng)


def _about_entity(world: World, entity: Entity, rng: random.Random) -> str:
    """Kind first (mostly), then facts in random order; the first sentence names the entity, later ones may use a pronoun."""
    relations = world.domains[entity.domain].relations
    known = [*entity.own, *sorted(entity.told)]
    clauses = []
    if rng.random() < 0.75:
        clauses.append(_article(rng.choice(KIND_FORMS).format(s=entity.phrase, kind=entity.kind)))
    for name in rng.sample(known, min(world.config.facts_per_paragraph, len(known))):
        subject = entity.phrase if not clauses or rng.random() < 0.6 else entity.pronoun
        clause = rng.choice(relations[name].statements).format(s=subject, v=world.value(entity, name))
        if relations[name].inherited and rng.random() >= world.config.bare_share:
            clause = _article(rng.choice(TOLD_FORMS).format(kind=entity.kind, clause=clause))
        clauses.append(clause)
    return " ".join(_sentence(clause) for clause in clauses)


def _about_kind(world: World, domain: Domain, kind: str, rng: random.Random) -> str:
    """Facts that `kind` passes on to its members."""
    passed = domain.kinds[kind]
    clauses = []
    for name in rng.sample(sorted(passed), min(world.config.facts_per_paragraph, len(passed))):
        subject = rng.choice(KIND_SUBJECTS).format(kind=kind)
        clauses.append(_article(rng.choice(domain.relations[name].statements).format(s=subject, v=passed[name])))
    return " ".join(_sentence(clause) for clause in clauses)


def _article(clause: str) -> str:
    """`a otter` -> `an otter`."""
    words = clause.split(" ")
    for i in range(len(words) - 1):
        if words[i] in ("a", "A") and words[i + 1][:1] in "aeiou":
            words[i] += "n"
    return " ".join(words)


def _sentence(clause: str) -> str:
    return f"{clause[0].upper()}{clause[1:]}."
