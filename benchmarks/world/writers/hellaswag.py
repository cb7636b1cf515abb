"""What happens next: `hellaswag`, four endings. The corpus tells everyday activities (scripts) step by step.

A split has its own scripts and names; wrong endings are steps of its own scripts.

    next:order  the wrong endings are steps of the same script: the one told last and the two that come after
                the right one
    next:topic  all wrong endings are of other scripts

`axes.facts`: steps that the question tells (1 to 4; default: any).
"""

from __future__ import annotations

import random

from moabench.benchmarks.world.facts import LIMITS, Axes, World
from moabench.benchmarks.world.text import deal, lexicon, people, sentences

SHARE = 0.015


def hellaswag(world: World, split: str, axes: Axes) -> list[dict]:
    """Scripts of the split, cut after each number of steps in turn."""
    facts = axes.choose("facts", (1, 2, 3, 4))
    scripts, rng, drafts = _scripts(world)[split], random.Random(f"hellaswag-{world.seed}-{split}"), []
    for i in range(LIMITS[split]):
        domain, activity, steps = scripts[i // 2 % len(scripts)]
        skill = ("order", "topic")[i % 2]
        # two steps must come after the right one; where the axis leaves fewer, other scripts fill up
        shown = facts or rng.randint(1, len(steps) - (3 if skill == "order" else 1))
        near = [steps[shown - 1], *steps[shown + 1 : shown + 3]] if skill == "order" else []
        others = [
            step for _, name, found in scripts if name != activity for step in found if step not in steps
        ]
        question = rng.choice(lexicon("scripts")["questions"]).format(
            p=rng.choice(people(split)), a=activity, d=", ".join(steps[:shown])
        )
        row = {
            "question": question,
            "right": steps[shown],
            "wrong": [*near, *rng.sample(sorted(set(others)), 3 - len(near))],
        }
        drafts.append(row | {"skill": f"next:{skill}", "domain": domain})
    return drafts


WRITERS = {"hellaswag": hellaswag}


def paragraph(world: World, rng: random.Random) -> str:
    """A person goes through an activity, or through its end from any step on."""
    scripts = [script for dealt in _scripts(world).values() for script in dealt]
    _, activity, steps = rng.choice(scripts)
    entry, person = lexicon("scripts")["statements"], rng.choice(people())
    start = rng.choice((0, 0, rng.randrange(len(steps) - 2)))
    told = [
        rng.choice(entry["step"][1:] if i else entry["step"][:1]).format(p=person, s=step)
        for i, step in enumerate(steps[start:])
    ]
    return sentences([rng.choice(entry["opening"]).format(p=person, a=activity).rstrip("."), *told])


def _scripts(world: World) -> dict[str, list[tuple[str, str, list[str]]]]:
    """The (domain, activity, steps) of each split."""
    rng = random.Random(f"scripts-{world.seed}")
    found: dict[str, list] = {}
    for domain, scripts in lexicon("scripts")["domains"].items():
        for split, dealt in deal(
            [(domain, activity, steps) for activity, steps in scripts.items()], world, rng
        ).items():
            found.setdefault(split, []).extend(dealt)
    return found
