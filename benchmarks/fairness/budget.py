"""`budget=`: the same cost for every method of a study, since a comparison at unequal budgets is none.

    budget=lora_r16            as many trainable parameters as LoRA of rank 16 (or any method:
                               budget=moa_soft, budget=molora_r4)
    budget=0.5%  budget=2M     a share of the base's parameters; a number (k, M, B)
    budget=lora_r16 budget.match=flops      as many FLOPs in training as LoRA of rank 16 spends in
                                            `train.steps`
    budget=lora_r16 budget.match=time       as many seconds

match=params scales the sizes of the experts (rank, bottleneck width, prompt length) in the proportions of the
method's file until all trainable parameters, routers and gates included, are as many as the budget's. `alpha`
follows the rank, so that the factor of an expert's update stays (but with rslora, whose point is another
factor). Where a whole step of the sizes is too coarse, some layers, evenly spread, take it and others do not;
within a layer the experts stay alike. Numbers of experts never change, but of experts without another size
(IA3 vectors). match=flops and match=time leave the sizes alone and change how long is trained, all stages of
a method together.

Imports torch only to solve; solutions are kept in `<runs_dir>/.budget`, so that a finished run is found
without it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moabench.benchmarks.bases.fingerprint import model_fingerprint
from moabench.benchmarks.bases.skeleton import Skeleton
from moabench.benchmarks.config.budget import Goal
from moabench.benchmarks.config.hashing import digest, plain
from moabench.benchmarks.machine import environment, files
from moabench.methods import catalog
from moabench.methods.sizes import Dial, Size, dials, scaled, total
from moabench.methods.spec import ConfigError
from moabench.methods.stage import Round

if TYPE_CHECKING:
    from moabench.benchmarks.config.run import RunConfig

# ---- solving


@dataclass(frozen=True)
class Solution:
    """What a method gets. target, reached: parameters (match=params), or FLOPs or seconds of training;
    `words` says it."""

    method: dict[str, Any]
    length: float
    """Factor on the length of training."""
    target: float
    reached: float
    words: str


def apply(cfg: RunConfig) -> tuple[RunConfig, Solution | None]:
    """The config with what its budget gives its method; None without a budget, and for methods that no budget
    sizes (full, none).

    A config that meets its budget already is left as it is, so one that was solved stays. Raises ConfigError
    where the budget cannot be met.
    """
    if (
        cfg.budget.size == "none"
        or cfg.parsed_method.tuner in ("full", "none")
        or cfg.budget.reference_length is not None
    ):
        return cfg, None
    question = {
        "method": cfg.method,
        "model": plain(cfg.model, hashed=True),
        "weights": model_fingerprint(cfg.model, cfg.runs_dir).digest,
        "budget": dataclasses.asdict(cfg.budget),
        "versions": environment.versions(("moabench", "torch", "transformers", "peft")),
        "batch": cfg.train.batch_size,
        "device": cfg.device if cfg.budget.match == "time" else None,
        "threads": cfg.threads if cfg.budget.match == "time" else None,
    }
    file = (
        Path(cfg.runs_dir).expanduser() / ".budget" / f"{cfg.parsed_method.name}-{digest(question)[:16]}.json"
    )
    known = files.cached(file)
    if known is None:
        solution = solve(cfg)
        files.write_json(file, dataclasses.asdict(solution))
    else:
        solution = Solution(**known)
    return _with(cfg, solution), solution


def _with(cfg: RunConfig, solution: Solution) -> RunConfig:
    if cfg.budget.match == "params":
        return dataclasses.replace(cfg, method=solution.method)
    unit = "steps" if cfg.train.steps is not None else "epochs"
    length = getattr(cfg.train, unit)
    scaled = max(1, round(length * solution.length)) if unit == "steps" else length * solution.length
    budget = dataclasses.replace(cfg.budget, reference_length=float(length))
    return dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, **{unit: scaled}), budget=budget)


def solve(cfg: RunConfig) -> Solution:
    """What the budget of `cfg` gives its method. Builds the base without weights. Raises ConfigError."""
    goal = Goal.read(cfg.budget.size)
    if cfg.budget.match != "params":
        return _length(cfg, goal)
    skeleton = Skeleton(cfg.model)
    target = {
        "count": lambda: goal.value,
        "share": lambda: goal.value * skeleton.size,
        "method": lambda: skeleton.count(goal.method),
    }
    return _sizes(cfg, skeleton, target[goal.kind]())


def _sizes(cfg: RunConfig, skeleton: Skeleton, target: float) -> Solution:
    """The sizes that come nearest to `target` trainable parameters: the same in all layers if that is within
    the tolerance."""
    method = cfg.parsed_method

    def solution(data: Mapping[str, Any], count: int, sizes: str) -> Solution:
        words = (
            f"{method.name} gets {count:,} trainable parameters ({100 * (count / target - 1):+.1f} "
            f"%): {sizes}"
        )
        return Solution(dict(data), 1.0, target, count, f"budget {cfg.budget.size} = {target:,.0f}; {words}")

    given = skeleton.count(cfg.method)
    if abs(given - target) <= cfg.budget.tolerance * target:
        return solution(cfg.method, given, "the sizes of its config")
    if method.layers:
        raise ConfigError(
            f"budget.size={cfg.budget.size}: {method.name} sets sizes by layer (method.layers); "
            "expected those or a budget."
        )
    found = dials(method)
    # Every size is set, since a bank that sets none takes the main one's.
    doubled = [scaled(cfg.method, {d: d.at(2 if d is one else 1) for d in found}) for one in found]
    slopes = [(skeleton.count(data) - given) / total(d.size) for d, data in zip(found, doubled, strict=True)]

    def predicted(scale: float) -> float:
        return given + sum(
            slope * (total(d.at(scale)) - total(d.size)) for d, slope in zip(found, slopes, strict=True)
        )

    low = 0.0
    while predicted(step := min(d.next(low) for d in found)) <= target:
        low = step
    sizes = [{d: d.at(scale) for d in found} for scale in (low, step)]
    below, above = (scaled(cfg.method, s) for s in sizes)
    tried = [(skeleton.count(data), data, _listed(s)) for data, s in zip((below, above), sizes, strict=True)]

    def far(entry: tuple[int, dict, str]) -> float:
        return abs(entry[0] - target) / target

    if min(map(far, tried)) > cfg.budget.tolerance and tried[0][0] < target < tried[1][0]:
        share = (target - tried[0][0]) / (tried[1][0] - tried[0][0])
        tried.insert(1, _layered(below, above, sizes, round(share * skeleton.layers), skeleton))
    best = min(tried, key=far)
    if far(best) > cfg.budget.tolerance:
        can = " or ".join(f"{count:,} ({sizes})" for count, _, sizes in tried)
        rest = predicted(0.0) - sum(slope * total(d.at(0.0)) for d, slope in zip(found, slopes, strict=True))
        raise ConfigError(
            f"budget.size={cfg.budget.size}: {method.name} cannot have {target:,.0f} trainable parameters "
            f"within {cfg.budget.tolerance:.0%}; it can have {can}, of which {rest:,.0f} lie outside of "
            "experts. Expected another budget, or another number of experts."
        )
    return solution(best[1], best[0], best[2])


def _layered(
    below: dict, above: dict, sizes: list[dict[Dial, Size]], many: int, skeleton: Skeleton
) -> tuple[int, dict, str]:
    """`below` with the sizes of `above` in `many` layers, evenly spread."""
    if many in (0, skeleton.layers):
        data = above if many else below
        return skeleton.count(data), data, _listed(sizes[bool(many)])
    spread = "+".join(str((2 * i + 1) * skeleton.layers // (2 * many)) for i in range(many))
    changes: dict[str, Any] = {}
    for dial, size in sizes[1].items():
        changes = catalog.override(changes, dial.changes(size))
    data = catalog.override(below, {"layers": {spread: changes}})
    larger = {d: size for d, size in sizes[1].items() if size != sizes[0][d]}
    return (
        skeleton.count(data),
        data,
        f"{_listed(sizes[0])}; {_listed(larger)} in layers {spread.replace('+', ', ')}",
    )


def _listed(sizes: Mapping[Dial, Size]) -> str:
    return ", ".join(
        f"{d.label} {list(size) if isinstance(size, tuple) else size}" for d, size in sizes.items()
    )


def _length(cfg: RunConfig, goal: Goal) -> Solution:
    """How much shorter or longer the method trains than the reference, for equal FLOPs or seconds."""
    flops = cfg.budget.match == "flops"
    own, reference = (_flops if flops else _seconds)(cfg, [cfg.method, goal.method])
    name, cost = (
        cfg.parsed_method.name,
        f"{own / reference:.3f} times the {'FLOPs' if flops else 'seconds'} of one of {cfg.budget.size}",
    )
    words = (
        f"budget {cfg.budget.size}: a step of {name} takes {cost}, so it trains {reference / own:.3f} "
        "times as long"
    )
    return Solution(dict(cfg.method), reference / own, reference, own, words)


LENGTH = 64
"""Tokens of a sequence on which a step's cost is taken. The ratio of two methods hardly depends on it:
attention is the same in both."""


def _flops(cfg: RunConfig, datas: list[Mapping[str, Any]]) -> list[float]:
    """FLOPs of a training step's forward and backward pass under each method, counted operator by operator
    without computing."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from moabench.benchmarks.training.memory import fake

    found = []
    for data in datas:
        cost = 0.0
        for length, part in _stages(data):
            model = Skeleton(cfg.model).attached(data)
            with fake(model), _training(model, part), FlopCounterMode(display=False) as counter:
                _step(model, torch.zeros(cfg.train.batch_size, LENGTH, dtype=torch.long))
            cost += length * counter.get_total_flops()
        found.append(cost)
    return found


