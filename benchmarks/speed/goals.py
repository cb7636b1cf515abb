"""The project's goals as data, and what a report says about each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from moabench.methods import catalog

from .measure import Report, Row

Values = dict[str, float]
STEP_BOUND = 1.25
"""How far a train step may be above its own FLOP floor, both as ratios to the frozen step."""


@dataclass(frozen=True)
class Goal:
    """values(report) gives what was measured, by the settings it was measured at; all must keep the bound.
    device: where it applies."""

    name: str
    text: str
    device: str
    sense: str
    bound: float
    values: Callable[[Report], Values]

    def met(self, value: float) -> bool:
        return value <= self.bound if self.sense == "<=" else value >= self.bound


def label(row: Row) -> str:
    return f"{row.case} {row.width} {row.dtype}"


def quotient(
    over: tuple[str, str], under: tuple[str, str], quantity: str = "time", **where: object
) -> Callable[[Report], Values]:
    """Median of the rival `over` (case, name) by that of `under`, wherever both were measured at the same
    width, dtype and tokens."""

    def values(report: Report) -> Values:
        found = {}
        for row in report.find(case=over[0], rival=over[1], quantity=quantity, **where):
            same = {k: getattr(row, k) for k in ("level", "width", "dtype", "tokens", "device")}
            for other in report.find(case=under[0], rival=under[1], quantity=quantity, **same):
                found[f"{row.width} {row.dtype}, {row.tokens} tokens"] = row.median / other.median
        return found

    return values


def steps(report: Report) -> Iterator[tuple[Row, float]]:
    """Every measured train step with its floor."""
    for row in report.find(level="model", quantity="step"):
        same = {k: getattr(row, k) for k in ("level", "width", "dtype", "tokens", "device", "case", "rival")}
        for floor in report.find(quantity="floor of the step", **same):
            if row.case != "frozen":
                yield row, floor.median


def above_floor(report: Report) -> Values:
    return {
        label(row) + ("" if row.rival in ("torch", "PEFT") else f" {row.rival}"): row.ratio / floor
        for row, floor in steps(report)
    }


def decoding(report: Report) -> Values:
    """Of mixtures; PEFT's own methods are not ours to speed up."""
    return {
        label(r): r.ratio
        for r in report.find(quantity="decode of 16 tokens")
        if r.rival in ("torch", "triton")
    }


def added_waits(report: Report) -> Values:
    """Host waits of a step beyond the frozen model's. On a CPU, and only there, an oracle's skill ids are
    checked by value: left out."""
    rows = [r for r in report.find(level="model", quantity="host waits") if r.rival in ("torch", "triton")]
    rows = [r for r in rows if not (r.device == "cpu" and reads_skills(r.case))]
    frozen = {
        (r.width, r.dtype): r.median for r in report.find(level="model", quantity="host waits", case="frozen")
    }
    return {label(r): r.median - frozen[r.width, r.dtype] for r in rows}


def reads_skills(method: str) -> bool:
    """Whether a method's router is told the true skills."""
    return any(m.router.reads_skills(True) for m in catalog.parse(catalog.raw(method)).mixtures)


def saved(report: Report) -> Values:
    rows = report.find(level="block", case="molora", quantity="saved by the adapter")
    return {label(r): r.median for r in rows if r.rival in ("torch", "triton")}


def _large(over: tuple[str, str], under: tuple[str, str]) -> Callable[[Report], Values]:
    return quotient(over, under, level="block", width=4096, dtype="bf16", tokens=8192)


