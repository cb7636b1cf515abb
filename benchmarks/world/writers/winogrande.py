"""Twin sentences: `winogrande`. Two people or things, a blank, and one word that decides whom it means.

    cause:people, cause:things    "Anna lifted Ben because _ was strong."  /  "... because _ was light."
    result:people, result:things  "Anna gave Ben a coat, so _ was cold."   /  "... so _ was warm."

The corpus states what an action tells of both sides. Twins have the same choices in the same order, one label
each; a split has its own actions, names and things.
"""

from __future__ import annotations

import random

from moabench.benchmarks.world.facts import LIMITS, Axes, World
from moabench.benchmarks.world.text import capital, deal, lexicon, people, sentences

SHARE = 0.04


def winogrande(world: World, split: str, axes: Axes) -> list[dict]:
    """Twins one after the other, the sorts of actions in turn."""
    rng = random.Random(f"winogrande-{world.seed}-{split}")
    groups, drafts = _schemas(world), []
    for i in range(LIMITS[split] // 2):
        (who, why), dealt = list(groups.items())[i % len(groups)]
        event, *traits = dealt[split][i // len(groups) % len(dealt[split])]
        pair = rng.sample(_names(who, split), 2)
        choices = rng.sample(pair, 2)
        sentence = lexicon("twins")["questions"][why]
        for name, trait in rng.sample(list(zip(pair, traits, strict=True)), 2):
            question = capital(sentence.format(e=event.format(a=pair[0], b=pair[1]), t=trait))
            row = {"question": question, "choices": choices, "label": choices.index(name)}
            drafts.append(row | {"skill": f"{why}:{who}", "domain": who})
    return drafts


WRITERS = {"winogrande": winogrande}


def paragraph(world: World, rng: random.Random) -> str:
    """An action and what it tells of both, or of one of them."""
    groups = _schemas(world)
    who, why = rng.choice(list(groups))
    event, *traits = rng.choice([schema for dealt in groups[who, why].values() for schema in dealt])
    pair = rng.sample(_names(who, None), 2)
    entry = lexicon("twins")["statements"]
    told = rng.sample(list(zip(pair, traits, strict=True)), 2)
    (x, t), clause = told[0], event.format(a=pair[0], b=pair[1])
    first = rng.choice(entry["pair"] + entry["reverse"]).format(e=clause, x=x, t=t)
    return sentences([first, f"{told[1][0]} was {told[1][1]}"])


def _names(who: str, split: str | None) -> list[str]:
    if who == "people":
        return people(split)
    things = lexicon("twins")["things"]
    return [thing for part in things if split in (None, part) for thing in things[part]]


def _schemas(world: World) -> dict[tuple[str, str], dict[str, list]]:
    """(people or things, cause or result) -> the [event, trait of a, trait of b] of each split."""
    rng = random.Random(f"twins-{world.seed}")
    schemas = lexicon("twins")["schemas"]
    return {
        (who, why): deal(found, world, rng) for who, kinds in schemas.items() for why, found in kinds.items()
    }
