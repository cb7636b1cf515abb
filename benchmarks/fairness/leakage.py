"""Training rows that are also evaluation rows: found, listed, and taken out before training.

    report = check(train_rows, eval_rows)
    rows = apply(report, train_rows, "drop")      # or "refuse", "mark"
    files.write_json(path / "metrics/leakage.json", report.record("drop"))

Every training row is compared with every evaluation row of the run, on normalised text: Unicode NFKC, lower
case, no punctuation, no spacing, 70.0 and 4.80 as 70 and 4.8, number words up to twenty as digits. Four kinds
of match:

    exact      choice tasks: context, question and set of choices agree; free-answer math: the question agrees
    question   choice tasks: context and question agree, the choices do not
    near       the texts differ by a few words that change nothing asked for (`_near`)
    numbers    free-answer math: the question agrees but for its numbers

The first three are taken out. `numbers` is listed only: word problems are written from templates (MAWPS,
MultiArith and the built-in world are), the numbers make the question and its answer, and a template seen in
training is what a train split is for.

Instruction rows have no fields to compare, so the evaluation row is looked for inside the text. Its question
as a whole paragraph or line, or as what follows a colon in one, is `exact` with its choices in the text and
`question` without; near are texts that hold nearly all of its shingles, every number and every content word.

Compared with the overlap tables of docs/tasks.md in tests/benchmarks/test_leakage.py.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from typing import Any

from moabench.benchmarks import tasks
from moabench.benchmarks.tasks.rows import is_instruction
from moabench.methods.spec import ConfigError, nearest

MODES = ("drop", "refuse", "mark")
KINDS = ("exact", "question", "near", "numbers")
REMOVED = ("exact", "question", "near")
"""Kinds that leave the training set."""

NGRAM = 3
"""Words of a shingle."""
SIMILARITY = 0.6
"""Least share of shingles that near duplicates have in common (Jaccard)."""
CONTAINED = 0.8
"""Least share of an evaluation row's shingles that an instruction holds to be near it."""
ASKED = 5
"""Least words of a part of an instruction that count as an evaluation row's question where its choices are
absent: shorter parts are often one of the options."""
LISTED = 20
"""Matches of kind `numbers` that are listed for a pair of tasks; all are counted."""


@dataclass(frozen=True)
class Match:
    """A training row that repeats an evaluation row."""

    train: int
    """Index of the training row."""
    train_id: str
    train_task: str
    eval_id: str
    eval_task: str
    kind: str
    similarity: float
    """0..1: 1 for exact, else the share of shingles in common."""
    train_text: str
    """The beginning of the question."""
    eval_text: str


@dataclass(frozen=True)
class Report:
    """What `check` found."""

    matches: tuple[Match, ...]
    train_rows: int
    eval_rows: int
    near: bool = True
    """Whether near duplicates were looked for."""

    @cached_property
    def leaked(self) -> frozenset[int]:
        """Indices of the training rows that have to go."""
        return frozenset(match.train for match in self.matches if match.kind in REMOVED)

    def counts(self) -> list[dict[str, Any]]:
        """For each pair of tasks: training rows of each kind (a row counts once, under its strongest) and
        evaluation rows that leak."""
        kinds: dict[tuple[str, str], dict[int, str]] = defaultdict(dict)
        hit: dict[tuple[str, str], set[str]] = defaultdict(set)
        for m in self.matches:
            pair = m.train_task, m.eval_task
            kinds[pair][m.train] = min(kinds[pair].get(m.train, m.kind), m.kind, key=KINDS.index)
            hit[pair] |= {m.eval_id} if m.kind in REMOVED else set()
        return [
            {"train_task": pair[0], "eval_task": pair[1]}
            | {kind: sum(k == kind for k in rows.values()) for kind in KINDS}
            | {"eval_rows": len(hit[pair])}
            for pair, rows in sorted(kinds.items())
        ]

    def record(self, mode: str) -> dict[str, Any]:
        """Plain data for metrics/leakage.json."""
        listed, seen = [], Counter()
        for m in self.matches:
            seen[m.train_task, m.eval_task, m.kind] += 1
            if m.kind in REMOVED or seen[m.train_task, m.eval_task, m.kind] <= LISTED:
                listed.append({key: value for key, value in asdict(m).items() if key != "train"})
        return {
            "mode": mode,
            "train_rows": self.train_rows,
            "eval_rows": self.eval_rows,
            "leaked": len(self.leaked),
            "removed": len(self.leaked) if mode == "drop" else 0,
            "near": {"words": NGRAM, "jaccard": SIMILARITY, "contained": CONTAINED} if self.near else None,
            "pairs": self.counts(),
            "matches": listed,
        }


