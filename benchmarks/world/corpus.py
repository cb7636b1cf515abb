"""The pre-training corpus: short paragraphs that state every fact of the world, and never ask for one.

Paragraphs about an entity (its kind, own facts, and the inherited facts that are `told`) and about a kind
(all that it passes on) are written here; every family in `forms/` that needs other knowledge writes its own
share.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator

from .facts import Domain, Entity, World
from .text import KIND_FORMS, sentences
from .writers import shares

HELD_OUT = 25
"""One of this many paragraphs is kept out of the corpus, by its text."""

TOLD_FORMS = (
    "being a {kind}, {clause}",
    "like every {kind}, {clause}",
    "{clause}, as any {kind} does",
    "as a {kind}, {clause}",
)
KIND_SUBJECTS = ("every {kind}", "a {kind}", "each {kind}")


def documents(world: World, heldout: bool = False) -> Iterator[str]:
    """The corpus of `world`, paragraph by paragraph. A hash of its text says whether a paragraph belongs to
    the corpus or is held out, so that the two can share none."""
    rng = random.Random(f"{'heldout' if heldout else 'corpus'}-{world.seed}")
    for _ in range(world.config.documents):
        paragraph = _paragraph(world, rng)
        while (zlib.crc32(paragraph.encode()) % HELD_OUT == 0) != heldout:
            paragraph = _paragraph(world, rng)
        yield paragraph


def _paragraph(world: World, rng: random.Random) -> str:
    draw = rng.random()
    for share, paragraph in shares():
        if draw < share:
            return paragraph(world, rng)
        draw -= share
    if rng.random() < world.config.kind_documents:
        domain = world.domains[rng.choice(sorted(world.domains))]
        return _about_kind(world, domain, rng.choice(list(domain.kinds)), rng)
    return _about_entity(world, rng.choice(world.entities), rng)


def _about_entity(world: World, entity: Entity, rng: random.Random) -> str:
    """Kind first (mostly), then facts in random order; the first sentence names the entity, later ones may
    use a pronoun."""
    relations = world.domains[entity.domain].relations
    known = [*entity.own, *sorted(entity.told)]
    clauses = []
    if rng.random() < 0.75:
        clauses.append(rng.choice(KIND_FORMS).format(s=entity.phrase, v=entity.kind))
    for name in rng.sample(known, min(world.config.facts_per_paragraph, len(known))):
        subject = entity.phrase if not clauses or rng.random() < 0.6 else entity.pronoun
        clause = rng.choice(relations[name].statements).format(s=subject, v=world.value(entity, name))
        if relations[name].inherited and rng.random() >= world.config.bare_share:
            clause = rng.choice(TOLD_FORMS).format(kind=entity.kind, clause=clause)
        clauses.append(clause)
    return sentences(clauses)


def _about_kind(world: World, domain: Domain, kind: str, rng: random.Random) -> str:
    """Facts that `kind` passes on to its members."""
    passed = domain.kinds[kind]
    clauses = []
    for name in rng.sample(sorted(passed), min(world.config.facts_per_paragraph, len(passed))):
        subject = rng.choice(KIND_SUBJECTS).format(kind=kind)
        clauses.append(rng.choice(domain.relations[name].statements).format(s=subject, v=passed[name]))
    return sentences(clauses)
