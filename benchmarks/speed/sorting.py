"""Where sorting starts to pay on this machine: the constant c of `grouped.prefers_sorted`.

    python -m moabench.benchmarks.speed.sorting                  # c for fp32 and bf16, and the ratios that it
                                                                 was read
                                                     from; seconds
    python -m moabench.benchmarks.speed.sorting --width 256 --threads 2

Both forms run forward and backward in one process, interleaved; ratio = time of the dense form / time of the
sorted one, medians. c is where the ratio crosses 1 over (E - K) r / K, on a line through the logarithms.
Times are CPU time with one thread, else wall time.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from moabench.kernels import backend, grouped, lowrank

GRID = ((8, 1), (8, 2), (16, 1), (16, 2), (32, 1), (32, 2), (64, 1), (64, 2))
"""Experts and how many of them a token selects."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def dense(x: Tensor, a: Tensor, b: Tensor, ids: Tensor, weights: Tensor, scale: float, y: Tensor) -> Tensor:
    """The masked form of `grouped.grouped_lowrank`, as banks compute it: zeros in the weights [T, E], spread
    over rank rows by a GEMM."""
    experts = weights.shape[1]
    spread = (
        torch.eye(experts, dtype=x.dtype, device=x.device)
        .mul_(scale)
        .repeat_interleave(a.shape[0] // experts, dim=1)
    )
    return lowrank.expand_add_(y, [(lowrank.shrink(x, a) * weights.to(x.dtype).mm(spread), b)])


def ratio(
    tokens: int, width: int, experts: int, k: int, r: int, device: str, dtype: torch.dtype, rounds: int
) -> float:
    """Time of the dense form over that of the sorted one, forward and backward."""
    g = torch.Generator().manual_seed(0)
    shapes = ((tokens, width), (experts * r, width), (width, experts * r))
    x, a, b = (torch.randn(n, generator=g).to(device, dtype).requires_grad_() for n in shapes)
    ids = torch.rand(tokens, experts, generator=g).topk(k).indices.to(device)
    weights = torch.zeros(tokens, experts, device=device).scatter(1, ids, 1 / k).requires_grad_()
    gradient = torch.randn(tokens, width, generator=g).to(device, dtype)

    def step(form: Callable[..., Tensor]) -> float:
        start = _clock(device)
        y = form(x, a, b, ids, weights, 1.0, torch.zeros_like(gradient))
        torch.autograd.grad(y, (x, a, b, weights), gradient)
        return _clock(device) - start

    times = [(step(dense), step(grouped.grouped_lowrank)) for _ in range(rounds + 1)][1:]
    return statistics.median(d for d, _ in times) / statistics.median(s for _, s in times)


def crossing(points: list[tuple[float, float]]) -> str:
    """Where the ratio passes 1, of points ((E - K) r / K, ratio): a line through their logarithms by least
    squares. Nothing is said beyond the points: where one form wins at all of them, that c lies above or
    below."""
    if max(found for _, found in points) <= 1:
        return f"above {max(u for u, _ in points):.0f}"
    if min(found for _, found in points) >= 1:
        return f"below {min(u for u, _ in points):.0f}"
    logs = [(math.log(u), math.log(found)) for u, found in points]
    u, v = (statistics.fmean(values) for values in zip(*logs, strict=True))
    slope = sum((p - u) * (q - v) for p, q in logs) / sum((p - u) ** 2 for p, _ in logs)
    return f"{math.exp(u - v / slope):.0f}"


def main() -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(
        prog="moabench.benchmarks.speed.sorting", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--width", type=int, default=512, help="of the linear, in and out")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rank", type=int, default=8, help="of each expert")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(
        f"{backend.describe(args.device)}, torch {torch.__version__}, {args.threads} thread(s), width "
        f"{args.width}, {args.tokens} tokens"
    )
    for name in args.dtype:
        points = []
        for experts, k in GRID:
            found = ratio(
                args.tokens, args.width, experts, k, args.rank, args.device, DTYPES[name], args.rounds
            )
            points.append(((experts - k) * args.rank / k, found))
            print(
                f"  {name}  E {experts:3d}  K {k}  r {args.rank}  (E - K) r / K {points[-1][0]:5.0f}  "
                f"dense / sorted {found:.2f}"
            )
        stored = grouped.BREAK_EVEN.get((torch.device(args.device).type, DTYPES[name]))
        print(f"{name}: c here {crossing(points)}; stored {stored}")


def _clock(device: str) -> float:
    """Seconds: of this process's CPU with one thread on a CPU, wall time otherwise."""
    if torch.device(device).type != "cpu":
        torch.cuda.synchronize(device)
    elif torch.get_num_threads() == 1:
        return time.process_time()
    return time.perf_counter()


if __name__ == "__main__":
    main()
