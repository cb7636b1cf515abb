"""What counting expert load and routing adds to a train step of the shipped base, a row of the history every ten steps included.

    python -m moabench.benchmarks.overhead --rounds 15

Times are CPU time of the process with one thread, wall time otherwise: medians of interleaved rounds. What mixtures themselves cost:
`python -m moabench.kernels.bench`.
"""

from __future__ import annotations

import argparse
import copy
import functools
import statistics

import torch
from torch import nn

import moabench.methods as methods
from moabench.kernels.bench.measure import interleaved
from moabench.methods import catalog

from .config import ModelConfig
from .model import load_model
from .tally import Tally


def shares(rounds: int, names: tuple[str, ...], batch: int = 16, length: int = 24) -> dict[str, tuple[float, float, float]]:
    """Of each method: the tally's share of a train step, seconds of a step and of counting it, on batches as short as the built-in
    questions."""
    base, _ = load_model(ModelConfig("tiny", kind="builtin"), 0, "cpu")
    ids, result = torch.randint(0, base.config.vocab_size, (batch, length)), {}
    mask, found = torch.ones_like(ids), {}
    for name in names:
        model, tally = methods.attach(copy.deepcopy(base), catalog.raw(name)).train(), Tally()

        def step(model: nn.Module = model) -> None:
            with methods.record(model) as found["recorder"]:
                found["task"] = model(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False).loss
            (found["task"] + sum(found["recorder"].losses.values())).backward()
            model.zero_grad()

        count = functools.partial(lambda tally: tally.add({"task": found["task"]}, mask, found["recorder"].routing), tally)
        runs = {"step": step, "count": count, "row": functools.partial(tally.window, 1)}
        seconds = {k: statistics.median(v) for k, v in interleaved(runs, rounds, torch.device("cpu")).items()}
        result[name] = (seconds["count"] + seconds["row"] / 10) / seconds["step"], seconds["step"], seconds["count"]
    return result


def main() -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="moabench.benchmarks.overhead", description=__doc__.split("\n\n")[0])
    parser.add_argument("--methods", nargs="+", choices=catalog.names(), default=["molora", "moe_lora_topk", "mixlora", "moa_soft"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for name, (share, step, count) in shares(args.rounds, tuple(args.methods)).items():
        print(f"{name:16s} {100 * share:5.1f} %   step {step * 1e3:7.1f} ms, count {count * 1e3:5.2f} ms")


if __name__ == "__main__":
    main()
