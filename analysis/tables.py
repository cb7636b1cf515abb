"""Leaderboard, comparisons and ablation of a problem, as `rendering.Table`s."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd

from moabench.benchmarks.run.reading import RESUMED, Study
from moabench.benchmarks.tasks import scorers

from .comparing import Entry, Pair, Problem, differences, plain
from .measures.base import HEADLINES
from .rendering import Column, Table
from .statistics import LEVEL, POWER, Interval, t_interval

HEADLINE = {name: headline.title for name, headline in HEADLINES.items() if name != "expert_cka"}
"""The five measures of a mixture that every leaderboard has, `headline/<name>` in metrics.json; definitions
in docs/measures.md. The CKA of experts is shown less that of random ones, which depends on the base."""

COST = (
    Column("parameters", "parameters", "count"),
    Column("step_seconds", "step ms", "milliseconds"),
    Column("memory", "peak MB", "megabytes"),
)


def leaderboard(problem: Problem, pairs: list[Pair] | None = None) -> Table:
    """Entries by accuracy: a column a task, their mean with its interval over seeds, cost, the five
    measures, remarks.

    Bold: the highest mean. Underlined: no difference to it is shown, by all pairs with Holm's correction, or
    none could be tested. Entries without a finished run come last, with the reason.
    """
    pairs = problem.pairs() if pairs is None else pairs
    titles = problem.titles
    shared = {title.partition("@")[2] for title in titles}
    names = {title: title.partition("@")[0] if len(shared) == 1 else title for title in titles}
    finished = problem.finished
    rows = [
        _row(problem, entry, titles)
        for entry in [*finished, *(e for e in problem.entries if e.finished.empty)]
    ]
    columns = (
        Column("method", "method"), Column("n", "n", "count"),
        *(Column(title, names[title], "share") for title in titles), Column("mean", "mean", "share"),
        Column("gain", "gain", "points"),
        *(Column(column, title, "share") for column, title in _scored(problem, names).items()),
        *(Column(scorer.name, scorer.title, "share") for scorer in scorers.over("seeds")), *COST,
        *(Column(f"headline/{name}", title, "number") for name, title in HEADLINE.items()),
        Column("remarks", "remarks"),
    )  # fmt: skip
    best, tied = _marks(finished, rows, titles, pairs)
    return Table(
        problem.name, columns, tuple(rows), tuple(_notes(problem, finished, rows, pairs)), best, tied
    )


def _scored(problem: Problem, names: dict[str, str]) -> dict[str, str]:
    """Column of the runs -> title, of the scores beside accuracy that some finished run has."""
    return {
        f"eval/{title}/{scorer.name}": f"{name} {scorer.title}"
        for title, name in names.items()
        for scorer in scorers.over("run")
        if f"eval/{title}/{scorer.name}" in problem.study.finished
    }


def comparisons(problem: Problem, pairs: list[Pair]) -> Table:
    """A pair a row: difference in points with its interval, p, Holm's p, effect size, detectable difference,
    verdict."""
    columns = (
        Column("a", "a"), Column("b", "b"), Column("difference", "a - b", "points"), Column("p", "p", "p"),
        Column("p_holm", "p (Holm)", "p"), Column("effect", "Hedges' g", "number"),
        Column("detectable", "detectable", "share"),
        Column("verdict", "verdict"),
    )  # fmt: skip
    rows = [
        {
            "a": pair.a.label,
            "b": pair.b.label,
            "difference": pair.found.difference,
            "p": pair.found.p,
            "p_holm": pair.p_holm,
            "effect": pair.found.effect,
            "detectable": pair.found.detectable,
            "verdict": pair.verdict,
        }
        for pair in pairs
    ]
    one_seed = any(pair.found.about == "models" for pair in pairs)
    notes = (
        f"Differences in points of accuracy, intervals at {100 * LEVEL:.0f} % (not adjusted).",
        f"Detectable: the difference that one comparison of this design finds in {100 * POWER:.0f} % "
        "of cases.",
        *(
            ["With one seed p is about two trained models, not about methods, and is not adjusted."]
            if one_seed
            else []
        ),
    )
    return Table(f"{problem.name}: comparisons", columns, tuple(rows), notes)


def ablation(problem: Problem, control: Entry) -> Table:
    """One factor at a time against the control: factor, its value there and here, difference with interval,
    parameters."""
    changed = {entry.label: factors(control, entry) for entry in problem.entries if entry is not control}
    single = [e for e in problem.entries if len(changed.get(e.label, ())) == 1]
    pairs = {pair.a.label: pair for pair in problem.pairs(control, single)}
    columns = (
        Column("factor", "factor"), Column("value", "value"), Column("n", "n", "count"),
        Column("mean", "mean", "share"),
        Column("difference", "difference", "points"), Column("p_holm", "p (Holm)", "p"),
        Column("detectable", "detectable", "share"),
        *COST, Column("remarks", "remarks"),
    )  # fmt: skip
    rows = [_row(problem, control, problem.titles, control) | {"factor": "(control)", "value": control.label}]
    for entry in sorted(single, key=lambda e: next(iter(changed[e.label]))):
        ((factor, value),) = changed[entry.label].items()
        pair = pairs.get(entry.label)
        tested = (
            {"difference": pair.found.difference, "p_holm": pair.p_holm, "detectable": pair.found.detectable}
            if pair
            else {}
        )
        rows.append(
            _row(problem, entry, problem.titles, control) | {"factor": factor, "value": value} | tested
        )
    many = [label for label, found in changed.items() if len(found) > 1]
    notes = [pair.words() for pair in pairs.values()]
    if many:
        notes.append(f"Left out, since more than one factor differs from {control.label}: {'; '.join(many)}.")
    if not single:
        notes.append(f"No entry differs from {control.label} in one factor.")
    return Table(f"{problem.name}: ablation of {control.label}", columns, tuple(rows), tuple(notes))


def factors(control: Entry, other: Entry) -> dict[str, str]:
    """Factor -> "there -> here". The options of a part whose `kind` changes are one factor with it; the
    method's name is none."""
    keys = [key for key in differences([control.setting, other.setting]) if key != "method.name"]
    parts = [key.removesuffix(".kind") for key in keys if key.endswith(".kind")]
    owner = {key: next((part for part in parts if key.startswith(f"{part}.")), key) for key in keys}
    found: dict[str, str] = {}
    for key, factor in owner.items():
        named = f"{key.removeprefix(factor).lstrip('.')}=" if factor != key else ""
        change = f"{named}{plain(control.setting.get(key))} -> {plain(other.setting.get(key))}"
        found[factor] = f"{found[factor]}, {change}" if factor in found else change
    return found