def _stages(data: Mapping[str, Any]) -> list[tuple[float, Round | None]]:
    """(length, one round of it) of each stage of a method; one of everything where it has none."""
    return [(stage.length, stage.rounds([1])[0]) for stage in catalog.parse(data).stages] or [(1.0, None)]


def _training(model: Any, part: Round | None) -> AbstractContextManager[None]:
    """What a round trains, trainable alone. Its rows are those of all its stage's rounds together."""
    from moabench.benchmarks.training import rounds

    return nullcontext() if part is None else rounds.only(model, dataclasses.replace(part, label=None))


def _seconds(cfg: RunConfig, datas: list[Mapping[str, Any]]) -> list[float]:
    """Seconds of a training step's forward and backward pass under each method, on the run's device: medians
    of interleaved steps."""
    import torch

    from moabench import methods
    from moabench.benchmarks.bases.loading import load_model
    from moabench.benchmarks.machine.globals import set_globals
    from moabench.benchmarks.machine.timing import interleaved, quartiles

    device, steps = set_globals(**cfg.globals), {}
    for i, data in enumerate(datas):
        base, tokenizer = load_model(cfg.model, cfg.seed, device)
        model = methods.attach(base, data)
        ids = torch.randint(len(tokenizer), (cfg.train.batch_size, LENGTH), device=device)
        for j, (_, part) in enumerate(_stages(data)):
            steps[f"{i}-{j}"] = functools.partial(_step_of, model, ids, part)
    times = interleaved(steps, ROUNDS, torch.device(device))
    return [
        sum(length * quartiles(times[f"{i}-{j}"])[1] for j, (length, _) in enumerate(_stages(data)))
        for i, data in enumerate(datas)
    ]


def _step_of(model: Any, ids: Any, part: Round | None) -> None:
    with _training(model, part):
        _step(model, ids)


ROUNDS = 9
"""Timed steps of each method with match=time."""


def _step(model: Any, ids: Any) -> None:
    """Forward and backward pass of one training step; ids [B, L]."""
    from moabench.benchmarks.training import step

    model.train().zero_grad(set_to_none=True)
    step.full(model, ids).backward()
