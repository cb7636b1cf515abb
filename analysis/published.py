"""Published results beside ours: rows of a CSV file joined to entries by method, base model, task and
protocol.

The file has the columns method, paper, arxiv, base_model, train_data, protocol, dataset, metric, value
(accuracy in %) and may have trainable_params. Papers spell names their own way, so names are compared without
case, hyphens and spaces, and data sets by `ALIASES`; a method that a paper calls otherwise is given by hand
(`names`). What differs in the setting stands in the row.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from moabench.benchmarks import tasks
from moabench.methods.spec import ConfigError, nearest

from .comparing import Entry, Problem
from .rendering import Column, Table
from .statistics import Interval, t_interval

NEEDED = ("method", "arxiv", "base_model", "train_data", "protocol", "dataset", "metric", "value")

ALIASES = {"arce": "arc_easy", "arcc": "arc_challenge", "obqa": "openbookqa", "csqa": "commonsenseqa"}
"""Data sets as papers abbreviate them."""

WORDS = (
    ("label", "label"),
    ("letter", "label"),
    ("loglikelihood", "loglikelihood"),
    ("log-likelihood", "loglikelihood"),
    ("generat", "generate"),
)
"""What a published protocol's description must contain to be one of ours, first match."""

JOIN = ("base model", "protocol")
"""What must agree beside method and task, unless it is relaxed."""


def read(path: str | Path) -> pd.DataFrame:
    """The published accuracies. Raises ConfigError for a file that is not there or lacks a column."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise ConfigError(
            f"results={str(path)!r}: no such file; expected a CSV file with the columns {', '.join(NEEDED)}."
        )
    try:
        found = pd.read_csv(path, dtype=str, keep_default_na=False)
    except (pd.errors.EmptyDataError, pd.errors.ParserError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(
            f"results={str(path)!r}: cannot be read ({' '.join(str(error).split())}); expected a CSV file "
            f"with the columns {', '.join(NEEDED)}."
        ) from error
    for column in NEEDED:
        if column not in found:
            raise ConfigError(
                f"results={str(path)!r}: it has no column {column!r}.{nearest(column, found.columns)}"
            )
    found = found[found["metric"] == "accuracy"]
    values = pd.to_numeric(found["value"], errors="coerce") / 100
    return found.assign(value=values)[values.between(0, 1)]


def published(
    problem: Problem,
    results: pd.DataFrame,
    names: Mapping[str, str] | None = None,
    across: tuple[str, ...] = (),
) -> Table:
    """A published number a row, ours beside it. `names`: published method -> ours; `across`: what of `JOIN`
    need not agree."""
    for name in across:
        if name not in JOIN:
            raise ConfigError(f"across={name!r}: expected any of {', '.join(JOIN)}.{nearest(name, JOIN)}")
    by_method = {_compact(theirs): ours for theirs, ours in (names or {}).items()}
    rows = [
        row
        for entry in problem.finished
        for title in problem.titles
        for row in _rows(entry, title, results, by_method)
        if not (set(row["apart"]) & (set(JOIN) - set(across)))
    ]
    columns = (
        Column("method", "method"), Column("task", "task"), Column("theirs", "published", "share"),
        Column("ours", "ours", "share"),
        Column("n", "n", "count"), Column("difference", "ours - published", "points"),
        Column("arxiv", "arXiv"),
        Column("apart", "differs in"),
    )  # fmt: skip
    shown = [
        row | {"apart": "; ".join(f"{key}: {value}" for key, value in row["apart"].items())} for row in rows
    ]
    return Table(
        f"{problem.name}: published and ours",
        columns,
        tuple(shown),
        tuple(_notes(problem, results, by_method, shown, across)),
    )


def _rows(
    entry: Entry, title: str, results: pd.DataFrame, names: Mapping[str, str]
) -> Iterator[dict[str, Any]]:
    task, protocol = title.partition("@")[0], title.rpartition(":")[2]
    ours = t_interval(entry.finished[f"eval/{title}/acc"])
    for row in results[[_task(name) == task for name in results["dataset"]]].to_dict("records"):
        if not same_method(row["method"], entry.method, names):
            continue
        difference = Interval(*(end - row["value"] for end in ours))
        yield {
            "method": entry.label, "task": task, "theirs": row["value"], "ours": ours,
            "n": len(entry.finished), "difference": difference,
            "arxiv": row["arxiv"], "apart": _apart(entry, title, protocol, row),
        }  # fmt: skip


def _apart(entry: Entry, title: str, protocol: str, row: Mapping[str, str]) -> dict[str, str]:
    """What the two settings differ in, in words."""
    config, found = entry.config, {}
    if _compact(row["base_model"]) != _compact(config["model"]["name"]):
        found["base model"] = f"{row['base_model']} / {config['model']['name']}"
    if _protocol(row["protocol"]) != protocol:
        found["protocol"] = f"{row['protocol'] or 'not stated'} / {protocol}"
    source = title.partition("@")[2].partition(":")[0]
    if source == "builtin":
        found["questions"] = "public data set / built-in world"
    if _compact(row["train_data"]) != _compact(config.get("mix", {}).get("name")):
        found["training data"] = f"{row['train_data'] or 'not stated'} / {config.get('mix', {}).get('name')}"
    theirs, ours = pd.to_numeric(row.get("trainable_params"), errors="coerce"), entry.mean("params/trainable")
    if not pd.isna(theirs) and abs(ours / theirs - 1) > 0.02:
        found["trainable parameters"] = f"{theirs:,.0f} / {ours:,.0f}"
    return found


def same_method(theirs: str, ours: str, names: Mapping[str, str]) -> bool:
    """Whether a published name is our method: given by hand, or the same words in any order (`Soft MoA`,
    `moa_soft`)."""
    given = names.get(_compact(theirs))
    return (
        given == ours
        if given is not None
        else _words(theirs) == _words(ours) or _compact(theirs) == _compact(ours)
    )


def _notes(
    problem: Problem,
    results: pd.DataFrame,
    names: Mapping[str, str],
    rows: list[dict],
    across: tuple[str, ...],
) -> list[str]:
    unnamed = [
        e.label
        for e in problem.finished
        if not any(same_method(name, e.method, names) for name in results["method"].unique())
    ]
    found = [
        "Accuracy in %; ± and brackets: 95 % interval over our n seeds; published values come "
        "without one. Differs in: theirs / ours."
    ]
    if unnamed:
        found.append(
            f"No published method has the name of {', '.join(unnamed)}; theirs can be given by hand."
        )
    if not rows:
        must = ", ".join(("method", "task", *(name for name in JOIN if name not in across)))
        found.append(
            f"No published accuracy has the same {must} as an entry here ({len(results):,} were looked at)."
        )
    return found


def _compact(name: Any) -> str:
    return re.sub(r"[^a-z0-9]+", "", str(name).lower())


def _words(name: str) -> tuple[str, ...]:
    return tuple(sorted(re.findall(r"[a-z0-9]+", name.lower())))


def _task(name: str) -> str:
    known = {_compact(task): task for task in tasks.names()} | ALIASES
    return known.get(_compact(name), "")


def _protocol(text: str) -> str:
    return next((protocol for word, protocol in WORDS if word in text.lower()), "")