def check(
    train: Sequence[Mapping[str, Any]], evaluation: Sequence[Mapping[str, Any]], near: bool = True
) -> Report:
    """Compare every training row with every evaluation row. A row object that occurs several times is
    compared once.

    near=False leaves near duplicates out: for sources made of templates, where two facts may differ in little
    (the built-in world).
    """
    known = _Evaluation(evaluation, near)
    places: dict[int, list[int]] = defaultdict(list)
    for index, row in enumerate(train):
        places[id(row)].append(index)
    matches = []
    for indices in places.values():
        row = train[indices[0]]
        for number, kind, similarity in known.matches(row):
            other = evaluation[number]
            ids = str(row["id"]), _task(row), str(other["id"]), _task(other)
            matches += [
                Match(index, *ids, kind, round(similarity, 3), _short(row), _short(other))
                for index in indices
            ]
    matches.sort(key=lambda m: (KINDS.index(m.kind), m.train))
    return Report(tuple(matches), len(train), len(evaluation), near)


def apply(report: Report, rows: Sequence[Any], mode: str) -> list[Any]:
    """The rows to train on. drop: without those that leak; mark: all; refuse: ConfigError if any leaks."""
    if mode not in MODES:
        raise ConfigError(f"leakage={mode!r}: expected one of {', '.join(MODES)}.{nearest(mode, MODES)}")
    if len(rows) != report.train_rows:
        raise ValueError(f"the report is about {report.train_rows} rows, got {len(rows)}")
    if mode == "mark" or not report.leaked:
        return list(rows)
    if mode == "refuse":
        raise ConfigError(
            f"leakage=refuse: {_told(report)} Expected none; leakage=drop takes them out, "
            "leakage=mark keeps them."
        )
    kept = [row for index, row in enumerate(rows) if index not in report.leaked]
    if not kept:
        raise ConfigError(f"leakage=drop: nothing is left to train on. {_told(report)}")
    return kept


def _told(report: Report) -> str:
    """Counts and the first examples, in words."""
    pairs = []
    for pair in report.counts():
        found = [f"{pair[kind]} {kind}" for kind in REMOVED if pair[kind]]
        pairs += [f"{pair['train_task']} in {pair['eval_task']}: {', '.join(found)}"] if found else []
    first = [
        f"{m.train_id} = {m.eval_id} ({m.kind}: {m.train_text[:60]!r})"
        for m in report.matches
        if m.kind in REMOVED
    ][:3]
    return (
        f"{len(report.leaked)} of {report.train_rows} training rows are evaluation rows "
        f"({'; '.join(pairs)}). First: {'; '.join(first)}."
    )


# ---- text

_WORD = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?|[^\W\d_]+")
_SMALL = """
    zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen
    sixteen seventeen eighteen nineteen twenty
"""
_DIGITS = {word: str(number) for number, word in enumerate(_SMALL.split())}


def words(text: str) -> list[str]:
    """Normalised words: "She didn’t pay $1,200.50" -> she didn t pay 1200.5."""
    found = []
    for word in _WORD.findall(unicodedata.normalize("NFKC", text).lower()):
        if word[0].isdigit():
            word = word.replace(",", "")
            word = word.rstrip("0").rstrip(".") if "." in word else word
        found.append(_DIGITS.get(word, word))
    return found


def _key(text: list[str], masked: bool = False) -> str:
    """Words without spacing, so that "did n't" equals "didn't"; `masked`: every number as #."""
    return "".join("#" if masked and word[0].isdigit() else word for word in text)


def _shingles(pieces: Iterable[list[str]], shortest: int = NGRAM) -> set[tuple[str, ...]]:
    """Runs of NGRAM words within a piece; a shorter piece is one shingle. `shortest` below NGRAM adds all
    shorter runs."""
    found = set()
    for piece in pieces:
        if len(piece) < NGRAM:
            found.add(tuple(piece))
        for size in range(shortest, NGRAM + 1):
            found.update(zip(*(piece[start:] for start in range(size)), strict=False))
    found.discard(())
    return found


