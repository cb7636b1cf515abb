"""The conflict tasks: same inputs, other answers. Every row is answered here from a table that is written out
by hand.

Run: python -m pytest tests/benchmarks/test_conflict.py
"""

from __future__ import annotations

import random
from collections import Counter
from functools import lru_cache

import pytest
import yaml

from moabench.benchmarks import tasks, world
from moabench.benchmarks.world import SPLITS, Axes, build_world, rows
from moabench.benchmarks.world.facts import LEXICON
from moabench.benchmarks.world.writers import conflict

TASKS = tasks.suites()["conflict"]
DOMAINS = {
    path.stem: yaml.safe_load(path.read_text(encoding="utf-8"))
    for path in (LEXICON / "domains").glob("*.yaml")
}
FOURTH = {"animals": "companion", "people": "hobby", "plants": "scent", "tools": "inventor"}
STRENGTHS = (0.0, 0.25, 0.5, 0.8, 1.0)

# what a sentence about a relation is completed with, under the four conventions; `own` is the domain's fourth
# relation
MOVED = {
    "colour": ("colour", "region", "season", "own"),
    "region": ("region", "season", "own", "colour"),
    "season": ("season", "own", "colour", "region"),
    "own": ("own", "colour", "region", "season"),
}
AGREED = {"colour": "colour", "region": "season", "season": "own", "own": "region"}


@lru_cache(maxsize=8)
def by_name(seed):
    return {entity.name: entity for entity in build_world(seed).entities}


def read(row, seed=0):
    """(entity, relation named by the sentence, its opening) of a row, from its text alone."""
    words = row["question"].split()
    name = words[1] if words[0] == "The" else words[0]
    entity = by_name(seed)[name.lower()]
    rest = row["question"].split(name, 1)[1].strip()
    own = DOMAINS[entity.domain]["own"]
    found = [
        (r, s)
        for r, spec in own.items()
        for s in spec["statements"]
        if s.replace("{s} ", "").split("{v}")[0].strip() == rest
    ]
    ((relation, statement),) = found
    return entity, "own" if relation == FOURTH[entity.domain] else relation, statement


def right(row):
    return row["choices"][row["label"]]


def suite(split, seed=0, strength=1.0):
    """Rows of each convention by their question."""
    found = [rows(task, split, seed, axes=Axes(conflict=strength)) for task in TASKS]
    return [{row["question"]: row for row in one} for one in found]


@pytest.mark.parametrize("strength", STRENGTHS)
def test_conventions_share_their_inputs_and_differ_in_the_cue_alone(strength):
    for split in SPLITS:
        conventions = suite(split, strength=strength)
        assert all(one.keys() == conventions[0].keys() for one in conventions), split
        for number, one in enumerate(conventions, 1):
            assert {row["context"] for row in one.values()} == {f"{number}."}
            assert {row["skill"] for row in one.values()} == {f"convention:{number}"}
        for question, row in conventions[0].items():
            others = [one[question] for one in conventions]
            assert all(
                set(other["choices"]) == set(row["choices"]) and other["domain"] == row["domain"]
                for other in others
            )
    prompts = [
        tasks.get(task).form().prompt(next(iter(one.values())))
        for task, one in zip(TASKS, conventions, strict=True)
    ]
    assert all(prompt.startswith(f"{i}. ") for i, prompt in enumerate(prompts, 1))
    question, one = next(iter(conventions[0].items()))
    same = [
        tasks.get(task).form().prompt(found[question]) for task, found in zip(TASKS, conventions, strict=True)
    ]
    assert len(set(same)) == 4 and len({prompt[1:] for prompt in same}) == 1


@pytest.mark.parametrize("seed", [0, 7])
def test_answers_follow_the_table(seed):
    for split in SPLITS:
        for number, one in enumerate(suite(split, seed)):
            for row in one.values():
                entity, relation, _ = read(row, seed)
                meant = MOVED[relation][number]
                assert right(row) == entity.own[FOURTH[entity.domain] if meant == "own" else meant]
                assert (
                    sorted(row["choices"]) == sorted(entity.own.values()) and row["domain"] == entity.domain
                )


