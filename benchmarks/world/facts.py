"""The facts of the built-in world: entities, their kinds, and what is true of each.

A domain (animals, plants, ...) is one file in `lexicon/domains/`. Its kinds carry the `inherited` relations,
its entities the `own` relations. `build_world(seed)` draws everything from the seed; a fact is looked up with
`World.value(entity, relation)`.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path

import yaml

from moabench.methods.spec import ConfigError

LEXICON = Path(__file__).parent / "lexicon"
SPLITS = ("train", "validation", "test")
LIMITS = {"train": 2400, "validation": 300, "test": 800}
"""Most rows of a split."""
ONSETS = [
    "b",
    "d",
    "f",
    "g",
    "h",
    "k",
    "l",
    "m",
    "n",
    "p",
    "r",
    "s",
    "t",
    "v",
    "z",
    "br",
    "dr",
    "gl",
    "kl",
    "pr",
    "st",
    "tr",
]
VOWELS = ["a", "e", "i", "o", "u"]
CODAS = ["", "", "", "l", "n", "r", "s", "x"]


@dataclass(frozen=True)
class WorldConfig:
    """Difficulty dials. The defaults were calibrated together with the shipped base model (docs/world.md),
    which has read the corpus of exactly these values: after a change of one of them, pre-train again."""

    entities_per_kind: int = 25
    """Single entities of each kind. More entities: each fact is read less often, one-hop questions get
    harder."""
    told_share: float = 0.4
    """Share (0..1) of the (entity, inherited relation) pairs that the corpus states outright. Only the other
    pairs are asked in `arc_challenge`; more told pairs make the two-hop composition easier to learn."""
    bare_share: float = 0.5
    """Share (0..1) of the told inherited facts that are stated without naming the kind."""
    documents: int = 240_000
    """Paragraphs in the corpus. Each family of tasks that brings its own knowledge has a share of them
    (`SHARE` in `forms/`); the rest is about entities and kinds."""
    kind_documents: float = 0.08
    """Share (0..1) of the paragraphs that are about a kind."""
    max_number: int = 20
    """Largest operand of a story."""
    facts_per_paragraph: int = 3
    """Facts stated about one entity or kind in one paragraph, besides its kind."""
    split_shares: tuple[float, float, float] = (0.6, 0.1, 0.3)
    """Shares of each kind's entities (and of the number pairs of `addsub`) in train, validation and test."""


@dataclass(frozen=True)
class Axes:
    """Difficulty of the questions; None is each task's own. Axes never change the world or its corpus, so
    that a sweep over them needs no new base model. A task that has no choice of an axis ignores it; a value
    outside a task's choice is an error."""

    facts: int | None = None
    """Facts (sentences) that a passage states, in tasks with a passage."""
    hops: int | None = None
    """Steps of reasoning of a question (facts to be joined, or operations of arithmetic)."""
    conflict: float = 1.0
    """How far the tasks of a conflict group disagree, 0 (not at all) to 1."""

    def __post_init__(self):
        for name in ("facts", "hops"):
            value = getattr(self, name)
            if value is not None and not (type(value) is int and value >= 1):
                raise ConfigError(f"axes.{name}={value!r}: expected a whole number from 1, or none.")
        if not 0 <= self.conflict <= 1:
            raise ConfigError(f"axes.conflict={self.conflict!r}: expected a number from 0 to 1.")

    def choose(self, name: str, allowed: tuple[int, ...], default: int | None = None) -> int | None:
        """The axis `name` of a task that has the choice `allowed`; `default` where the axis is not set."""
        value = getattr(self, name)
        if value is not None and value not in allowed:
            raise ConfigError(
                f"axes.{name}={value}: expected one of {', '.join(map(str, allowed))} for this task."
            )
        return default if value is None else value


@dataclass(frozen=True)
class Relation:
    """One relation of a domain: its possible values, how the corpus states it and how a question asks for
    it."""

    name: str
    inherited: bool
    values: tuple[str, ...]
    statements: tuple[str, ...]
    questions: tuple[str, ...]


@dataclass(frozen=True)
class Entity:
    """A single member of a kind. `own` maps relation to value; `told` are the inherited relations the corpus
    states for it."""

    name: str
    domain: str
    kind: str
    split: str
    pronoun: str
    phrase: str
    own: dict[str, str]
    told: frozenset[str]


@dataclass(frozen=True)
class Domain:
    """A domain's relations and what each of its kinds passes on: `kinds[kind][relation] -> value`."""

    name: str
    article: str
    """Before the name of an entity; empty where names stand alone."""
    pronouns: tuple[str, ...]
    relations: dict[str, Relation]
    kinds: dict[str, dict[str, str]]


