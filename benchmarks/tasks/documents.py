"""`custom_dataset` of every task file: lm-eval gets its documents from `benchmarks.data`, without files or caches of its own."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import datasets

from moabench.benchmarks import data, tasks


def load(config_source: str, source: str = "builtin", root: str | None = None, eval_limit: int | None = None, seed: int = 0, **_):
    """{split: Dataset} with the split that the task reports.

    lm-eval passes a task's metadata: `config_source` is the path of its YAML; the others are the keys of the config group `data`.
    """
    task = tasks.get(Path(config_source).stem)
    rows = data.load_rows(task.name, task.split, SimpleNamespace(source=source, root=root, eval_limit=eval_limit, seed=seed))
    return {task.split: datasets.Dataset.from_list(rows)}
