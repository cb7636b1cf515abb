"""The table at the end of a run, from its folder alone: the same for a run just done and one found finished.
Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from moabench.analysis.measures.base import HEADLINES
from moabench.benchmarks import tasks
from moabench.benchmarks.machine import files
from moabench.benchmarks.machine.terminal import shown

LOAD = {
    "effective_experts": "effective experts",
    "max_vio": "global MaxVio",
    "mean_active": "active experts per token",
    "router_entropy": "router entropy",
}
"""Load measures that the table shows if a run has them; all are in metrics.json."""

COLLAPSE = {name: headline.words for name, headline in HEADLINES.items() if headline.words}
"""What the headline numbers say of specialisation and collapse."""

FORGETTING = {"before": "held-out text {:.3f} nats a token before", "loss": "{:.3f} after"}
"""The line on what was lost of the base's own text."""

LEAKAGE = {"rows": "{:,.0f} training rows are evaluated too", "dropped": "{:,.0f} dropped"}
"""The line on training rows that are evaluated too, where there are any."""


CUT = {
    "train/cut_examples": "{:,.0f} training texts lost their beginning (train.max_length)",
    "train/left_out": "{:,.0f} of them left out, with nothing of the question beside the answer",
    "eval/cut_requests": "{:,.0f} evaluated prompts lost their beginning (longer than the model reads)",
}
"""The line on texts that are longer than what is read, where there are any."""


def show(folder: Path, found: bool = False) -> None:
    """Print the summary of a finished run; `found` says that it had been done before."""
    metrics = files.read_json(folder / "metrics.json") or {}
    cfg = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    console = Console(highlight=False)
    ways = {title.partition("@")[2] for title in evaluated(metrics)}
    way = f"@{ways.pop()}" if len(ways) == 1 else ""  # said once, where it is the same for every task
    title = (
        f"{cfg['method']['name']} on {cfg['model']['name']}, {cfg['task']['name']}{way}, seed {cfg['seed']}"
    )
    console.print()
    console.print(
        shown(title) + (" (found finished)" if found else ""), style="bold", soft_wrap=True, markup=False
    )
    console.print(_accuracy(metrics, way))
    for name, text in _facts(metrics, folder):
        console.print(f"  {name:<11} {shown(text)}", soft_wrap=True, markup=False)


def _accuracy(metrics: dict[str, Any], way: str) -> Table:
    """One row a task: accuracies in percent with standard error, chance, the frozen base, and what training
    gained."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("task", no_wrap=True)
    titles = evaluated(metrics)
    extra = [
        name
        for name in ("acc_norm", "acc_strict")
        if any(f"eval/{title}/{name}" in metrics for title in titles)
    ]
    for column in ("acc %", *(f"{name} %" for name in extra), "base %", "gain", "chance"):
        table.add_column(column, justify="right", no_wrap=True)
    for title in titles:
        others = [_percent(metrics, f"eval/{title}/{name}") for name in extra]
        acc, base = (_percent(metrics, f"{part}/{title}/acc") for part in ("eval", "base"))
        gain = _gain(metrics[f"eval/{title}/acc"], metrics.get(f"base/{title}/acc"))
        table.add_row(Text(shown(title.removesuffix(way))), acc, *others, base, gain, _chance(title))
    if len(titles) > 1:
        values = [_mean(metrics, part, titles) for part in ("eval", "base")]
        acc, base = ("" if value is None else f"{100 * value:.1f}" for value in values)
        table.add_section()
        table.add_row("mean", acc, *[""] * len(extra), base, _gain(*values), "")
    return table


def _gain(accuracy: float | None, base: float | None) -> str:
    return f"{100 * (accuracy - base):+.1f}" if accuracy is not None and base is not None else ""


def accuracy(metrics: Mapping[str, Any]) -> float | None:
    """Mean accuracy (0..1) over the evaluated tasks, each with equal weight; None without any."""
    values = [metrics[f"eval/{title}/acc"] for title in evaluated(metrics)]
    return sum(values) / len(values) if values and None not in values else None


def _mean(metrics: dict[str, Any], part: str, titles: list[str]) -> float | None:
    found = [metrics[f"{part}/{title}/acc"] for title in titles if f"{part}/{title}/acc" in metrics]
    return sum(found) / len(found) if len(found) == len(titles) else None


def evaluated(metrics: Mapping[str, Any]) -> list[str]:
    """The results that `metrics` has accuracies of, as `<task>@<source>:<protocol>`."""
    return [key.split("/")[1] for key in metrics if key.startswith("eval/") and key.endswith("/acc")]


def _percent(metrics: dict[str, Any], key: str) -> str:
    value, error = metrics.get(key), metrics.get(f"{key}_stderr")
    if value is None:
        return ""
    return f"{100 * value:.1f}" + (f" ± {100 * error:.1f}" if error is not None else "")


def _chance(title: str) -> str:
    name, protocol = title.partition("@")[0], title.rpartition(":")[2]
    return f"{100 * tasks.get(name).chance(protocol):.0f}" if name in tasks.names() else ""


def _facts(metrics: dict[str, Any], folder: Path) -> list[tuple[str, str]]:
    """(name, text) of the lines below the table; a line without figures is left out."""
    trainable, total = metrics.get("params/trainable"), metrics.get("params/total")
    parameters = (
        f"{trainable:,} trainable of {total:,} ({100 * trainable / total:.2f} %)"
        if trainable is not None and total
        else ""
    )
    parts = [
        _figure(metrics, "train/seconds", "{:,.0f} s"),
        _figure(metrics, "train/tokens_per_second", "{:,.0f} tokens/s"),
        _figure(metrics, "memory/peak_bytes", "{:,.0f} MB at the peak", 1e-6),
    ]
    names = [
        key.removeprefix("train/loss_")
        for key in metrics
        if key.startswith("train/loss_") and key != "train/loss_total"
    ]
    losses = [_figure(metrics, f"train/loss_{name}", f"{name} {{:.4g}}") for name in names]
    load = [_figure(metrics, f"load/{key}", f"{name} {{:.3g}}") for key, name in LOAD.items()]
    alike = [_figure(metrics, f"headline/{key}", form) for key, form in COLLAPSE.items()]
    forgotten = [_figure(metrics, f"forgetting/{key}", form) for key, form in FORGETTING.items()]
    leaked = (
        [_figure(metrics, f"leakage/{key}", form) for key, form in LEAKAGE.items()]
        if metrics.get("leakage/rows")
        else []
    )
    lines = {
        "parameters": [parameters],
        "training": parts,
        "losses": losses,
        "load": load,
        "collapse": alike,
        "forgetting": forgotten,
        "leakage": leaked,
        "cut": [cut(metrics)],
    }
    differs = (files.read_json(folder / "recipe.json") or {}).get("differs")
    if isinstance(differs, list) and differs:
        lines["recipe"] = [
            f"differs from the published setting (in brackets): {', '.join(map(str, differs))}"
        ]
    lines["folder"] = [str(folder)]
    joined = {name: ", ".join(filter(None, texts)) for name, texts in lines.items()}
    return [(name, text) for name, text in joined.items() if text]


def cut(metrics: Mapping[str, Any]) -> str:
    """What was not read whole, in words; empty where there is none."""
    return ", ".join(_figure(metrics, key, form) for key, form in CUT.items() if (metrics.get(key) or 0) > 0)


def _figure(metrics: Mapping[str, Any], key: str, form: str, factor: float = 1.0) -> str:
    return form.format(metrics[key] * factor) if metrics.get(key) is not None else ""
