"""Arithmetic: the eight math tasks, and stories and sums for the corpus.

A problem is a chain of one to three steps: the first works on two numbers, each later one on the result so
far and a new number. A split owns pairs of numbers, and all steps of its questions use its pairs: no step of
a test question, with whatever operation, is a step of a training question of any math task. Names are split
too. The corpus uses all numbers and all names, and asks nothing.
"""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import dataclass
from functools import lru_cache

import yaml

from moabench.benchmarks.world.facts import LEXICON, SPLITS, Axes, World, WorldConfig, split_sizes

SHARE = 0.2
SIGNS = {"add": "+", "sub": "-", "mul": "*", "div": "/"}
SIZES = {"train": 2400, "validation": 300, "test": 800}
"""Rows that are written for a split."""
LARGEST_FACTOR = 10
LETTERS = "abcd"
ADDSUB = ("join", "combine", "take", "compare", "change")

Plan = tuple[tuple[str, bool], ...]
"""One (sign, turned) a step; a turned step takes the result so far from the new number, or divides the new
number by it."""


@dataclass(frozen=True)
class Problem:
    """A chain of steps and its wordings: parts of a text, each with alternatives."""

    skill: str
    plan: Plan
    asked: tuple[tuple[str, ...], ...]
    told: tuple[tuple[str, ...], ...]
    lines: tuple[str, ...]
    domain: str = ""
    """Empty: the theme of the objects."""
    category: str = ""


def paragraph(world: World, rng: random.Random) -> str:
    """SiteCounts, chains of sums, or a story with its result, for the corpus."""
    words, config = lexicon(), world.config
    draw = rng.random()
    if draw < 0.40:
        return " ".join(_sum(config, rng, in_words=draw < 0.08) for _ in range(3))
    names = [name for split in SPLITS for name in words["names"][split]]
    if draw < 0.60:
        entry = words["skills"][rng.choice(sorted(words["skills"]))]
        a, b, r = _anything((SIGNS[entry["operation"]], False), config, rng)
        return rng.choice(entry["statements"]).format(**_people(names, rng), **_objects(rng), a=a, b=b, r=r)
    pools = _corpus_problems()
    problem = rng.choice(rng.choice(pools[1:4] if draw < 0.65 else pools))
    numbers = rng.choice(number_tuples(problem.plan, None, world.seed, config))
    sums = work_out(problem.plan, numbers)[1]
    if draw < 0.65:
        return " ".join(f"{one}." for one in sums)
    fill = _people(names, rng) | _objects(rng) | dict(zip(LETTERS, numbers, strict=False))
    told = [rng.choice(part) for part in problem.told]
    if rng.random() < 0.2:
        told.insert(
            1,
            rng.choice(words["distractors"]["extras"]["told"]).replace(
                "{n}", str(rng.randint(2, config.max_number))
            ),
        )
    return " ".join([*(one.format(**fill) for one in told), *_lines(problem, fill, sums)])


def _one_step(world: World, split: str, axes: Axes, task: str, skills: tuple[str, ...]) -> list[dict]:
    """One step; every operation equally often, then every skill."""
    pools = defaultdict(list)
    for skill in skills:
        pools[lexicon()["skills"][skill]["operation"]].append(one_step_problem(skill))
    return _drafts(task, world, split, list(pools.values()))


def addsub(world: World, split: str, axes: Axes) -> list[dict]:
    """One step, + or -."""
    return _one_step(world, split, axes, "addsub", ADDSUB)


def singleeq(world: World, split: str, axes: Axes) -> list[dict]:
    """One step, any operation."""
    return _one_step(world, split, axes, "singleeq", tuple(lexicon()["skills"]))


def multiarith(world: World, split: str, axes: Axes) -> list[dict]:
    """Two steps (`hops`)."""
    return _drafts("multiarith", world, split, [story_problems(axes.choose("hops", (1, 2, 3), 2))])


def mawps(world: World, split: str, axes: Axes) -> list[dict]:
    """One or two steps (`hops`: exactly so many)."""
    hops = axes.choose("hops", (1, 2, 3))
    return _drafts("mawps", world, split, [story_problems(n) for n in ([hops] if hops else (1, 2))])


def gsm8k(world: World, split: str, axes: Axes) -> list[dict]:
    """Two or three steps (`hops`: exactly so many)."""
    hops = axes.choose("hops", (1, 2, 3))
    return _drafts("gsm8k", world, split, [story_problems(n) for n in ([hops] if hops else (2, 3))])


