"""One HTML file that holds everything: what was found in words, tables, plots, every run. No network, no
other file.

The page is `html/report.html.jinja`; this module fills it. Tables are those of `tables`, words those of the
tests (`Pair.words`).
"""

from __future__ import annotations

import base64
import colorsys
import io
import json
import math
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from moabench.benchmarks import tasks
from moabench.benchmarks.command.again import command
from moabench.benchmarks.run import summary as run_summary
from moabench.benchmarks.run.reading import Study

from . import plots
from .comparing import Entry, Pair, Problem, problems
from .plots import routing
from .plots.style import short_site
from .published import published
from .rendering import Table, plain_value
from .statistics import LEVEL, POWER
from .tables import comparisons, inventory, leaderboard

FOLDER = Path(__file__).parent / "html"


def report(study: Study, results: pd.DataFrame | None = None) -> str:
    """The page for a study; `results`: published results (`published.read`) to show beside ours."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"rows": _rows, "picture": _picture}
    chapters = [Chapter(problem, results) for problem in problems(study)]
    lost = inventory(study)
    return environment.get_template("report.html.jinja").render(
        chapters=chapters,
        lost=lost if lost.rows else None,
        notes=lambda: study.notes(),  # after the tables were read: only then it is known what was missing
        runs=lambda: [page for chapter in chapters for page in chapter.runs()],
        made=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        style=(FOLDER / "report.css").read_text(encoding="utf-8"),
        script=(FOLDER / "report.js").read_text(encoding="utf-8"),
    )


@dataclass(frozen=True)
class Chapter:
    """One problem of the report; what is slow is made once."""

    problem: Problem
    results: pd.DataFrame | None

    @cached_property
    def pairs(self) -> list[Pair]:
        return self.problem.pairs()

    @cached_property
    def board(self) -> Table:
        return leaderboard(self.problem, self.pairs).shown()

    @cached_property
    def summary(self) -> list[str]:
        return summary(self.problem, self.pairs)

    @cached_property
    def protocol(self) -> list[tuple[str, str]]:
        return protocol(self.problem)

    @cached_property
    def comparisons(self) -> Table:
        return comparisons(self.problem, self.pairs).shown()

    @cached_property
    def published(self) -> Table | None:
        return None if self.results is None else published(self.problem, self.results).shown()

    @cached_property
    def plots(self) -> list[plots.Plot]:
        return plots.figures(self.problem) if self.problem.finished else []

    @cached_property
    def commands(self) -> list[tuple[str, str | None, list[str]]]:
        """(label, command, commits) of each entry."""
        return [(e.label, command(e.config, e.runs["seed"]), _commits(e)) for e in self.problem.entries]

    @cached_property
    def links(self) -> dict[str, list[tuple[str, str]]]:
        """Label -> (seed, run) of its runs."""
        return {
            e.label: list(zip(e.runs["seed"].astype(str), e.runs["run"], strict=True))
            for e in self.problem.entries
        }

    def runs(self) -> Iterator[dict[str, Any]]:
        """What the page of each run shows."""
        loads = routing.evaluated(self.problem)
        by_run = dict(list(loads.groupby("run", sort=False)))
        for entry in self.problem.entries:
            for _, row in entry.runs.iterrows():
                load = list(_load(by_run.get(row["run"])))
                config = dict(self.problem.study.configs[row["run"]])
                config.pop("runs_dir", None)  # a place, no fact
                yield {
                    "name": row["run"], "label": entry.label, "state": row["state"], "reason": row["reason"],
                    "command": command(self.problem.study.configs[row["run"]]),
                    "config": yaml.safe_dump(config, sort_keys=False, allow_unicode=True),
                    "environment": _some(row, "environment."), "metrics": _some(row, "", "/"),
                    "load": load, "experts": _experts(load),
                }  # fmt: skip


def summary(problem: Problem, pairs: list[Pair]) -> list[str]:
    """What was compared and what was shown, in sentences that say no more than the tests do."""
    entries = problem.finished
    if not entries:
        return ["No run of this problem is finished."]
    found = [_scope(problem, entries)]
    best, rest = entries[0], entries[1:]
    among = {pair.b.label: pair for pair in pairs if pair.a is best} | {
        pair.a.label: pair for pair in pairs if pair.b is best
    }
    if rest:
        found += _ranking(best, rest, among)
    unequal = [
        e.label for e in entries if any(" x the parameters" in remark for remark in problem.remarks(e))
    ]
    if unequal:
        found.append(
            f"Budgets are unequal ({', '.join(unequal)}): such a difference is one of method and size "
            "together."
        )
    recipes = [
        f"{e.label} ({', '.join(r)})" for e in entries if (r := [x for x in problem.remarks(e) if "=" in x])
    ]
    if recipes:
        found.append(f"Trained on other terms than most: {'; '.join(recipes)}.")
    cut = [f"{e.label} ({words})" for e in entries if (words := run_summary.cut(e.finished.iloc[0]))]
    if cut:
        found.append(f"Not all was read whole: {'; '.join(cut)}.")
    lost = [f"{e.label} ({'; '.join(problem.remarks(e))})" for e in problem.entries if e.finished.empty]
    return [*found, f"Without a result: {', '.join(lost)}."] if lost else found


def protocol(problem: Problem) -> list[tuple[str, str]]:
    """(what, in words) of how the runs were made: study, questions, training, learning rate, budget, seeds.
    Of what differs between entries, the usual value; leaderboard and remarks say who differs."""
    trained = [e for e in problem.finished if e.setting.get("method.tuner") != "none"]
    if not trained:
        return []
    shared = Counter(
        json.dumps(e.config | {"method": None, "seed": None}, sort_keys=True, default=str) for e in trained
    )
    config = defaultdict(dict, json.loads(shared.most_common(1)[0][0]))
    train, data = defaultdict(lambda: None, config["train"]), config["data"]
    questions = (
        "all questions" if data.get("eval_limit") is None else f"the first {data['eval_limit']} questions"
    )
    length = f"{train['steps']:,} steps" if train["steps"] else f"{train['epochs']} epochs"
    size = (
        f"{train['batch_size']} x {train['accumulation']}"
        if (train["accumulation"] or 1) > 1
        else f"{train['batch_size']}"
    )
    found = [
        (
            "study",
            ": ".join(filter(None, (config["experiment"].get("name"), config["experiment"].get("about")))),
        ),
        ("questions", f"{questions} of each task, once for each run, after training"),
        (
            "training",
            f"{length} of {size} sequences, {train['schedule']} schedule, mix {config['mix'].get('name')}, "
            "the same rows for all",
        ),
        ("learning rate", _rates(trained, train)),
        ("budget", _budget(trained, config["budget"])),
        (
            "seeds",
            "; ".join(sorted({f"{e.label}: {', '.join(e.finished['seed'].astype(str))}" for e in trained})),
        ),
    ]
    return [(what, words) for what, words in found if words]


def _rates(trained: list[Entry], train: Mapping[str, Any]) -> str:
    if not train["lr_grid"]:
        given = {e.label: (e.config.get("train") or {}).get("lr") for e in trained}
        if None in given.values():  # an older schema
            return "not recorded for " + ", ".join(label for label, lr in given.items() if lr is None)
        one = f"{train['lr']:g} at the peak for all" if len(set(given.values())) == 1 else ""
        return (one or ", ".join(f"{label} {lr:g}" for label, lr in given.items())) + "; no method was tuned"
    taken = [
        f"{e.label} {', '.join(map('{:g}'.format, e.finished['tuning/lr']))}"
        for e in trained
        if "tuning/lr" in e.finished
    ]
    grid = ", ".join(f"{lr:g}" for lr in train["lr_grid"])
    return f"of {grid}, the best on held-out training rows, for each run by itself: {'; '.join(taken)}"


def _budget(trained: list[Entry], budget: Mapping[str, Any]) -> str:
    if budget.get("size", "none") == "none":
        return "none: each method has the size of its file"
    if budget["match"] != "params":
        return f"{budget['size']}, equal {budget['match']}: the length of training was solved for"
    counts = [f"{e.label} {e.mean('params/trainable'):,.0f}" for e in trained]
    return (
        f"{budget['size']}, trainable parameters within {budget['tolerance']:.0%}, routers and gates "
        f"included: {', '.join(counts)}"
    )


def _scope(problem: Problem, entries: list[Entry]) -> str:
    """How much was measured, and between what accuracy can move: chance and the frozen base."""
    runs = sum(len(e.finished) for e in entries)
    parts = [
        f"{len(entries)} {'entries' if len(entries) > 1 else 'entry'}, {runs} finished "
        f"{'runs' if runs > 1 else 'run'}"
    ]
    parts.append(f"{len(problem.titles)} {'tasks' if len(problem.titles) > 1 else 'task'}")
    chances = [
        tasks.get(t.partition("@")[0]).chance(t.rpartition(":")[2])
        for t in problem.titles
        if t.partition("@")[0] in tasks.names()
    ]
    if chances:
        parts.append(f"chance {100 * sum(chances) / len(chances):.0f} %")
    bases = [entries[0].mean(f"base/{title}/acc") for title in problem.titles]
    if bases and not any(map(math.isnan, bases)):
        parts.append(f"frozen base {100 * sum(bases) / len(bases):.1f} %")
    return ", ".join(parts) + "."


def _ranking(best: Entry, rest: list[Entry], among: dict[str, Pair]) -> list[str]:
    first = f"Highest mean accuracy: {best.label}, {100 * best.mean('accuracy'):.1f} %."
    tested = [e.label for e in rest if e.label in among and among[e.label].found.about == "methods"]
    beaten = [label for label in tested if among[label].shown]
    tied = [label for label in tested if not among[label].shown]
    untested = [e.label for e in rest if e.label not in tested]
    words = [first]
    if beaten:
        words.append(f"Shown to be better than {', '.join(beaten)}.")
    if tied:
        finds = [100 * among[label].found.detectable for label in tied]
        spread = (
            f"{min(finds):.1f}" if max(finds) - min(finds) < 0.1 else f"{min(finds):.1f} to {max(finds):.1f}"
        )
        words.append(
            f"No difference shown to {', '.join(tied)}; these designs find {spread} points in "
            f"{100 * POWER:.0f} % of cases."
        )
    if untested:
        words.append(
            f"Nothing is shown about {', '.join(untested)} against it: one seed, or no answers in common."
        )
    family = next((pair.family for pair in among.values() if pair.family), 0)
    method = (
        f"Two-sided tests over seeds and questions at {100 * (1 - LEVEL):.0f} %, Holm over {family} "
        "comparisons."
    )
    return [" ".join(words), *([method] if tested else [])]


def _commits(entry: Entry) -> list[str]:
    column = entry.runs.get("environment.code.commit")
    return [] if column is None else sorted({str(commit)[:12] for commit in column.dropna()})


def _some(row: pd.Series, start: str, within: str = "") -> list[tuple[str, str]]:
    """(name, value) of the columns that start so and have `within` in them, as text."""
    named = {key: value for key, value in row.items() if key.startswith(start) and within in key}
    kept = {
        key: value
        for key, value in named.items()
        if not (value is None or (isinstance(value, float) and math.isnan(value)))
    }
    return [
        (key.removeprefix(start), f"{value:.6g}" if isinstance(value, float) else str(value))
        for key, value in kept.items()
    ]


def _load(rows: pd.DataFrame | None) -> Iterator[tuple[str, list[tuple[str, str, str, str]]]]:
    """(site, [(expert, share x E, background, colour)]) of a run on its evaluated questions."""
    if rows is None or rows.empty:
        return
    loads, names = routing.load_map(rows)
    for site, values in loads.iterrows():
        yield (
            short_site(site),
            [
                (names[i], f"{value:.2f}", *_shade(value))
                for i, value in values.items()
                if not math.isnan(value)
            ],
        )


def _experts(load: list) -> list[str]:
    """Names of the experts, where all sites have the same."""
    names = {tuple(name for name, *_ in cells) for _, cells in load}
    return list(names.pop()) if len(names) == 1 else []


def _shade(value: float) -> tuple[str, str]:
    """Background and text colour of a load (1: even): blue below, orange above, white at 1."""
    hue, strength = (0.58, 1 - value) if value < 1 else (0.08, min(1.0, value - 1))
    colour = colorsys.hls_to_rgb(hue, 1 - 0.45 * strength, 0.8)
    return "#" + "".join(f"{round(255 * part):02x}" for part in colour), "#000000"


def _rows(table: Table) -> Iterable[list[tuple[str, Any, str]]]:
    """(text, value to sort by, class) of each cell."""
    for i, (cells, row) in enumerate(zip(table.cells(), table.rows, strict=True)):
        marks = [
            "best" if (i, c.key) in table.best else "tied" if (i, c.key) in table.tied else ""
            for c in table.columns
        ]
        values = [plain_value(row.get(c.key)) for c in table.columns]
        blank = [value is None or (isinstance(value, float) and math.isnan(value)) for value in values]
        yield [
            (cell, "" if empty else value, mark)
            for cell, value, empty, mark in zip(cells, values, blank, marks, strict=True)
        ]


def _picture(plot: plots.Plot) -> str:
    """The figure as a data URI (SVG)."""
    file = io.BytesIO()
    plot.figure.savefig(file, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(file.getvalue()).decode()