def _row(
    problem: Problem, entry: Entry, titles: Iterable[str], reference: Entry | None = None
) -> dict[str, Any]:
    """A row of a leaderboard; values that no finished run has are absent or NaN."""
    row: dict[str, Any] = {
        "method": entry.label,
        "n": len(entry.finished),
        "remarks": "; ".join([*problem.remarks(entry, reference), *_resumed(entry)]),
    }
    if entry.finished.empty:
        return row
    scores = entry.finished[[f"eval/{title}/acc" for title in titles]].to_numpy(float)
    row |= {title: scores[:, i].mean() for i, title in enumerate(titles)}
    if scores.size:
        row["mean"] = (
            Interval(float(scores.mean()), math.nan, math.nan)
            if entry.seedless
            else t_interval(scores.mean(1))
        )
        base = [entry.mean(f"base/{title}/acc") for title in titles]
        row["gain"] = math.nan if entry.seedless else float(scores.mean() - np.mean(base))
    steps = entry.mean("train/steps")
    row |= {
        "parameters": entry.mean("params/trainable"),
        "step_seconds": entry.mean("train/seconds") / steps if steps else math.nan,
    }
    row["memory"] = entry.mean("memory/peak_bytes")
    row |= {column: entry.mean(column) for column in _scored(problem, {title: title for title in titles})}
    row |= {scorer.name: problem.over_seeds(entry, scorer) for scorer in scorers.over("seeds")}
    return row | {f"headline/{name}": entry.mean(f"headline/{name}") for name in HEADLINE}


def _resumed(entry: Entry) -> list[str]:
    """That a run of an entry is of two versions."""
    column = entry.finished.get(RESUMED)
    found = sorted(set() if column is None else set(column.dropna()))
    return [f"resumed with other {keys}" for keys in found]


def _marks(
    entries: list[Entry], rows: list[dict], titles: list[str], pairs: list[Pair]
) -> tuple[frozenset, frozenset]:
    """Cells in bold (the highest mean, the highest of each task) and underlined (means not shown to be
    lower)."""
    if not entries or not titles:
        return frozenset(), frozenset()
    best = {(int(np.nanargmax([row[title] for row in rows[: len(entries)]])), title) for title in titles}
    beaten = {
        pair.b.label
        for pair in pairs
        if pair.a is entries[0] and pair.shown and pair.found.difference.value > 0
    }
    tied = {(i, "mean") for i, entry in enumerate(entries) if i and entry.label not in beaten}
    return frozenset({*best, (0, "mean")}), frozenset(tied)


def _notes(problem: Problem, finished: list[Entry], rows: list[dict], pairs: list[Pair]) -> list[str]:
    family = next((pair.family for pair in pairs if pair.family), 0)
    tested = (
        f"no difference to the highest mean shown (two-sided, Holm over {family} comparisons)"
        if family
        else "not tested against it"
    )
    notes = [
        f"Accuracy in %; ±: half the {100 * LEVEL:.0f} % interval over n seeds (Student's; none where seeds "
        "tie); gain: points over the frozen base. Bold: highest; "
        f"underlined: {tested}."
    ]
    unequal = [
        row["method"]
        for row, entry in zip(rows, finished, strict=False)
        if " x the parameters" in row["remarks"]
    ]
    if unequal:
        notes.append(f"Unequal budgets: {', '.join(unequal)} (remarks).")
    without = [
        e.label
        for e in finished
        if not e.seedless and all(math.isnan(e.mean(f"headline/{name}")) for name in HEADLINE)
    ]
    if without:
        notes.append(
            f"No routing and collapse measures in the runs of {', '.join(without)} (no experts, or an "
            "older schema)."
        )
    return notes


def inventory(study: Study) -> Table:
    """Every run that is no result: which, its state, why."""
    lost = study.runs[study.runs["state"] != "finished"]
    columns = (Column("run", "run"), Column("state", "state"), Column("reason", "reason"))
    return Table(
        "Runs without a result",
        columns,
        tuple(lost[["run", "state", "reason"]].replace({pd.NA: None}).to_dict("records")),
    )