def aqua(world: World, split: str, axes: Axes) -> list[dict]:
    """Two steps (`hops`) on one quantity, five options, the letter as the answer."""
    return _lettered(
        _drafts("aqua", world, split, [puzzle_problems(axes.choose("hops", (1, 2, 3), 2))], options=5)
    )


def mathqa(world: World, split: str, axes: Axes) -> list[dict]:
    """One or two steps, problems of four categories, five options, the letter as the answer."""
    pools = defaultdict(list)
    for problem in listed_problems():
        pools[problem.category].append(problem)
    return _lettered(_drafts("mathqa", world, split, list(pools.values()), options=5))


def svamp(world: World, split: str, axes: Axes) -> list[dict]:
    """One step; one sentence (`facts`: so many) has a number that is not needed. Several questions are asked
    about one story."""
    distractors, entry = axes.choose("facts", (1, 2, 3), 1), lexicon()["distractors"]
    rng, rows = random.Random(f"svamp-{world.seed}-{split}"), {}
    for _ in range(20 * SIZES[split]):
        story = rng.choice(entry["stories"])
        main = rng.choice(story["questions"])
        numbers = _story_numbers(story, main, world, split, rng)
        if not numbers:
            continue
        fill = _people(lexicon()["names"][split], rng) | _objects(rng)
        sentences = list(story["sentences"])
        for extra in rng.sample(entry["extras"]["asked"], distractors - (len(sentences) == 3)):
            sentences.insert(
                rng.randint(1, len(sentences)),
                extra.replace("{n}", str(rng.randint(2, world.config.max_number))),
            )
        body = " ".join(sentences).format(**fill, **numbers)
        for question in story["questions"]:
            left, sign, right = question["sum"].split()
            pair = numbers[left], numbers[right]
            if pair not in number_tuples(((sign, False),), split, world.seed, world.config):
                continue
            line = question.get("line", lexicon()["skills"][question["skill"]]["line"])
            problem = Problem(question["skill"], ((sign, False),), (), (), (line,))
            text = f"{body} {question['ask'].format(**fill)}"
            rows[text] = _draft(
                problem, pair, text, fill, rng, spare=[n for n in numbers.values() if n not in pair]
            )
        if len(rows) >= SIZES[split]:
            break
    return list(rows.values())[: SIZES[split]]


WRITERS = {task.__name__: task for task in (addsub, aqua, gsm8k, mathqa, mawps, multiarith, singleeq, svamp)}


# Numbers


def calculate(sign: str, x: int, y: int) -> int | None:
    """The result; None where it is negative or not whole."""
    if sign == "/":
        return x // y if y and x % y == 0 else None
    result = {"+": x + y, "-": x - y, "*": x * y}[sign]
    return result if result >= 0 else None


def legal(sign: str, x: int, y: int, config: WorldConfig) -> int | None:
    """The result of a step that may occur in the world; None for another. Operands of + and - are
    2..`max_number` and differ, factors, divisors and quotients are 2..10. No result is below 2, so that no
    text speaks of "1 apples"."""
    result = calculate(sign, x, y)
    if sign in "+-":
        fits = min(x, y) >= 2 and max(x, y) <= config.max_number and x != y
    else:
        fits = 2 <= y <= LARGEST_FACTOR and 2 <= (x if sign == "*" else result or 0) <= LARGEST_FACTOR
    return result if fits and result is not None and result >= 2 else None


@lru_cache(maxsize=8)
def owners(seed: int, config: WorldConfig) -> dict[tuple[int, int], str]:
    """The split that owns each pair (low, high) of numbers, in shares that are alike for all operations and
    for small products."""
    strata = defaultdict(list)
    top = max(config.max_number, LARGEST_FACTOR**2)
    for low in range(2, config.max_number + 1):
        for high in range(low, top + 1):
            results = [legal(sign, high, low, config) for sign in SIGNS.values()]
            if any(results):
                small = bool(results[2]) and results[2] <= config.max_number
                strata[small, *map(bool, results)].append((low, high))
    rng, owner = random.Random(f"pairs-{seed}"), {}
    for _, pairs in sorted(strata.items()):
        rng.shuffle(pairs)
        owner |= zip(pairs, split_sizes(len(pairs), config.split_shares), strict=True)
    return owner