_EMPTY_TEXT = """
    a an the of to in on at for by with from and or as than then so if but is are was were be been being
    am do does did has have had
    will would can could shall should may might must this that these those it its there here their his
    her s t d ll re ve n
"""
_EMPTY = frozenset(_EMPTY_TEXT.split())
"""Words whose change changes no question."""
_NEGATIONS = frozenset({"not", "no", "never", "none", "without", "except", "neither", "nor", "cannot"})


def _same_meaning(one: set[str], other: set[str]) -> bool:
    """True unless a content word was exchanged, or a number or negation added: "a season 4 of Rake" is not "a
    season 4 of Fargo".

    Forms of one word (same first four letters, lengths at most three apart) are not an exchange.
    """
    left, right = one - other, other - one
    if any(word[0].isdigit() or word in _NEGATIONS for word in left | right):
        return False
    left, right = left - _EMPTY, right - _EMPTY
    return not (_unlike(left, other) and _unlike(right, one))


def _unlike(odd: set[str], others: set[str]) -> bool:
    """Whether a word of `odd` has no other form among `others`."""
    stems = defaultdict(list)
    for word in others:
        stems[word[:4]].append(len(word))
    return any(
        len(word) < 4 or all(abs(len(word) - length) > 3 for length in stems.get(word[:4], ()))
        for word in odd
    )


def _near(one: _Row, other: _Row) -> bool:
    """Whether two similar texts ask the same.

    Free-answer math: they state the same numbers, at least two; names and wording are then paraphrase. Else
    no content word may be exchanged (`_same_meaning`), which keeps the many short questions of one pattern
    apart.
    """
    if one.free and other.free and len(other.numbers) > 1:
        return one.numbers == other.numbers
    return _same_meaning(one.vocabulary, other.vocabulary)


# ---- rows


class _Row:
    """A row in the forms in which rows are compared."""

    def __init__(self, row: Mapping[str, Any], free: bool) -> None:
        """free: its answer is not among choices."""
        self.free = free
        self._context, self._question = words(row.get("context") or ""), words(row["question"])
        raw = () if self.free else row["choices"]
        self._choices = [words(choice) for choice in raw]
        self.key = _key(self._context + self._question)
        # A choice such as "+" has no words: its text stands for it.
        self.choices = frozenset(
            _key(choice) or text for choice, text in zip(self._choices, raw, strict=True)
        )

    @cached_property
    def masked(self) -> str:
        return _key(self._context + self._question, masked=True)

    @cached_property
    def shingles(self) -> set[tuple[str, ...]]:
        return _shingles([self._context, self._question, *self._choices])

    @cached_property
    def vocabulary(self) -> set[str]:
        return {word for piece in (self._context, self._question, *self._choices) for word in piece}

    @cached_property
    def numbers(self) -> Counter[str]:
        return Counter(word for word in self._context + self._question if word[0].isdigit())


