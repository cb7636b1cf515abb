"""The table at the end of a run, from its folder alone: the same for a run just done and one found finished. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from rich import box
from rich.console import Console
from rich.table import Table

from moabench.benchmarks import files, tasks

LOAD = {
    "effective_experts": "effective experts",
    "max_vio": "MaxVio",
    "mean_active": "active experts per token",
    "router_entropy": "router entropy",
}
"""Load measures that the table shows if a run has them; all are in metrics.json."""


def show(folder: Path, found: bool = False) -> None:
    """Print the summary of a finished run; `found` says that it had been done before."""
    metrics = files.read_json(folder / "metrics.json") or {}
    cfg = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    console = Console(highlight=False)
    title = f"{cfg['method']['name']} on {cfg['model']['name']}, {cfg['task']['name']}, seed {cfg['seed']}"
    console.print()
    console.print(_accuracy(metrics, title + (" (found finished)" if found else "")))
    for name, text in _facts(metrics, folder):
        console.print(f"  {name:<11} {text}", soft_wrap=True, markup=False)


def _accuracy(metrics: dict[str, Any], title: str) -> Table:
    """One row a task: accuracies in percent with standard error, chance, the frozen base, and what training gained."""
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("task", no_wrap=True)
    for column in ("acc %", "acc_norm %", "base %", "gain", "chance"):
        table.add_column(column, justify="right", no_wrap=True)
    for task in evaluated(metrics):
        acc, base = metrics.get(f"eval/{task}/acc"), metrics.get(f"base/{task}/acc")
        gain = f"{100 * (acc - base):+.1f}" if acc is not None and base is not None else ""
        norm, reference = _percent(metrics, f"eval/{task}/acc_norm"), _percent(metrics, f"base/{task}/acc")
        table.add_row(task, _percent(metrics, f"eval/{task}/acc"), norm, reference, gain, _chance(task))
    return table


def evaluated(metrics: dict[str, Any]) -> list[str]:
    """The tasks that `metrics` has accuracies of, as `<task>@<source>`."""
    return [key.split("/")[1] for key in metrics if key.startswith("eval/") and key.endswith("/acc")]


def _percent(metrics: dict[str, Any], key: str) -> str:
    value, error = metrics.get(key), metrics.get(f"{key}_stderr")
    if value is None:
        return ""
    return f"{100 * value:.1f}" + (f" ± {100 * error:.1f}" if error is not None else "")


def _chance(task: str) -> str:
    name = task.partition("@")[0]
    return f"{100 * tasks.get(name).chance:.0f}" if name in tasks.names() else ""


def _facts(metrics: dict[str, Any], folder: Path) -> list[tuple[str, str]]:
    """(name, text) of the lines below the table; a line without figures is left out."""
    trainable, total = metrics.get("params/trainable"), metrics.get("params/total")
    parameters = f"{trainable:,} trainable of {total:,} ({100 * trainable / total:.2f} %)" if trainable is not None and total else ""
    parts = [
        _figure(metrics, "train/seconds", "{:,.0f} s"),
        _figure(metrics, "train/tokens_per_second", "{:,.0f} tokens/s"),
        _figure(metrics, "memory/peak_bytes", "{:,.0f} MB at the peak", 1e-6),
    ]
    names = [key.removeprefix("train/loss_") for key in metrics if key.startswith("train/loss_") and key != "train/loss_total"]
    losses = [_figure(metrics, f"train/loss_{name}", f"{name} {{:.4g}}") for name in names]
    load = [_figure(metrics, f"load/{key}", f"{name} {{:.3g}}") for key, name in LOAD.items()]
    lines = {"parameters": [parameters], "training": parts, "losses": losses, "load": load, "folder": [str(folder)]}
    joined = {name: ", ".join(filter(None, texts)) for name, texts in lines.items()}
    return [(name, text) for name, text in joined.items() if text]


def _figure(metrics: dict[str, Any], key: str, form: str, factor: float = 1.0) -> str:
    return form.format(metrics[key] * factor) if metrics.get(key) is not None else ""