@lru_cache(maxsize=64)
def _steps(
    step: tuple[str, bool], split: str | None, seed: int, config: WorldConfig
) -> dict[int, list[tuple[int, int]]]:
    """What one step of `split` (None: of any) makes of a number: `number -> [(other number, result)]`."""
    sign, turned = step
    found = defaultdict(list)
    for (low, high), owner in owners(seed, config).items():
        if split in (None, owner):
            for x, y in {(low, high), (high, low)}:
                result = legal(sign, *((y, x) if turned else (x, y)), config)
                if result:
                    found[x].append((y, result))
    return {x: sorted(found[x]) for x in sorted(found)}


@lru_cache(maxsize=512)
def number_tuples(
    plan: Plan, split: str | None, seed: int, config: WorldConfig
) -> tuple[tuple[int, ...], ...]:
    """All numbers that a chain may use in `split` (None: in any); a chain that leads back to its start is
    left out."""
    found = [
        ((a, b), result) for a, others in _steps(plan[0], split, seed, config).items() for b, result in others
    ]
    for step in plan[1:]:
        steps = _steps(step, split, seed, config)
        found = [((*numbers, n), result) for numbers, so_far in found for n, result in steps.get(so_far, ())]
    return tuple(numbers for numbers, result in found if len(plan) == 1 or result != numbers[0])


def work_out(plan: Plan, numbers: tuple[int, ...]) -> tuple[list[int], list[str], str]:
    """Results of the steps, the sums ("5 + 3 = 8"), and the equation ("(5+3)-2=6")."""
    so_far, text = numbers[0], str(numbers[0])
    results, sums = [], []
    for i, ((sign, turned), n) in enumerate(zip(plan, numbers[1:], strict=True)):
        x, y = (n, so_far) if turned else (so_far, n)
        inner = f"({text})" if i else text
        text = f"{n}{sign}{inner}" if turned else f"{inner}{sign}{n}"
        so_far = calculate(sign, x, y)
        results.append(so_far)
        sums.append(f"{x} {sign} {y} = {so_far}")
    return results, sums, f"{text}={so_far}"


def slips(plan: Plan, numbers: tuple[int, ...]) -> set[int]:
    """Results of likely mistakes: a wrong operation, a step left out, a number of the question."""
    plans = [(plan[:i], numbers[: i + 1]) for i in range(1, len(plan))]
    plans += [(plan[:i] + plan[i + 1 :], numbers[: i + 1] + numbers[i + 2 :]) for i in range(len(plan))]
    plans += [
        ((*plan[:i], (sign, plan[i][1]), *plan[i + 1 :]), numbers)
        for i in range(len(plan))
        for sign in SIGNS.values()
    ]
    if len(numbers) > 2:
        plans.append((plan[1:], numbers[1:]))
    found = set()
    for steps, values in plans:
        so_far = values[0]
        for (sign, turned), n in zip(steps, values[1:], strict=True):
            so_far = None if so_far is None else calculate(sign, *((n, so_far) if turned else (so_far, n)))
        found.add(so_far)
    return {n for n in found if n is not None and 0 < n <= LARGEST_FACTOR**2}


def rival(plan: Plan, numbers: tuple[int, ...]) -> int | None:
    """The result of a single step with the operation mistaken for the one that it is easiest mistaken for;
    always among the options, so that to work out sums without reading the question is not enough. Longer
    chains have mistakes enough."""
    if len(plan) > 1:
        return None
    sign, turned = plan[0]
    return work_out(
        (({"+": "-", "-": "+", "*": "+", "/": "-"}[sign], turned),), tuple(sorted(numbers, reverse=True))
    )[0][0]


def wrong_numbers(
    right: int, likely: set[int], first: int | None, count: int, rng: random.Random
) -> list[int]:
    """`count` different wrong numbers: `first` where it can be, likely mistakes, and near misses of them and
    of the right one. How many lie below the right one is drawn evenly, as far as there is room, so that size
    tells little."""
    if first is None or first == right or not 0 < first <= LARGEST_FACTOR**2:
        first = right
    below = min(rng.randint(int(first < right), count - int(first > right)), right - 1)
    chosen: list[int] = []
    for need, side in (
        (below, range(1, right)),
        (count - below, range(right + 1, right + LARGEST_FACTOR**2)),
    ):
        picked = [first] if first in side else []
        mistakes = sorted(n for n in likely if n in side and n != first)
        picked += rng.sample(mistakes, min(len(mistakes), rng.randint(0, need - len(picked))))
        while len(picked) < need:
            anchor = rng.choice([right, *chosen, *picked])
            picked.append(
                rng.choice(sorted((n for n in side if n not in picked), key=lambda n: abs(n - anchor))[:3])
            )
        chosen += picked
    return chosen


