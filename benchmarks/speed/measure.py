"""How the benchmark measures: time in interleaved rounds, launches, host waits, bytes saved for the backward,
and agreement.

A report is a tidy table, one row a measurement: what was measured (`Setting`, `case`, `rival`, `quantity`,
`unit`), its median and quartiles over n rounds, and the ratio to another rival of the same rounds.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moabench.benchmarks.machine.timing import Run, quartiles

Wanted = Callable[[str], bool]
"""Whether a rival of this name is to run."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 6e-2}
"""Largest relative RMS error by which a rival may differ from its reference."""


@dataclass(frozen=True)
class Setting:
    """Sizes shared by the rivals of one comparison. experts, rank and k are 0 where there are none or
    several."""

    level: str
    width: int
    dtype: str
    tokens: int
    experts: int
    rank: int
    k: int
    device: str


@dataclass(frozen=True)
class Options:
    """How to measure. rounds: timed ones; layers: of whole models; compiled: torch.compile's rivals too."""

    rounds: int
    wanted: Wanted
    layers: int
    compiled: bool


@dataclass(frozen=True)
class Row:
    """One measurement. case: the method or mixture; ratio: median, over the rounds, of this rival's value to
    that of `ratio_to`."""

    level: str
    width: int
    dtype: str
    tokens: int
    experts: int
    rank: int
    k: int
    device: str
    case: str
    rival: str
    quantity: str
    unit: str
    median: float
    q25: float
    q75: float
    n: int
    ratio_to: str
    ratio: float


@dataclass
class Report:
    """All rows of one call, and what kept a rival from running or agreeing."""

    rows: list[Row] = field(default_factory=list)
    disagreements: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def add(
        self,
        setting: Setting,
        case: str,
        rival: str,
        quantity: str,
        unit: str,
        values: list[float],
        ratio_to: str = "",
        reference: list[float] | None = None,
    ) -> Row:
        """One more row from the values of all rounds, and those of the rival it is compared with."""
        q25, median, q75 = quartiles(values)
        ratio = (
            statistics.median(a / b for a, b in zip(values, reference, strict=True))
            if reference
            else float("nan")
        )
        row = Row(
            **asdict(setting),
            case=case,
            rival=rival,
            quantity=quantity,
            unit=unit,
            median=median,
            q25=q25,
            q75=q75,
            n=len(values),
            ratio_to=ratio_to,
            ratio=ratio,
        )
        self.rows.append(row)
        return row

    def find(self, **where: object) -> list[Row]:
        """Rows that have all the given values."""
        return [row for row in self.rows if all(getattr(row, k) == v for k, v in where.items())]

    def check(self, what: str, error: float, dtype: torch.dtype) -> None:
        """Note a disagreement where `error` is above the bound of dtype, NaN included."""
        if not error < BOUNDS[dtype]:
            self.disagreements.append(
                f"{what}: relative RMS error {error:.1e}, expected below {BOUNDS[dtype]:g}"
            )

    def write(self, path) -> None:
        """The rows as CSV."""
        import csv

        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [f.name for f in fields(Row)])
            writer.writeheader()
            writer.writerows(asdict(row) for row in self.rows)


def graphed(run: Run) -> Run:
    """`run` captured as a CUDA graph and replayed: no launch costs. Raises what CUDA raises where `run` waits
    for the host."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


# What a pass does besides taking time

WAITS = (
    "nonzero", "_local_scalar_dense", "masked_select", "bincount", "_unique", "_unique2", "unique_dim",
    "unique_consecutive",
    "unique_dim_consecutive", "histc", "equal", "is_nonzero",
)  # fmt: skip
"""aten operators whose result the host must read (a value, or the size of an output), by their base name."""
INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put")


def waits(func: torch._ops.OpOverload, args: tuple) -> bool:
    """Whether an operator makes the host wait for the device, or would on a GPU."""
    name = func._schema.name.removeprefix("aten::")
    if name == "repeat_interleave":  # repeats as a tensor, without the size of the output
        return True
    masks = args[1] if name in INDEXING and len(args) > 1 else ()
    return name in WAITS or any(isinstance(t, Tensor) and t.dtype in (torch.bool, torch.uint8) for t in masks)


class Counted(TorchDispatchMode):
    """Counts what runs inside: `launches` (operators that are neither views nor bare allocations, a proxy for
    kernel launches) and `waits`, both by operator name."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        bare = func.is_view or name.startswith(
            ("aten.empty", "aten.new_empty", "aten.detach", "aten._unsafe_view", "aten.sym_", "prim.")
        )
        self.launches[name] += not bare
        if waits(func, args):
            self.waits[name] += 1
        return func(*args, **(kwargs or {}))


def launches_and_waits(run: Run) -> tuple[int, int]:
    """Operators launched and host waits of one call."""
    with Counted() as counted:
        run()
    return counted.launches.total(), counted.waits.total()


@contextmanager
def saved_storages() -> Iterator[dict[int, int]]:
    """Bytes of each storage kept for the backward by what runs inside, by address; a storage counts once. The
    storages are kept alive until the block ends, so that no address serves twice."""
    found, alive = {}, []

    def pack(t: Tensor) -> Tensor:
        found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        alive.append(t.detach())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        yield found
    alive.clear()


# Agreement


def relative_error(got: Tensor, want: Tensor) -> float:
    """RMS error relative to the RMS of `want`, in fp64."""
    want = want.detach().double()
    return ((got.detach().double().to(want.device) - want).norm() / want.norm().clamp_min(1e-300)).item()


def largest_error(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    """Largest relative RMS error over the tensors of a reference; NaN where one is not there or not
    finite."""
    errors = [
        relative_error(got[name], t) if got.get(name) is not None else float("nan")
        for name, t in want.items()
    ]
    return float("nan") if any(e != e for e in errors) else max(errors)