@dataclass(frozen=True)
class World:
    """All facts for one seed."""

    config: WorldConfig
    seed: int
    domains: dict[str, Domain]
    entities: tuple[Entity, ...] = field(repr=False)
    links: dict[str, Entity] = field(repr=False)
    """Name of a person -> the one animal, plant or tool that is this person's own."""

    @cached_property
    def names(self) -> frozenset[str]:
        """Names of all entities."""
        return frozenset(entity.name for entity in self.entities)

    @cached_property
    def own_values(self) -> dict[tuple[str, str], frozenset[str]]:
        """(kind, own relation) -> the values that its entities have."""
        found: dict[tuple[str, str], set[str]] = {}
        for entity in self.entities:
            for relation, value in entity.own.items():
                found.setdefault((entity.kind, relation), set()).add(value)
        return {key: frozenset(values) for key, values in found.items()}

    def value(self, entity: Entity, relation: str) -> str:
        """The true value of `relation` for `entity`, its own or its kind's."""
        if relation in entity.own:
            return entity.own[relation]
        return self.domains[entity.domain].kinds[entity.kind][relation]


@lru_cache(maxsize=4)
def build_world(seed: int = 0, config: WorldConfig | None = None) -> World:
    """Draw the world of `seed`."""
    config = config or WorldConfig()
    rng = random.Random(f"world-{seed}")
    domains, entities, used = {}, [], set()
    for path in sorted((LEXICON / "domains").glob("*.yaml")):
        entry = yaml.safe_load(path.read_text(encoding="utf-8"))
        domain = _domain(path.stem, entry, rng)
        domains[domain.name] = domain
        entities += _entities(domain, entry, config, rng, used)
    return World(config, seed, domains, tuple(entities), _links(entities, random.Random(f"links-{seed}")))


def spread(values: tuple[str, ...], n: int, rng: random.Random) -> list[str]:
    """`n` values in random order, each used equally often (up to one)."""
    rounds = [rng.sample(values, len(values)) for _ in range(-(-n // len(values)))]
    drawn = [value for one in rounds for value in one][:n]
    rng.shuffle(drawn)
    return drawn


def split_sizes(n: int, shares: tuple[float, float, float]) -> list[str]:
    """A split name for each of `n` items, sizes by `shares`, the rounding going to train."""
    validation, test = max(1, round(n * shares[1])), max(1, round(n * shares[2]))
    return ["train"] * (n - validation - test) + ["validation"] * validation + ["test"] * test


def _domain(name: str, entry: dict, rng: random.Random) -> Domain:
    relations = {
        relation: Relation(
            relation,
            group == "inherited",
            *(tuple(spec[key]) for key in ("values", "statements", "questions")),
        )
        for group in ("inherited", "own")
        for relation, spec in entry[group].items()
    }
    kinds: dict[str, dict[str, str]] = {kind: {} for kind in entry["kinds"]}
    for relation in relations.values():
        if relation.inherited:
            for kind, value in zip(kinds, spread(relation.values, len(kinds), rng), strict=True):
                kinds[kind][relation.name] = value
    return Domain(name, entry["article"], tuple(entry["pronouns"]), relations, kinds)


def _entities(
    domain: Domain, entry: dict, config: WorldConfig, rng: random.Random, used: set[str]
) -> list[Entity]:
    """Entities of one domain; own values are spread evenly inside each kind, so that siblings differ."""
    own = [relation for relation in domain.relations.values() if not relation.inherited]
    inherited = [relation.name for relation in domain.relations.values() if relation.inherited]
    entities = []
    for kind in domain.kinds:
        n = config.entities_per_kind
        columns = {relation.name: spread(relation.values, n, rng) for relation in own}
        told = _told(inherited, n, config.told_share, rng)
        for i, split in enumerate(split_sizes(n, config.split_shares)):
            name = _name(rng, used)
            phrase = f"{entry['article']} {name}" if entry["article"] else name.capitalize()
            values = {relation: column[i] for relation, column in columns.items()}
            entities.append(
                Entity(name, domain.name, kind, split, rng.choice(entry["pronouns"]), phrase, values, told[i])
            )
    return entities


def _told(relations: list[str], n: int, share: float, rng: random.Random) -> list[frozenset[str]]:
    """For each of `n` entities the inherited relations that the corpus states, `share` of all pairs, at least
    one untold."""
    most = len(relations) - 1
    counts = [min(most, int(len(relations) * share + rng.random())) for _ in range(n)]
    return [frozenset(rng.sample(relations, count)) for count in counts]


def _name(rng: random.Random, used: set[str]) -> str:
    """A new invented name."""
    while True:
        name = invent(rng)
        if name not in used:
            used.add(name)
            return name


def invent(rng: random.Random) -> str:
    """A pronounceable name of two or three syllables, five letters or more."""
    while True:
        syllables = [rng.choice(ONSETS) + rng.choice(VOWELS) for _ in range(rng.choice((2, 3)))]
        name = "".join(syllables) + rng.choice(CODAS)
        if len(name) > 4:
            return name


def _links(entities: list[Entity], rng: random.Random) -> dict[str, Entity]:
    """Each person's own thing, of the person's split; animals, plants and tools equally often."""
    links = {}
    for split in SPLITS:
        people = [entity for entity in entities if entity.domain == "people" and entity.split == split]
        things = {
            domain: iter(rng.sample(found, len(found)))
            for domain in sorted({entity.domain for entity in entities} - {"people"})
            if (found := [entity for entity in entities if entity.domain == domain and entity.split == split])
        }
        for person, domain in zip(people, spread(tuple(things), len(people), rng), strict=True):
            links[person.name] = next(things[domain])
    return links