# Problems


@lru_cache(maxsize=1)
def lexicon() -> dict:
    """The entries of `lexicon/stories.yaml`."""
    return yaml.safe_load((LEXICON / "stories.yaml").read_text(encoding="utf-8"))


@lru_cache(maxsize=32)
def one_step_problem(skill: str) -> Problem:
    """A single question of a skill."""
    entry = lexicon()["skills"][skill]
    told = (tuple(entry["first"]["told"]),) if "first" in entry else ()
    return Problem(
        skill, ((SIGNS[entry["operation"]], False),), (tuple(entry["questions"]),), told, (entry["line"],)
    )


@lru_cache(maxsize=4)
def story_problems(steps: int) -> list[Problem]:
    """All stories of so many steps."""
    if steps == 1:
        return [one_step_problem(skill) for skill in lexicon()["skills"]]
    return [_story(chain) for chain in lexicon()["chains"][steps]]


def _story(chain: str) -> Problem:
    first, *later = (lexicon()["skills"][skill] for skill in chain.split(">"))
    plan = [
        (SIGNS[first["operation"]], False),
        *((SIGNS[entry["operation"]], entry.get("turned", False)) for entry in later),
    ]
    parts = {
        manner: [
            tuple(first["first"][manner]),
            *(_with_letter(entry["later"][manner], 2 + i) for i, entry in enumerate(later)),
        ]
        for manner in ("asked", "told")
    }
    asked = (*parts["asked"], tuple(later[-1]["ask"]))
    return Problem(
        chain, tuple(plan), asked, tuple(parts["told"]), tuple(entry["line"] for entry in (first, *later))
    )


@lru_cache(maxsize=4)
def puzzle_problems(steps: int) -> list[Problem]:
    """All chains of so many calculations in all settings."""
    words, problems = lexicon(), []
    for domain, setting in words["puzzles"].items():
        for chain in words["moves"][steps]:
            moves = chain.split(">")
            plan = tuple((SIGNS[words["skills"][move]["operation"]], False) for move in moves)
            asked, told = (
                (
                    (setting[manner]["start"],),
                    *(_with_letter([setting[manner][move]], 1 + i) for i, move in enumerate(moves)),
                )
                for manner in ("asked", "told")
            )
            problems.append(
                Problem(chain, plan, (*asked, (setting["ask"],)), told, (setting["line"],) * steps, domain)
            )
    return problems


@lru_cache(maxsize=1)
def listed_problems() -> list[Problem]:
    """The problems that the lexicon lists one by one."""
    problems = []
    for entry in lexicon()["problems"]:
        plan = tuple((step.split()[1], step.split()[2] == "r") for step in entry["steps"])
        wordings = ((tuple(entry["asked"]),), (tuple(entry["told"]),), tuple(entry["lines"]))
        problems.append(Problem(entry["skill"], plan, *wordings, entry.get("domain", ""), entry["category"]))
    return problems


@lru_cache(maxsize=1)
def _corpus_problems() -> list[list[Problem]]:
    """The problems that the corpus tells and works out, in groups that are drawn equally often."""
    one = [problem for problem in story_problems(1) if problem.told]
    return [one, story_problems(2), story_problems(3), puzzle_problems(2), listed_problems()]


def _with_letter(texts: list[str], i: int) -> tuple[str, ...]:
    return tuple(text.replace("{n}", f"{{{LETTERS[i]}}}") for text in texts)


# Rows and texts