FROZEN, CUDA, CPU = ("frozen", "frozen"), "cuda", "cpu"
GOALS = (
    Goal(
        "G1",
        "8B block, soft E8 r8 on 7 linears, to the frozen step",
        CUDA,
        "<=",
        1.10,
        _large(("molora", "triton"), FROZEN),
    ),
    Goal(
        "G2",
        "the same, to PEFT's LoRA r8",
        CUDA,
        "<=",
        0.95,
        _large(("molora", "triton"), ("lora", "PEFT r8")),
    ),
    Goal("G3", "the soft loop, to ours", CUDA, ">=", 3.0, _large(("molora", "loop"), ("molora", "triton"))),
    Goal(
        "G3",
        "where + index_add at top-2, to ours",
        CUDA,
        ">=",
        4.0,
        _large(("moe_lora_topk", "gather"), ("moe_lora_topk", "triton")),
    ),
    Goal("G4", "MixLoRA E8 k2, to the frozen step", CUDA, "<=", 1.12, _large(("mixlora", "triton"), FROZEN)),
    Goal(
        "G4",
        "MixLoRA's published form, to ours",
        CUDA,
        ">=",
        1.8,
        _large(("mixlora", "published"), ("mixlora", "triton")),
    ),
    Goal(
        "G4",
        "MixLoRA's plain form, to ours",
        CUDA,
        ">=",
        2.2,
        _large(("mixlora", "vanilla"), ("mixlora", "triton")),
    ),
    Goal("G5", "soft MoA, to the frozen step", CUDA, "<=", 1.08, _large(("moa_soft", "triton"), FROZEN)),
    Goal(
        "G5",
        "sparse MoA, to soft MoA",
        CUDA,
        "<=",
        1.0,
        _large(("moa_sparse", "triton"), ("moa_soft", "triton")),
    ),
    Goal(
        "G6",
        "model of width 512 as a CUDA graph, soft E8 r8, to the frozen step",
        CUDA,
        "<=",
        1.6,
        quotient(("molora", "triton"), FROZEN, "step as a CUDA graph", level="model", width=512),
    ),
    Goal(
        "G6",
        "the loop, to ours",
        CUDA,
        ">=",
        8.0,
        quotient(("molora", "loop"), ("molora", "triton"), "step", level="model", width=512),
    ),
    Goal(
        "G7", "saved by the adapter, soft E8 r8 on 7 linears, bytes a token and block", "", "<=", 2000, saved
    ),
    Goal("G8", "host waits a step", "", "<=", 0, added_waits),
    Goal("G8", "greedy decoding, to the base", "", "<=", 1.3, decoding),
    Goal(
        "G9",
        "mixture alone, E8 r8: the soft loop, to ours",
        CPU,
        ">=",
        12,
        quotient(("molora", "loop"), ("molora", "torch"), level="mixture", width=1024, dtype="bf16"),
    ),
    Goal(
        "G9",
        "mixture alone, top-2: where + index_add, to ours",
        CPU,
        ">=",
        10,
        quotient(
            ("moe_lora_topk", "gather"), ("moe_lora_topk", "torch"), level="mixture", width=1024, dtype="bf16"
        ),
    ),
    Goal(
        "G10",
        "linear: PEFT's LoRA r8, to soft E8 r8",
        CPU,
        ">=",
        2,
        quotient(("lora", "PEFT r8"), ("molora", "torch"), level="linear", width=1024, dtype="bf16"),
    ),
    Goal(
        "G11",
        "MixLoRA's block: the published form, to ours",
        CPU,
        ">=",
        3,
        quotient(("mixlora", "published"), ("mixlora", "torch"), level="ffn", width=1024, dtype="bf16"),
    ),
    Goal("step", "train step of every method, to its own floor", "", "<=", STEP_BOUND, above_floor),
    Goal(
        "sparse",
        "sparse MoA's step, to soft MoA's",
        CPU,
        "<=",
        1.0,
        quotient(("moa_sparse", "torch"), ("moa_soft", "torch"), "step", level="model"),
    ),
)


def summary(report: Report, device: str) -> str:
    """A line a goal of this device: bound, worst value measured and where, met or missed, and how many
    settings missed."""
    lines = []
    for goal in GOALS:
        if goal.device not in ("", device):
            continue
        values = goal.values(report)
        head = f"  {goal.name:6s} {goal.text} {goal.sense} {goal.bound:g}"
        if not values:
            lines.append(f"{head}: not measured")
            continue
        missed = {k: v for k, v in values.items() if not goal.met(v)}
        worst = (max if goal.sense == "<=" else min)(values, key=values.get)
        tail = (
            "met"
            if not missed
            else "MISSED" + (f" at {len(missed)} of {len(values)}" if len(values) > 1 else "")
        )
        lines.append(f"{head}: {tail}; {'worst ' if len(values) > 1 else ''}{values[worst]:.3g} ({worst})")
    return "\n".join(lines)
