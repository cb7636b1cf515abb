"""Which runs may be compared, and what the comparison says.

A *problem* is what was to be solved: base model, tasks, test questions, protocol. An *entry* is one way to
solve it: runs that differ in nothing but the seed. Entries of a problem stand in one table; where they differ
in more than the method (training recipe, data, trainable parameters, machine, code), `remarks` says so, since
a comparison at unequal terms is none.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from moabench.benchmarks.config.hashing import NOT_IN_HASH
from moabench.benchmarks.run.reading import Study, flat
from moabench.benchmarks.tasks.scorers import Scorer
from moabench.methods.spec import ConfigError, nearest

from .statistics import LEVEL, POWER, Comparison, compare, holm

PROBLEM = ("model", "task", "data", "protocol")
"""Sections of the config that say what is to be solved, but for how much there is to train on
(`data.train_limit`)."""

NOT_COMPARED = {
    "seed",
    "method.about",
    "method.paper",
    "device",
    "forgetting",
    "probe",
    *(k for k, v in NOT_IN_HASH.items() if v is None),
}
"""Keys and sections that make no other entry."""

BUDGET_TOLERANCE = 0.1
"""Trainable parameters further than this share from those of the reference are an unequal budget."""

Setting = dict[str, Any]


@dataclass(frozen=True)
class Entry:
    """Runs that differ in nothing but the seed. `setting`: config keys that it may differ from others in,
    without those of the problem."""

    label: str
    method: str
    setting: Setting
    runs: pd.DataFrame
    """All of them, by seed."""
    config: dict[str, Any]

    @property
    def finished(self) -> pd.DataFrame:
        return self.runs[self.runs["state"] == "finished"]

    @property
    def seedless(self) -> bool:
        """Nothing of it depends on the seed: the frozen base."""
        return (
            self.setting.get("method.tuner") == "none"
            and self.config.get("model", {}).get("kind") != "random"
        )

    def mean(self, column: str) -> float:
        """Mean of a column over finished runs, NaN where none has it."""
        values = (
            pd.to_numeric(self.finished[column], errors="coerce")
            if column in self.finished
            else pd.Series(dtype=float)
        )
        return float(values.mean())


@dataclass(frozen=True)
class Pair:
    """Two entries compared. p_holm: adjusted over the comparisons of methods that were made together."""

    a: Entry
    b: Entry
    found: Comparison
    p_holm: float
    family: int

    @property
    def shown(self) -> bool:
        """Whether a difference between the methods is shown."""
        return self.found.about == "methods" and self.p_holm < 1 - LEVEL

    @property
    def verdict(self) -> str:
        """The result in three or four words."""
        if self.found.about == "models":
            return (
                "models differ (one seed)"
                if self.found.p < 1 - LEVEL
                else "models: no difference shown (one seed)"
            )
        return (
            f"{(self.a if self.found.difference.value > 0 else self.b).label} is better"
            if self.shown
            else "no difference shown"
        )

    def words(self) -> str:
        """The result as a sentence that says no more than the test does."""
        value, low, high = (100 * x for x in self.found.difference)
        a, b = (self.a.label, self.b.label) if value >= 0 else (self.b.label, self.a.label)
        ends = (low, high) if value >= 0 else (-high, -low)
        interval = f"{abs(value):.1f} points, {100 * LEVEL:.0f} % interval {ends[0]:.1f} to {ends[1]:.1f}"
        design = (
            f"n = {self.found.seeds[0]} and {self.found.seeds[1]} seeds, {self.found.questions:,} questions"
        )
        if self.found.about == "models":
            verb = "differ" if self.found.p < 1 - LEVEL else "show no difference"
            tested = f"{interval}; p = {number(self.found.p)} over {self.found.questions:,} questions"
            return (
                f"One seed: the two trained models {a} and {b} {verb} ({tested}); nothing is shown "
                "about the methods."
            )
        among = f", Holm over {self.family}" if self.family > 1 else ""
        if self.shown:
            return f"{a} is better than {b} by {interval} (p = {number(self.p_holm)}{among}; {design})."
        missed = f"this design finds {100 * self.found.detectable:.1f} points in {100 * POWER:.0f} % of cases"
        return (
            f"No difference shown between {a} and {b} at {design} ({interval}; p = "
            f"{number(self.p_holm)}{among}; {missed})."
        )


@dataclass(frozen=True)
class Problem:
    """Entries that solve the same problem. `name`: what tells it from the other problems at hand."""

    name: str
    entries: tuple[Entry, ...]
    study: Study

    def entry(self, name: str, key: str = "control") -> Entry:
        """The entry of that label, or the only one of that method. Raises ConfigError with the nearest
        name."""
        found = [e for e in self.entries if e.label == name] or [e for e in self.entries if e.method == name]
        if len(found) == 1:
            return found[0]
        labels = [e.label for e in self.entries]
        why = (
            f"{len(found)} entries are of this method ({'; '.join(e.label for e in found)})"
            if found
            else "no such entry"
        )
        raise ConfigError(f"{key}={name!r}: {why}.{nearest(name, labels)}")

    @property
    def finished(self) -> list[Entry]:
        """Entries with results, the most accurate first."""
        return sorted(
            (e for e in self.entries if not e.finished.empty),
            key=lambda e: -np.nan_to_num(e.mean("accuracy"), nan=-1),
        )

    @property
    def titles(self) -> list[str]:
        """The tasks that every finished run reports, as `arc_easy@builtin:loglikelihood`."""
        columns = [c for c in self.study.finished if c.startswith("eval/") and c.endswith("/acc")]
        rows = (
            pd.concat([e.finished for e in self.finished]) if self.finished else self.study.finished.iloc[:0]
        )
        return [c.split("/")[1] for c in columns if len(rows) and rows[c].notna().all()]

    @cached_property
    def _answers(self) -> pd.DataFrame:
        """Right (1) or wrong (0), a run a row, a question a column (task, passage or question, number)."""
        runs = {run for entry in self.finished for run in entry.finished["run"]}
        samples = self.study.samples
        if samples.empty:
            return pd.DataFrame()
        samples = samples.loc[
            samples["run"].isin(runs),
            [c for c in ("run", "task", "doc_id", "context", "correct") if c in samples],
        ]
        passage = (
            samples["context"] if "context" in samples else pd.Series(None, index=samples.index, dtype=object)
        )
        named = samples["doc_id"].astype(str)
        samples = samples.assign(passage=passage.where(passage.notna(), named), doc_id=named)
        samples["number"] = samples.groupby(["run", "task", "doc_id"]).cumcount()
        keys = ["task", "passage", "doc_id", "number"]
        return (
            samples.assign(correct=samples["correct"].astype(float))
            .set_index(["run", *keys])["correct"]
            .unstack(keys)
        )

    def answers(self, entry: Entry) -> pd.DataFrame:
        """[seeds, questions] of an entry; runs without samples.parquet are left out."""
        found = self._answers
        return found.loc[[run for run in entry.finished["run"] if run in found.index]]

    @cached_property
    def _given(self) -> pd.DataFrame:
        """What was answered (the choice, or the text extracted), a run a row, a question a column."""
        samples = self.study.samples
        if samples.empty or not {"prediction", "extracted"} & set(samples):
            return pd.DataFrame()
        given = samples.reindex(columns=["prediction", "extracted"])
        samples = samples.assign(
            given=given["prediction"].astype(object).where(given["prediction"].notna(), given["extracted"]),
            number=samples.groupby(["run", "task", "doc_id"]).cumcount(),
        )
        keys = ["task", "doc_id", "number"]
        return samples.set_index(["run", *keys])["given"].unstack(keys)

    def over_seeds(self, entry: Entry, scorer: Scorer) -> float:
        """A score of what the runs of an entry, which differ in their seed, answered; NaN without two of
        them."""
        found = self._given
        runs = [run for run in entry.finished["run"] if run in found.index]
        if entry.seedless or len(runs) < 2:
            return math.nan
        asked = found.loc[runs].dropna(axis=1, how="all")
        rows = [[None if pd.isna(answer) else answer for answer in asked.loc[run]] for run in runs]
        return scorer.score(rows)

    def compare(self, a: Entry, b: Entry) -> Comparison | None:
        """`a` minus `b` on the questions that all their runs answered; None if there are none."""
        left, right = self.answers(a), self.answers(b)
        if left.empty or right.empty:
            return None
        asked = left.notna().all().to_numpy() & right.notna().all().to_numpy()
        if not asked.any():
            return None
        columns = left.columns[asked]
        task, passage = (columns.get_level_values(level).to_numpy() for level in ("task", "passage"))
        return compare(left.loc[:, asked], right.loc[:, asked], task, passage, fixed=(a.seedless, b.seedless))

    def pairs(self, control: Entry | None = None, others: Iterable[Entry] | None = None) -> list[Pair]:
        """All pairs of finished entries, or each of `others` minus the control, with p adjusted by Holm over
        all of them."""
        entries = self.finished if others is None else [e for e in others if not e.finished.empty]
        wanted = (
            itertools.combinations(entries, 2)
            if control is None
            else ((e, control) for e in entries if e is not control)
        )
        found = [(a, b, result) for a, b in wanted if (result := self.compare(a, b)) is not None]
        tested = [result.p if result.about == "methods" else math.nan for *_, result in found]
        family = sum(not math.isnan(p) for p in tested)
        return [
            Pair(a, b, result, float(p), family)
            for (a, b, result), p in zip(found, holm(tested), strict=True)
        ]

    def reference(self) -> Entry | None:
        """The entry whose terms others are held against: plain LoRA if it is there, else the best that
        trains."""
        trained = [e for e in self.finished if e.setting.get("method.tuner") != "none"]
        return next((e for e in trained if e.method == "lora"), trained[0] if trained else None)

    def remarks(self, entry: Entry, reference: Entry | None = None) -> list[str]:
        """Why the row cannot be compared as it stands: failures, fewer seeds, unequal parameters, recipe,
        machine or code."""
        return [
            *_states(entry, max(len(e.finished) for e in self.entries)),
            *self._unequal(entry, reference or self.reference()),
        ]

    def _unequal(self, entry: Entry, reference: Entry | None) -> list[str]:
        usual, found = self._usual, []
        if reference is None or entry.finished.empty or entry.setting.get("method.tuner") == "none":
            return []
        ratio = entry.mean("params/trainable") / (reference.mean("params/trainable") or math.nan)
        if abs(ratio - 1) > BUDGET_TOLERANCE:
            found.append(f"{ratio:.2g} x the parameters of {reference.label}")
        terms = {key for key in (*entry.setting, *usual) if not key.startswith("method")}
        found += [
            f"{key}={plain(entry.setting.get(key))}"
            for key in sorted(terms)
            if entry.setting.get(key) != usual.get(key)
        ]
        for column, what in CONDITIONS.items():
            if column in entry.finished and not set(entry.finished[column].dropna()) <= set(
                reference.finished[column].dropna()
            ):
                found.append(f"other {what} than {reference.label}")
        dirty = entry.finished.get("environment.code.dirty")
        return (
            [*found, "code with uncommitted changes"] if dirty is not None and dirty.eq(True).any() else found
        )

    @cached_property
    def _usual(self) -> Setting:
        """The terms (recipe, data, budget) that most entries which train have, key by key."""
        trained = [e for e in self.finished if e.setting.get("method.tuner") != "none"]
        keys = {key for e in trained for key in e.setting if not key.startswith("method")}
        return {key: Counter(e.setting.get(key) for e in trained).most_common(1)[0][0] for key in keys}


CONDITIONS = {
    "environment.device_name": "machine",
    "environment.threads": "number of threads",
    "environment.code.commit": "commit",
    "environment.inputs.training": "training rows",
    "train/batch_size": "number of sequences in a pass",
}
"""Columns of the runs that should be equal for a comparison of accuracy, time and memory."""


def problems(study: Study) -> list[Problem]:
    """Every problem in the study, the one with most runs first."""
    found: dict[tuple, list[int]] = {}
    settings = [_settings(study.configs[run]) for run in study.runs["run"]]
    prints = study.runs[
        [c for c in study.runs if c.startswith(("environment.inputs.evaluation", "environment.inputs.model"))]
    ].to_numpy()
    for i, (problem, _) in enumerate(settings):
        found.setdefault((tuple(sorted(problem.items())),), []).append(i)
    found = {
        (*key, fingerprint): rows
        for key, all_rows in found.items()
        for fingerprint, rows in _by_print(all_rows, prints)
    }
    names = _names([dict(key) for key, _ in found])
    made = [
        Problem(name, tuple(_entries(study, [(i, settings[i][1]) for i in rows])), study)
        for name, rows in zip(names, found.values(), strict=True)
    ]
    return sorted(made, key=lambda problem: -sum(len(e.runs) for e in problem.entries))


def number(p: float) -> str:
    """A p value in words of two digits."""
    return "< 0.001" if p < 0.001 else f"{p:.2g}" if p < 0.1 else f"{p:.2f}"


def plain(value: Any) -> str:
    """A config value as on the command line."""
    return (
        "null"
        if value is None
        else f"[{','.join(map(plain, value))}]"
        if isinstance(value, tuple)
        else f"{value}"
    )


def differences(settings: Sequence[Setting]) -> list[str]:
    """Keys in which settings differ, in order."""
    keys = dict.fromkeys(key for setting in settings for key in setting)
    return [key for key in keys if len({setting.get(key) for setting in settings}) > 1]


def _settings(config: Mapping[str, Any]) -> tuple[Setting, Setting]:
    """What is to be solved, and how, as (problem, entry): keys whose value is null are left out, so that they
    equal absent ones."""
    kept = {
        k: v
        for k, v in flat(config).items()
        if v is not None and k not in NOT_COMPARED and k.partition(".")[0] not in NOT_COMPARED
    }
    for section, keys in NOT_IN_HASH.items():
        kept = {
            k: v
            for k, v in kept.items()
            if not (keys and k.partition(".")[0] == section and k.partition(".")[2] in keys)
        }
    of_problem = {k for k in kept if k.partition(".")[0] in PROBLEM and k != "data.train_limit"}
    return {k: v for k, v in kept.items() if k in of_problem}, {
        k: v for k, v in kept.items() if k not in of_problem
    }


def _by_print(rows: list[int], prints: np.ndarray) -> list[tuple[str, list[int]]]:
    """Rows with the same test questions and weights; runs that failed before these were known go with the
    first."""
    found: dict[str, list[int]] = {}
    unknown = [i for i in rows if pd.isna(prints[i]).all()]
    for i in (i for i in rows if i not in unknown):
        found.setdefault("|".join(map(str, prints[i])), []).append(i)
    first = next(iter(found), "")
    found.setdefault(first, []).extend(unknown)
    return list(found.items())


def _names(settings: Sequence[Setting]) -> list[str]:
    """Task, model, data and protocol of each problem, and what else it differs in; numbered where only
    questions or weights differ."""
    shown = [
        key
        for key in differences(settings)
        if key not in ("task.name", "model.name", "data.source", "protocol", "task.eval")
    ]
    names = []
    for setting in settings:
        more = "".join(f", {key}={plain(setting.get(key))}" for key in shown)
        protocol = "" if setting.get("protocol", "native") == "native" else f":{setting['protocol']}"
        names.append(
            f"{setting.get('task.name', '?')}@{setting.get('data.source', '?')}{protocol} on "
            f"{setting.get('model.name', '?')}{more}"
        )
    counts = Counter(names)
    seen: Counter = Counter()
    for i, name in enumerate(names):
        seen[name] += 1
        names[i] = name if counts[name] == 1 else f"{name} (set {seen[name]} of questions or weights)"
    return names


def _entries(study: Study, members: list[tuple[int, Setting]]) -> list[Entry]:
    groups: dict[frozenset, tuple[Setting, list[int]]] = {}
    for row, setting in members:
        groups.setdefault(frozenset(setting.items()), (setting, []))[1].append(row)
    settings = [setting for setting, _ in groups.values()]
    entries = []
    for setting, rows in groups.values():
        runs = study.runs.iloc[rows].sort_values("seed").drop_duplicates("run")
        method = setting.get("method.name", "?")
        rivals = [other for other in settings if other.get("method.name") == method]
        apart = [key for key in differences(rivals) if setting.get(key) is not None] or differences(rivals)
        more = [f"{key.removeprefix('method.')}={plain(setting.get(key))}" for key in apart]
        label = f"{method} ({', '.join(more)})" if more else method
        entries.append(Entry(label, method, setting, runs, study.configs[runs["run"].iloc[0]]))
    return entries


def _states(entry: Entry, most: int) -> list[str]:
    lost = entry.runs[entry.runs["state"] != "finished"]
    found = []
    for (state, reason), rows in lost.fillna({"reason": ""}).groupby(["state", "reason"]):
        seeds = ", ".join(str(seed) for seed in rows["seed"])
        found.append(f"{state}, seed {seeds}" + (f": {reason}" if reason else ""))
    twice = entry.finished["seed"][entry.finished["seed"].duplicated()].unique()
    if len(twice) and not entry.seedless:
        found.append(f"seed {', '.join(map(str, twice))} more than once, which is no further evidence")
    if 0 < len(entry.finished) < most and not entry.seedless:
        found.append(f"{len(entry.finished)} of {most} seeds")
    return found