def _drafts(task: str, world: World, split: str, pools: list[list[Problem]], options: int = 4) -> list[dict]:
    """Different questions of a split, up to its size: pools in turn, a problem of the pool and its numbers at
    random."""
    rng, rows = random.Random(f"{task}-{world.seed}-{split}"), {}
    owned = (world.seed, world.config)
    pools = [[problem for problem in pool if number_tuples(problem.plan, split, *owned)] for pool in pools]
    pools = [pool for pool in pools if pool]
    for i in range(20 * SIZES[split]):
        problem = rng.choice(pools[i % len(pools)])
        numbers = rng.choice(number_tuples(problem.plan, split, *owned))
        fill = _people(lexicon()["names"][split], rng) | _objects(rng)
        text = " ".join(rng.choice(part) for part in problem.asked).format(
            **fill, **dict(zip(LETTERS, numbers, strict=False))
        )
        if text not in rows:
            rows[text] = _draft(problem, numbers, text, fill, rng, options)
        if len(rows) == SIZES[split]:
            break
    return list(rows.values())


def _draft(
    problem: Problem, numbers: tuple, text: str, fill: dict, rng: random.Random, options: int = 4, spare=()
) -> dict:
    """One row with its right and wrong numbers; `spare`: numbers of the question that are not needed."""
    results, sums, equation = work_out(problem.plan, numbers)
    likely = slips(problem.plan, numbers)
    for number in spare:
        likely |= slips(problem.plan, (numbers[0], number)) | slips(problem.plan, (number, numbers[1]))
    wrong = wrong_numbers(results[-1], likely, rival(problem.plan, numbers), options - 1, rng)
    draft = {
        "question": text[0].upper() + text[1:],
        "right": str(results[-1]),
        "wrong": [str(n) for n in wrong],
    }
    draft |= {"skill": problem.skill, "domain": problem.domain or fill["theme"], "answer": str(results[-1])}
    if problem.category:
        draft["category"] = problem.category
    return draft | {"solution": "\n".join(_lines(problem, fill, sums)), "equation": equation}


def _lettered(drafts: list[dict]) -> list[dict]:
    """Drafts with their options in fixed order and the answer as a letter; each letter is right equally often
    (up to one)."""
    rng, labels = random.Random(f"letters-{len(drafts)}"), []
    for draft in drafts:
        right, wrong = draft.pop("right"), draft.pop("wrong")
        labels = labels or rng.sample(range(len(wrong) + 1), len(wrong) + 1)
        label = labels.pop()
        draft |= {
            "choices": [*wrong[:label], right, *wrong[label:]],
            "label": label,
            "answer": "ABCDE"[label],
        }
    return drafts


def _lines(problem: Problem, fill: dict, sums: list[str]) -> list[str]:
    return [line.format(**fill, s=one) for line, one in zip(problem.lines, sums, strict=True)]


def _people(names: list[str], rng: random.Random) -> dict[str, str]:
    return dict(zip("pq", rng.sample(names, 2), strict=True))


def _objects(rng: random.Random) -> dict[str, str]:
    """The objects and other objects of one theme."""
    themes = lexicon()["themes"]
    theme = rng.choice(sorted(themes))
    return dict(zip("ou", rng.sample(themes[theme], 2), strict=True)) | {"theme": theme}


def _story_numbers(
    story: dict, main: dict, world: World, split: str, rng: random.Random
) -> dict[str, int] | None:
    """A pair of the split for the question `main`, and another number in its place; None where the story
    would not hold."""
    left, sign, right = main["sum"].split()
    numbers = dict(
        zip(
            (left, right),
            rng.choice(number_tuples(((sign, False),), split, world.seed, world.config)),
            strict=True,
        )
    )
    for letter in LETTERS[: len(story["sentences"])]:
        if letter not in numbers:
            numbers[letter] = rng.choice(
                [n for n in range(2, world.config.max_number + 1) if n not in numbers.values()]
            )
    for left, sign, right in map(str.split, story.get("holds", ())):
        if not legal(sign, numbers[left], numbers[right], world.config):
            return None
    return numbers


def _anything(step: tuple[str, bool], config: WorldConfig, rng: random.Random) -> tuple[int, int, int]:
    """Two numbers of any split and their result."""
    a, b = rng.choice(number_tuples((step,), None, 0, config))
    return a, b, calculate(step[0], a, b)


def _sum(config: WorldConfig, rng: random.Random, in_words: bool) -> str:
    operation = rng.choice(sorted(SIGNS))
    a, b, r = _anything((SIGNS[operation], False), config, rng)
    if in_words:
        text = rng.choice(lexicon()["sums"][operation]).format(a=a, b=b, r=r)
        return text[0].upper() + text[1:]
    return f"{a} {SIGNS[operation]} {b} = {r}."