class _Evaluation:
    """The evaluation rows by question, by question without its numbers, and by rare shingles."""

    def __init__(self, rows: Sequence[Mapping[str, Any]], near: bool) -> None:
        self.near = near
        self.tasks = [_task(row) for row in rows]
        self.rows = [_Row(row, _is_free(row["task"])) for row in rows]
        self.questions: dict[str, list[int]] = defaultdict(list)
        self.masked: dict[str, list[int]] = defaultdict(list)
        for number, row in enumerate(self.rows):
            self.questions[row.key].append(number)
            if row.free:
                self.masked[row.masked].append(number)

    @cached_property
    def rare(self) -> dict[tuple[str, ...], list[int]]:
        """Rare shingles of each row, enough of them that no near duplicate is missed.

        Two sets whose intersection is 60 % of their union share 60 % of each, so of any 40 % of a row's
        shingles, and one more, its near duplicate has one. The rarest make the shortest lists (prefix
        filtering).
        """
        frequency = Counter(shingle for row in self.rows for shingle in row.shingles)
        found: dict[tuple[str, ...], list[int]] = defaultdict(list)
        for number, row in enumerate(self.rows):
            ordered = sorted(row.shingles, key=lambda shingle: (frequency[shingle], shingle))
            for shingle in ordered[: len(ordered) - math.ceil(SIMILARITY * len(ordered)) + 1]:
                found[shingle].append(number)
        return found

    def matches(self, row: Mapping[str, Any]) -> Iterator[tuple[int, str, float]]:
        """(number of the evaluation row, kind, similarity) of everything that `row` repeats."""
        if is_instruction(row):
            return self._instruction(row)
        return self._fields(_Row(row, _is_free(row["task"])))

    def _fields(self, row: _Row) -> Iterator[tuple[int, str, float]]:
        done = set(self.questions.get(row.key, ()))
        for number in sorted(done):
            other = self.rows[number]
            exact = other.free or row.choices == other.choices
            yield number, *(("exact", 1.0) if exact else ("question", _jaccard(row, other)))
        for number in sorted(self._candidates(row.shingles) - done) if self.near else ():
            other = self.rows[number]
            similarity = _jaccard(row, other)
            if similarity >= SIMILARITY and _near(row, other):
                done.add(number)
                yield number, "near", similarity
        if row.free:
            yield from self._numbers(row, done)

    def _numbers(self, row: _Row, done: set[int]) -> Iterator[tuple[int, str, float]]:
        """The first row of each task whose question differs in its numbers only, unless the task has a
        stronger match."""
        met = {self.tasks[number] for number in done}
        for number in self.masked.get(row.masked, ()):
            if self.tasks[number] not in met:
                met.add(self.tasks[number])
                yield number, "numbers", _jaccard(row, self.rows[number])

    def _instruction(self, row: Mapping[str, Any]) -> Iterator[tuple[int, str, float]]:
        text = f"{row['instruction']}\n\n{row.get('input') or ''}"
        found = words(text)
        whole, shingles = _key(found), _shingles([found], shortest=1)
        done = set()
        for part in map(words, _parts(text)):
            for number in set(self.questions.get(_key(part), ())) - done:
                other = self.rows[number]
                if all(choice in whole for choice in other.choices):
                    done.add(number)
                    yield number, "exact", 1.0
                elif len(part) >= ASKED:
                    done.add(number)
                    yield number, "question", _contained(other, shingles)
        if self.near:
            vocabulary, numbers = {*found}, Counter(word for word in found if word[0].isdigit())
            for number in sorted(self._candidates(shingles) - done):
                other = self.rows[number]
                similarity = _contained(other, shingles)
                if (
                    similarity >= CONTAINED
                    and other.numbers <= numbers
                    and other.vocabulary - _EMPTY <= vocabulary
                ):
                    done.add(number)
                    yield number, "near", similarity
        yield from self._numbers(_Row({"question": row["instruction"]}, free=True), done)

    def _candidates(self, shingles: set[tuple[str, ...]]) -> set[int]:
        return {number for shingle in shingles for number in self.rare.get(shingle, ())}


@lru_cache
def _is_free(task: str) -> bool:
    """Whether the answers of a task (or local set) are compared with no choices."""
    return tasks.get(tasks.SETS.get(task, task)).kind != "choices"


def _contained(row: _Row, shingles: set[tuple[str, ...]]) -> float:
    """Share of the row's shingles that are among `shingles`."""
    return len(row.shingles & shingles) / (len(row.shingles) or 1)


def _jaccard(one: _Row, other: _Row) -> float:
    common = len(one.shingles & other.shingles)
    return common / (len(one.shingles) + len(other.shingles) - common or 1)


def _parts(text: str) -> Iterator[str]:
    """Each paragraph and line, and what follows each colon in one: "Please answer, question: is it so?" holds
    "is it so?"."""
    for part in dict.fromkeys([*re.split(r"\n\s*\n", text), *text.splitlines()]):
        pieces = part.split(":")
        for start in range(len(pieces)):
            yield ":".join(pieces[start:])


def _task(row: Mapping[str, Any]) -> str:
    return row["task"] or row.get("mix") or "instructions"


def _short(row: Mapping[str, Any]) -> str:
    text = " ".join(f"{row.get('context') or ''} {row.get('question') or row.get('instruction')}".split())
    return text if len(text) <= 160 else text[:159] + "…"
