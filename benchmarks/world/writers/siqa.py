"""People and feelings: `siqa`, three choices. An event happens to a person; asked are the feeling, the next
wish or the reason.

The splits have their own events and their own names. Choices come from events of the same split, so that no
answer is known to be wrong from training alone; feelings have the same number of events in every split.
"""

from __future__ import annotations

import random

from moabench.benchmarks.world.facts import LIMITS, Axes, World
from moabench.benchmarks.world.text import capital, deal, lexicon, people, sentences

SHARE = 0.015
ASPECTS = ("feeling", "wish", "reason")


def siqa(world: World, split: str, axes: Axes) -> list[dict]:
    """Events of the split with each aspect in turn."""
    events = _events(world)[split]
    rng = random.Random(f"siqa-{world.seed}-{split}")
    drafts = []
    for i in range(LIMITS[split]):
        aspect, event = ASPECTS[i % 3], events[i // 3 % len(events)]
        if i // 3 % len(events) == 0 and i % 3 == 0:
            rng.shuffle(events)
        person = rng.choice(people(split))
        wrong = sorted({other[aspect] for other in events if other["feeling"] != event["feeling"]})
        row = {
            "context": capital(rng.choice(event["events"]).format(p=person)) + ".",
            "question": rng.choice(lexicon("events")["aspects"][aspect]["questions"]).format(p=person),
            "right": event[aspect],
            "wrong": wrong,
            "options": 3,
        }
        drafts.append(row | {"skill": f"social:{aspect}", "domain": event["domain"]})
    return drafts


WRITERS = {"siqa": siqa}


def paragraph(world: World, rng: random.Random) -> str:
    """An event and, in random order, two or three of its aspects."""
    events = [event for group in _events(world).values() for event in group]
    event, person = rng.choice(events), rng.choice(people())
    aspects = lexicon("events")["aspects"]
    clauses = [
        rng.choice(aspects[name]["statements"]).format(p=person, v=event[name])
        for name in rng.sample(ASPECTS, rng.randint(2, 3))
    ]
    return sentences([rng.choice(event["events"]).format(p=person), *clauses])


def _events(world: World) -> dict[str, list[dict]]:
    """The events of each split, with their feeling."""
    rng = random.Random(f"events-{world.seed}")
    found: dict[str, list[dict]] = {}
    for feeling, events in lexicon("events")["feelings"].items():
        for split, dealt in deal([event | {"feeling": feeling} for event in events], world, rng).items():
            found.setdefault(split, []).extend(dealt)
    return found
