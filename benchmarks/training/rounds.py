"""The trainings of a method that has stages: which rows and which tensors each has, and what is kept of one
that is done, so that a run that is killed in a later one goes on there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moabench.benchmarks.machine import files
from moabench.methods.catalog import Method
from moabench.methods.stage import Round
from moabench.methods.tuner.layer import MixtureLayer
from moabench.methods.tuner.sites import layer_sites

from .train import TrainResult
from .trainer import changing


@dataclass(frozen=True)
class Training:
    """One of the trainings of a run. length: in units of the config's; rows: what it is trained on."""

    round: Round
    length: float
    rows: list[dict[str, Any]]


def planned(
    method: Method, rows: list[dict[str, Any]], labels: Sequence[str], key: str | None
) -> list[Training]:
    """The trainings of a method with stages, in order. labels: names in the order of the experts; key: where
    a row has its label."""
    counts = Counter(row[key] for row in rows) if key else {}
    found = []
    for stage in method.stages:
        numbers = [counts[label] for label in labels] if stage.reads_labels else [len(rows)]
        for part in stage.rounds(numbers):
            own = rows if part.label is None else [row for row in rows if row[key] == labels[part.label]]
            found.append(Training(part, stage.length, own))
    return found


@contextmanager
def only(model: nn.Module, part: Round) -> Iterator[None]:
    """Inside, only what the round trains is trainable; afterwards, of tensors whose parts belong to one
    expert each, those of other experts are as they were (weight decay moves them)."""
    layers = [m for m in model.modules() if isinstance(m, MixtureLayer)]
    tensors = {
        parameter: "routers" if name.split("__")[1] == "router" else "experts"
        for layer in layers
        for name, parameter in layer.tensors[layer.active_adapters[0]].named_parameters()
    }
    others = list(_of_others(layers, part.label)) if part.label is not None else []
    for parameter, kind in tensors.items():
        parameter.requires_grad_(kind in part.parts)
    try:
        yield
    finally:
        for parameter in tensors:
            parameter.requires_grad_(True)
        with torch.no_grad():
            for tensor, axis, index, before in others:
                tensor.index_copy_(axis, index, before)


def _of_others(layers: list[MixtureLayer], expert: int) -> Iterator[tuple[Tensor, int, Tensor, Tensor]]:
    """(tensor, axis, indices, what is there) of what does not belong to `expert`."""
    for view in (view for layer in layers for site in layer_sites(layer) for view in site.banks):
        for name, (axis, owner) in view.part.owners.items():
            tensor = view.tensors[name]
            index = torch.tensor([i for i, e in enumerate(owner) if e != expert], device=tensor.device)
            if len(index):
                yield tensor, axis, index, tensor.detach().index_select(axis, index).clone()


def keep(folder: Path, model: nn.Module, result: TrainResult) -> None:
    """Leave what a finished training gave in `folder`."""
    tensors = {name: tensor.detach().cpu().clone() for name, tensor in changing(model)}
    files.write(folder / "finished.pt", lambda file: torch.save({"tensors": tensors, **asdict(result)}, file))


def kept(folder: Path, model: nn.Module) -> TrainResult | None:
    """What was left there, its tensors put into `model`; None where the training did not finish."""
    file = folder / "finished.pt"
    if not file.exists():
        return None
    found = torch.load(file, weights_only=True, map_location="cpu")
    tensors = found.pop("tensors")
    with torch.no_grad():
        for name, tensor in changing(model):
            tensor.copy_(tensors[name])
    return TrainResult(**found)


def joined(results: Sequence[tuple[str, TrainResult]]) -> TrainResult:
    """One result of several trainings: seconds, tokens and steps add up, steps of the history go on; all else
    is the last training's. Seconds of each are told too."""
    last = results[-1][1]
    summed = ("train/seconds", "train/tokens", "train/steps", "train/cut_examples", "train/left_out")
    metrics = dict(last.metrics) | {key: sum(r.metrics[key] for _, r in results) for key in summed}
    metrics["train/tokens_per_second"] = metrics["train/tokens"] / metrics["train/seconds"]
    metrics["memory/peak_bytes"] = max(r.metrics["memory/peak_bytes"] for _, r in results)
    metrics |= {f"train/seconds_{name}": r.metrics["train/seconds"] for name, r in results}
    history, before = [], 0
    for name, result in results:
        history += [row | {"step": row["step"] + before, "stage": name} for row in result.history]
        before += int(result.metrics["train/steps"])
    return TrainResult(metrics, history, last.routing)
