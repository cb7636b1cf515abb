"""What the task files call by name: documents from `benchmarks.data`, prompts and scores from `formats`. No
caches of lm-eval's."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from moabench.benchmarks import tasks
from moabench.benchmarks.tasks import rows as data


class Documents(list):
    """Rows as lm-eval wants documents: it looks names of keys up in `features`. A `datasets.Dataset` has the
    keys of its first row alone, in every row."""

    def __init__(self, rows: Iterable[dict[str, Any]]) -> None:
        super().__init__(rows)
        self.features = {key: None for row in self for key in row}


def load(config_source: str, source: str = "builtin", seed: int = 0, **options: Any) -> dict[str, Documents]:
    """{split: rows} with the split that the task reports.

    lm-eval passes a task's metadata: `config_source` is the path of its YAML; `options` may hold root,
    eval_limit and revisions of the config group `data`.
    """
    task = tasks.get(Path(config_source).stem)
    known = {key: options[key] for key in ("root", "eval_limit", "revisions") if key in options}
    rows = data.load_rows(
        task.name, task.split, SimpleNamespace(source=source, seed=seed, **{"root": None, **known})
    )
    return {task.split: Documents(rows)}


def prompt(row: dict[str, Any]) -> str:
    """Text before the response, of tasks that are generated natively."""
    return tasks.get(row["task"]).form().prompt(row)


def answer(row: dict[str, Any]) -> str:
    """The right response."""
    return tasks.get(row["task"]).form().answer(row)


def score(row: dict[str, Any], results: list[str]) -> dict[str, float]:
    """acc and acc_strict of one generated response."""
    form = tasks.get(row["task"]).form()
    found = form.extract(results[0], row)
    return {
        "acc": float(form.correct(found.paper, row)),
        "acc_strict": float(form.correct(found.strict, row)),
    }
