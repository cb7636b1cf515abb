"""What the harness costs beside the training itself.

    python -m moabench.benchmarks.speed.overhead --rounds 15      counting load and routing, as a share of a
                                                                  train
                                                            step
    python -m moabench.benchmarks.speed.overhead --run            a whole run's seconds before its first step
                                                                  and
                                                            after its last

A row of the history every ten steps is included. Times of steps are CPU time of the process with one thread,
wall time otherwise: medians of interleaved rounds. What mixtures themselves cost: `python -m
moabench.benchmarks.speed`.
"""

from __future__ import annotations

import argparse
import copy
import functools
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
from torch import nn

import moabench.methods as methods
from moabench.benchmarks.bases.loading import load_model
from moabench.benchmarks.config.sections import ModelConfig
from moabench.benchmarks.machine.timing import interleaved
from moabench.benchmarks.observing.training_log import TrainingLog
from moabench.benchmarks.training import step
from moabench.methods import catalog


def shares(
    rounds: int, names: tuple[str, ...], sequences: int = 16, length: int = 24
) -> dict[str, tuple[float, float, float]]:
    """Of each method: the tally's share of a train step, seconds of a step and of counting it, on batches as
    short as the built-in questions."""
    base, _ = load_model(ModelConfig("tiny", kind="builtin"), 0, "cpu")
    ids, result = torch.randint(0, base.config.vocab_size, (sequences, length)), {}
    mask, found = torch.ones_like(ids), {}
    batch = {"input_ids": ids, "labels": ids, "kept": length}
    for name in names:
        model, tally = methods.attach(copy.deepcopy(base), catalog.raw(name)).train(), TrainingLog()

        def run(model: nn.Module = model) -> None:
            found["losses"] = step.losses(model, batch | {"attention_mask": mask})
            (found["losses"].task / ids.numel() + sum(found["losses"].auxiliary.values())).backward()
            model.zero_grad()

        count = functools.partial(
            lambda tally: tally.add({"task": found["losses"].task}, mask, found["losses"].routing), tally
        )
        runs = {"step": run, "count": count, "row": functools.partial(tally.window, 1)}
        seconds = {k: statistics.median(v) for k, v in interleaved(runs, rounds, torch.device("cpu")).items()}
        result[name] = (
            (seconds["count"] + seconds["row"] / 10) / seconds["step"],
            seconds["step"],
            seconds["count"],
        )
    return result


def of_run(overrides: Sequence[str]) -> dict[str, float]:
    """Wall seconds of one run in this process, imports done: `before` the first step and `after` the last
    one, without what is asked for there, which is `evaluation` (base and trained model, all of it) and
    `probes`; `steps`, and `whole`."""
    from moabench.benchmarks.config.overrides import composed
    from moabench.benchmarks.observing import probe
    from moabench.benchmarks.run import run as experiment
    from moabench.benchmarks.run import stages
    from moabench.benchmarks.training import trainer

    spent, steps, spans = {"evaluation": 0.0, "probes": 0.0}, [], []

    def timed(call: Callable, name: str) -> Callable:
        @functools.wraps(call)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                end = time.perf_counter()
                if name == "steps":
                    steps.extend((start, end))
                else:
                    spent[name] += end - start
                    spans.append((start, end))

        return wrapper

    with ExitStack() as patches, tempfile.TemporaryDirectory() as folder:
        for holder, call, name in (
            (stages.base, "measured", "evaluation"),
            (stages.evaluate, "measured", "evaluation"),
            (probe.Probe, "__init__", "probes"),
            (probe.Probe, "measure", "probes"),
            (trainer.MixtureTrainer, "training_step", "steps"),
        ):
            patches.enter_context(mock.patch.object(holder, call, timed(getattr(holder, call), name)))
        cfg = composed([f"runs_dir={folder}", "logger=none", "quiet=true", *overrides])
        start = time.perf_counter()
        experiment.run(cfg)
        end = time.perf_counter()
    first, last = steps[0], steps[-1]
    before = first - start - sum(b - a for a, b in spans if b <= first)
    after = end - last - sum(b - a for a, b in spans if a >= last)
    return {"before": before, "after": after, **spent, "steps": last - first, "whole": end - start}


def main() -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(
        prog="moabench.benchmarks.speed.overhead", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=catalog.names(),
        default=["molora", "moe_lora_topk", "mixlora", "moa_soft"],
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--run", nargs="*", metavar="key=value", help="measure a run of this config")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.run is not None:
        of_run(
            [*args.run, "train.steps=2", "probe.times=0"]
        )  # what the first run of a process imports and fills
        print(", ".join(f"{name} {seconds:.2f} s" for name, seconds in of_run(args.run).items()))
        return
    for name, (share, whole, count) in shares(args.rounds, tuple(args.methods)).items():
        print(f"{name:16s} {100 * share:5.1f} %   step {whole * 1e3:7.1f} ms, count {count * 1e3:5.2f} ms")


if __name__ == "__main__":
    main()
