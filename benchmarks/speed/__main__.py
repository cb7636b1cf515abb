"""What a routed adapter costs: every rival in one process, interleaved, checked first, as ratios.

    python -m moabench.benchmarks.speed               # all levels, the device's own sizes
    python -m moabench.benchmarks.speed --quick       # small sizes, under a minute on a CPU
    python -m moabench.benchmarks.speed linear --width 1024 --dtype bf16 --rivals torch PEFT --out DIR
    python -m moabench.benchmarks.speed model --methods molora mixlora --width 512 --rounds 9

`mixture`  one mixture alone, against loops over its experts, a sorted grouped GEMM and torch.compile
`linear`   a frozen linear with a mixture, against PEFT's LoRA and the same forms
`ffn`      MixLoRA's feed-forward block, against the published and the plain form
`block`    a decoder layer, with the bytes that it saves for its backward
`model`    train step beside its FLOP floor, greedy decoding

On a CPU with one thread times are CPU time of the process, on CUDA the device's. Exit code 1 where rivals
disagree.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .measure import Report, Row


@dataclass(frozen=True)
class Sizes:
    """Widths by level and tokens, unless others are asked for."""

    widths: dict[str, tuple[int, ...]]
    tokens: tuple[int, ...]
    dtypes: tuple[str, ...] = ("fp32", "bf16")


CPU = Sizes(
    {
        "mixture": (256, 1024),
        "linear": (256, 1024),
        "ffn": (256, 1024),
        "block": (1024,),
        "model": (256, 512, 1024),
    },
    (2048,),
)
CUDA = Sizes(
    {"mixture": (4096,), "linear": (4096,), "ffn": (4096,), "block": (4096,), "model": (512,)},
    (64, 2400, 8192),
    ("bf16",),
)
LEVELS = tuple(CPU.widths)
QUICK = Sizes(dict.fromkeys(LEVELS, (128,)), (256,), ("bf16",))


class Wanted:
    """Which rivals to run: those whose names begin with one of `words`, or all. Remembers which words named
    none."""

    def __init__(self, words: list[str] | None) -> None:
        self.words, self.unused, self.seen = words, set(words or ()), set()

    def __call__(self, name: str) -> bool:
        self.seen.add(name)
        fitting = {w for w in self.words or () if name.startswith(w)}
        self.unused -= fitting
        return self.words is None or bool(fitting)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(
        "moabench.benchmarks.speed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("levels", nargs="*", metavar="level", help=f"{', '.join(LEVELS)}; default: all")
    parser.add_argument("--width", type=int, nargs="+", help="model width; default: by level and device")
    parser.add_argument("--dtype", nargs="+", choices=("fp32", "bf16"))
    parser.add_argument("--tokens", type=int, nargs="+")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--rank", type=int, default=8, help="of each expert")
    parser.add_argument("--k", type=int, default=2, help="experts a token, of top-k routers")
    parser.add_argument("--methods", nargs="+", help="methods of conf/method; default: by level")
    parser.add_argument(
        "--rivals", nargs="+", help="beginnings of rivals' names, e.g. torch PEFT loop; default: all"
    )
    parser.add_argument("--rounds", type=int, help="default: 9, with --quick 3")
    parser.add_argument("--layers", type=int, default=2, help="of the whole model")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="small sizes, few rounds, no torch.compile")
    parser.add_argument("--out", type=Path, help="folder for measurements.csv and ratios.png")
    args = parser.parse_args(argv)
    if unknown := [level for level in args.levels if level not in LEVELS]:
        parser.error(f"level {unknown[0]!r}: expected one of {', '.join(LEVELS)}")
    for key in ("experts", "rank", "k", "threads", "layers", "rounds"):
        if (value := getattr(args, key)) is not None and value < 1:
            parser.error(f"--{key} {value}: expected at least 1")
    if args.k > args.experts:
        parser.error(f"--k {args.k}: expected at most the number of experts, {args.experts}")
    args.levels = args.levels or list(LEVELS)
    args.rounds = args.rounds or (3 if args.quick else 9)
    args.error = parser.error
    return args


def main(argv: list[str] | None = None) -> int:
    """Command line; see the module's docstring."""
    args = arguments(argv)
    warnings.filterwarnings("ignore", category=FutureWarning)  # renamed arguments of transformers
    import torch

    from .goals import summary
    from .levels import METHODS, run
    from .measure import Options, Report, Setting

    if args.device == "cuda" and not torch.cuda.is_available():
        args.error("--device cuda: no CUDA device here")
    torch.set_num_threads(args.threads)
    sizes = QUICK if args.quick else CUDA if args.device == "cuda" else CPU
    report, wanted = Report(), Wanted(args.rivals)
    options = Options(args.rounds, wanted, args.layers, compiled=not args.quick)
    print(header(args))
    for level in args.levels:
        names = [n for n in METHODS[level] if args.methods is None or n in args.methods]
        for width in (args.width or sizes.widths[level]) if names else ():
            for dtype in args.dtype or sizes.dtypes:
                for tokens in args.tokens or sizes.tokens:
                    before = len(report.rows)
                    setting = Setting(
                        level, width, dtype, tokens, args.experts, args.rank, args.k, args.device
                    )
                    run(setting, report, names, options)
                    print(tables(report.rows[before:]), flush=True)
    known = {n for level in args.levels for n in METHODS[level]}
    if unknown := set(args.methods or ()) - known:
        args.error(f"--methods {', '.join(sorted(unknown))}: expected some of {', '.join(sorted(known))}")
    if wanted.unused:
        args.error(
            f"--rivals {', '.join(sorted(wanted.unused))}: no such rival; there were "
            f"{', '.join(sorted(wanted.seen))}"
        )
    print(f"\ngoals ({args.device})\n{summary(report, args.device)}")
    return finish(report, args.out)


