"""Passages with a yes/no question: `boolq`.

A passage is about one or two things that exist nowhere else; their names are not in the corpus. What must be
done:

    read:one   the passage states the fact of its one thing, in other words              (1 hop)
    read:pair  it states it of two things, with different values: whose is it?           (1 hop)
    read:kind  it states the kind only; what the kind passes on is knowledge of the world  (2 hops)

`axes.facts`: sentences of a passage (default 3 to 5); `axes.hops`: 1 or 2 (default: a third of the rows each
of the three). The corpus has passages of the same build about other names, whose facts come back in other
words before a claim is called true or false.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from moabench.benchmarks.world.facts import LIMITS, Axes, Domain, World
from moabench.benchmarks.world.text import KIND_FORMS, capital, lexicon, sentences, stranger, with_article

SHARE = 0.06
CHOICES = ["false", "true"]


@dataclass(frozen=True)
class Stranger:
    """A thing of one passage: its phrase, kind and values (`kind` among them)."""

    phrase: str
    pronoun: str
    values: dict[str, str]


@dataclass(frozen=True)
class Passage:
    """Sentences, and what may be claimed: the relation asked, the wording used for it, and the value of the
    thing claimed about."""

    clauses: list[str]
    told: list[tuple[Stranger, str, str]]
    """(thing, relation, wording) of each clause."""
    subject: Stranger
    relation: str
    used: str
    others: list[str]
    """Values that would be false."""


def boolq(world: World, split: str, axes: Axes) -> list[dict]:
    """Pairs of drafts, one true and one false."""
    hops = axes.choose("hops", (1, 2))
    n = axes.choose("facts", tuple(range(1, 9)))
    skills = {1: ("one", "pair"), 2: ("kind",), None: ("one", "pair", "kind")}[hops]
    if n == 1:
        skills = tuple(skill for skill in skills if skill != "pair")  # two things take two sentences
    rng = random.Random(f"boolq-{world.seed}-{split}")
    return [
        _draft(world, split, skills[(i // 2) % len(skills)], n or rng.randint(3, 5), bool(i % 2), rng)
        for i in range(LIMITS[split])
    ]


WRITERS = {"boolq": boolq}


def paragraph(world: World, rng: random.Random) -> str:
    """A passage about throw-away things, its facts again in any order and often in other words, and mostly a
    true or a false claim."""
    entry = lexicon("reading")["recap"]
    domain = world.domains[rng.choice(sorted(world.domains))]
    passage = _passage(world, domain, "corpus", rng.choice(("one", "pair", "kind")), rng.randint(2, 3), rng)
    again = [_again(domain, *fact, rng) for fact in rng.sample(passage.told, len(passage.told))]
    again[0] = rng.choice(entry["restate"]).format(c=again[0])
    if rng.random() < 0.6:
        truth = rng.random() < 0.5
        again.append(
            rng.choice(entry["claims"])[0 if truth else 1].format(c=_claim(domain, passage, truth, rng))
        )
    return sentences([*passage.clauses, *again])


def _again(domain: Domain, thing: Stranger, name: str, form: str, rng: random.Random) -> str:
    """A stated fact once more, in any wording of its relation."""
    return rng.choice((form, *_forms(domain, name))).format(s=thing.phrase, v=thing.values[name])


def _forms(domain: Domain, name: str) -> tuple[str, ...]:
    return KIND_FORMS if name == "kind" else domain.relations[name].statements


def _draft(world: World, split: str, skill: str, facts: int, truth: bool, rng: random.Random) -> dict:
    domain = world.domains[rng.choice(sorted(world.domains))]
    passage = _passage(world, domain, split, skill, facts, rng)
    question = rng.choice(lexicon("reading")["questions"]).format(c=_claim(domain, passage, truth, rng))
    row = {"context": sentences(passage.clauses), "question": with_article(capital(question))}
    return row | {"choices": CHOICES, "label": int(truth), "skill": f"read:{skill}", "domain": domain.name}


def _passage(
    world: World, domain: Domain, bucket: str, skill: str, facts: int, rng: random.Random
) -> Passage:
    """`facts` clauses, among them what the claim needs."""
    own = [relation.name for relation in domain.relations.values() if not relation.inherited]
    subject = _stranger(world, domain, bucket, rng)
    if skill == "kind":
        relation, needed = (
            rng.choice([r.name for r in domain.relations.values() if r.inherited]),
            [(subject, "kind")],
        )
        used = ""
        others = [
            passed[relation]
            for passed in domain.kinds.values()
            if passed[relation] != subject.values[relation]
        ]
    else:
        relation, needed = rng.choice(own), []
        used = rng.choice(domain.relations[relation].statements)
        others = [value for value in domain.relations[relation].values if value != subject.values[relation]]
        needed = [(subject, relation)]
    things = [subject]
    if skill == "pair":
        while len(things) < 2 or things[1].phrase == subject.phrase:
            things[1:] = [_stranger(world, domain, bucket, rng, apart=(relation, subject.values[relation]))]
        others = [things[1].values[relation]]
        needed.append((things[1], relation))
    told = [name for name in domain.relations if name != relation and (skill == "kind" or name in own)]
    fill = [(thing, name) for thing in things for name in ("kind", *told) if (thing, name) not in needed]
    if len(fill) < facts - len(needed):  # a long passage about one thing: what its kind passes on, too
        fill += [
            (thing, name) for thing in things for name, spec in domain.relations.items() if spec.inherited
        ]
    chosen = needed + rng.sample(fill, facts - len(needed))
    rng.shuffle(chosen)
    told = [
        (thing, name, used if name == relation else rng.choice(_forms(domain, name)))
        for thing, name in chosen
    ]
    return Passage(_tell(told, rng), told, subject, relation, used, others)


def _tell(told: list[tuple[Stranger, str, str]], rng: random.Random) -> list[str]:
    """The facts as clauses; a pronoun only where the sentence before has the same subject."""
    clauses, last = [], None
    for thing, name, form in told:
        subject = thing.pronoun if thing is last and rng.random() < 0.4 else thing.phrase
        clauses.append(form.format(s=subject, v=thing.values[name]))
        last = thing
    return clauses


def _claim(domain: Domain, passage: Passage, truth: bool, rng: random.Random) -> str:
    """A clause about the passage's subject, in a wording that the passage does not have."""
    value = passage.subject.values[passage.relation] if truth else rng.choice(passage.others)
    statements = [form for form in domain.relations[passage.relation].statements if form != passage.used]
    return rng.choice(statements).format(s=passage.subject.phrase, v=value)


def _stranger(
    world: World, domain: Domain, bucket: str, rng: random.Random, apart: tuple[str, str] | None = None
) -> Stranger:
    """A thing with a new name; `apart`: (relation, value) that it must not have."""
    article, pronouns = domain.article, domain.pronouns
    kind = rng.choice(sorted(domain.kinds))
    values = {"kind": kind, **domain.kinds[kind]}
    for relation in domain.relations.values():
        if not relation.inherited:
            values[relation.name] = rng.choice(
                [value for value in relation.values if (relation.name, value) != apart]
            )
    name = stranger(world, bucket, rng)
    return Stranger(f"{article} {name}" if article else capital(name), rng.choice(pronouns), values)
