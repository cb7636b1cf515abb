"""Lists, for the corpus only: with labels ("A. seeds B. moss C. worms. The krelo eats B. B is moss."), or
words said twice.

The labelled ones teach the base model that a label stands for its item, without which no prompt that shows
options (protocols `label` and `generate`) could be answered; the repeated ones to look back and copy at all.
No list is asked about.
"""

from __future__ import annotations

import random

from moabench.benchmarks.world.facts import World

SHARE = 0.1
STYLES = ("{l}. {v}", "({l}) {v}", "{l}: {v}")
WORDS = ("answer", "solution", "ending", "option")


def paragraph(world: World, rng: random.Random) -> str:
    """A labelled list or a repeated one."""
    return _labelled(world, rng) if rng.random() < 0.5 else _twice(world, rng)


def _twice(world: World, rng: random.Random) -> str:
    """Six to ten words of the world, values and names, in no order, and the same words again."""
    domain = rng.choice(list(world.domains.values()))
    values = [value for relation in domain.relations.values() for value in relation.values]
    words = [
        *rng.sample(values, rng.randint(4, 7)),
        *(entity.name for entity in rng.sample(world.entities, rng.randint(2, 3))),
    ]
    rng.shuffle(words)
    line = " ".join(words)
    return f"{line}. {line}."


def _labelled(world: World, rng: random.Random) -> str:
    """Two to five values of one relation under labels, and then what an entity's fact is called, or what a
    label stands for."""
    entity = rng.choice(world.entities)
    name = rng.choice([*entity.own, *sorted(entity.told)])
    relation, right = world.domains[entity.domain].relations[name], world.value(entity, name)
    values = [right, *rng.sample([value for value in relation.values if value != right], rng.randint(1, 4))]
    rng.shuffle(values)
    labels, style, mark = _labels(rng)
    items = dict(zip(values, labels, strict=False))
    listed = rng.choice((" ", "\n")).join(style.format(l=label, v=value) for value, label in items.items())
    told = [rng.choice(relation.statements).format(s=entity.phrase, v=mark.format(l=items[right]))]
    for value, label in rng.sample(list(items.items()), len(items)):
        label = mark.format(l=label)
        told.append(rng.choice((f"{label} is {value}", f"{value} is {label}")))
    rng.shuffle(told)
    return f"{listed}\n" + " ".join(
        f"{clause[0].upper() if clause.startswith('the ') else clause[0]}{clause[1:]}." for clause in told
    )


def _labels(rng: random.Random) -> tuple[str, str, str]:
    """Labels, how an item is written in the list, and how a label is written in a sentence."""
    if rng.random() < 0.5:
        return "ABCDE", rng.choice(STYLES), "{l}"
    word = rng.choice(WORDS)
    return "12345", f"{rng.choice((word, word.capitalize()))}{{l}}: {{v}}", f"{word}{{l}}"