def finish(report: Report, out: Path | None) -> int:
    """Write what was asked for, say what is missing or wrong; the exit code."""
    if out is not None:
        from .plot import draw

        out.mkdir(parents=True, exist_ok=True)
        report.write(out / "measurements.csv")
        draw(report, out / "ratios.png")
        print(f"\n{out / 'measurements.csv'}, {out / 'ratios.png'}")
    for line in report.left_out:
        print(f"not run: {line}")
    for line in report.disagreements:
        print(f"DISAGREES: {line}")
    return 1 if report.disagreements else 0


def header(args: argparse.Namespace) -> str:
    """Machine, versions and backend; a warning where the allocator is left at its default."""
    import peft
    import torch
    import transformers

    from moabench.kernels import backend

    machine = (
        torch.cuda.get_device_name()
        if args.device == "cuda"
        else f"{platform.machine()}, {args.threads} thread(s)"
    )
    versions = ", ".join(f"{m.__name__} {m.__version__}" for m in (torch, transformers, peft))
    lines = [
        f"{machine}; {versions}; backend auto: {backend.describe(args.device)}; E {args.experts}, r "
        f"{args.rank}, k {args.k}"
    ]
    if args.device == "cpu" and "MALLOC_TRIM_THRESHOLD_" not in os.environ:
        lines.append("MALLOC_TRIM_THRESHOLD_ is not set (see the Makefile): page faults will count as work")
    return "\n".join(lines)


def tables(rows: list[Row]) -> str:
    """The rows of one setting, a line a rival: time, ratio, and what else was measured of it."""
    lines = []
    if rows:
        lines.append(f"\n{rows[0].level}, {rows[0].width} wide, {rows[0].dtype}, {rows[0].tokens} tokens")
    for case, rival in dict.fromkeys((r.case, r.rival) for r in rows):
        cells = [cell(r) for r in rows if (r.case, r.rival) == (case, rival)]
        lines.append(f"  {case + ': ' + rival:34s} " + "   ".join(cells))
    return "\n".join(lines)


def cell(row: Row) -> str:
    """One measurement in a few characters."""
    if row.unit == "s":
        spread = f"{row.median * 1e3:.3g} ms ({row.q25 * 1e3:.3g}-{row.q75 * 1e3:.3g})"
        name = "" if row.quantity == "time" else row.quantity + " "
        return f"{name}{spread}" + (f" {row.ratio:.2f}x {row.ratio_to}" if row.ratio_to else "")
    return f"{row.quantity} {row.median:.4g}"


if __name__ == "__main__":
    sys.exit(main())