def test_strength_is_the_share_of_sentences_on_which_conventions_disagree():
    before = set()
    for strength in STRENGTHS:
        conventions = suite("train", strength=strength)
        disputed = {
            question for question in conventions[0] if len({right(one[question]) for one in conventions}) > 1
        }
        assert len(disputed) / len(conventions[0]) == pytest.approx(strength, abs=0.03)
        assert before <= disputed, "a stronger conflict keeps the disputes of a weaker one"
        before = disputed
        for question, row in conventions[0].items():
            answers = [right(one[question]) for one in conventions]
            if question in disputed:
                assert sorted(answers) == sorted(row["choices"]), "each choice is right under one convention"
            else:
                entity, relation, _ = read(row)
                meant = AGREED[relation]
                assert set(answers) == {entity.own[FOURTH[entity.domain] if meant == "own" else meant]}
        for split in ("validation", "test"):  # the same sentences are disputed everywhere
            for question, row in suite(split, strength=strength)[0].items():
                _, _, opening = read(row)
                also = {
                    read(conventions[0][q])[2]
                    for q in disputed
                    if conventions[0][q]["domain"] == row["domain"]
                }
                answers = {right(one[question]) for one in suite(split, strength=strength)}
                assert (len(answers) > 1) == (opening in also)
                break


def test_at_full_strength_no_two_conventions_agree_and_at_none_all_do():
    full, none = suite("test"), suite("test", strength=0.0)
    for question in full[0]:
        assert len({right(one[question]) for one in full}) == 4
        assert len({right(one[question]) for one in none}) == 1


@pytest.mark.parametrize("seed", range(20))
def test_splits_share_no_entity_and_no_question(seed):
    owner = {}
    for split in SPLITS:
        questions = [row["question"] for row in rows(TASKS[1], split, seed)]
        assert len(set(questions)) == len(questions)
        for row in rows(TASKS[1], split, seed):
            name = read(row, seed)[0].name
            assert owner.setdefault(name, split) == split


def test_sizes_labels_and_balance():
    for task in TASKS:
        for split, size in {"train": 2400, "validation": 300, "test": 800}.items():
            found = rows(task, split)
            assert len(found) >= min(size, 256) and (split == "validation" or len(found) == size)
            labels = Counter(row["label"] for row in found)
            assert set(labels) == {0, 1, 2, 3} and max(labels.values()) - min(labels.values()) <= 1
            relations = Counter(read(row)[1] for row in found)
            assert min(relations.values()) > 0.2 * len(found) and len({row["domain"] for row in found}) == 4


@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_facts_and_plain_reading_without_the_convention_are_worth_chance(strength):
    """Who knows every fact and reads every sentence in plain language, or guesses among the facts, is right
    in a quarter of the rows."""
    found = [row for one in suite("test", strength=strength) for row in one.values()]
    plain = []
    for row in found:
        entity, relation, _ = read(row)
        plain.append(entity.own[FOURTH[entity.domain] if relation == "own" else relation] == right(row))
    guess = random.Random(0)
    for hits in (plain, [guess.choice(row["choices"]) == right(row) for row in found]):
        assert sum(hits) / len(found) == pytest.approx(0.25, abs=0.03)


def test_no_other_way_than_the_cue():
    """The best guess from the sentence alone, learnt from the training rows of all conventions, is worth
    chance."""
    counts = Counter()
    for one in suite("train"):
        counts.update((read(row)[2], row["domain"], kind(row)) for row in one.values())
    hits = total = 0
    for one in suite("test"):
        for row in one.values():
            seen = {k: counts[read(row)[2], row["domain"], k] for k in ("colour", "region", "season", "own")}
            hits += kind(row) == max(seen, key=seen.get)
            total += 1
    assert hits / total == pytest.approx(0.25, abs=0.04)


def kind(row):
    """Relation of the right answer."""
    entity = read(row)[0]
    (relation,) = (name for name, value in entity.own.items() if value == right(row))
    return "own" if relation == FOURTH[entity.domain] else relation


def test_the_corpus_never_numbers_a_sentence():
    for _, paragraph in zip(range(5000), world.corpus(), strict=False):
        assert not any(paragraph.startswith(f"{k}. ") for k in range(1, 5))


def test_a_domain_without_the_shared_relations_is_refused():
    with pytest.raises(ValueError, match="conflicts need colour"):
        conflict.relations("stars", ("colour", "region", "name", "size"))
