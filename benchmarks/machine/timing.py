"""Times that can be compared: rivals in one process, one after the other in every round."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

Run = Callable[[], object]


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    if len(values) == 1:
        return (values[0],) * 3
    return tuple(statistics.quantiles(values, n=4, method="inclusive"))


def interleaved(
    rivals: dict[str, Run], rounds: int, device: torch.device, warm_up: int = 1
) -> dict[str, list[float]]:
    """Seconds of each rival in each round. Every round runs all rivals, one after the other, so that a
    disturbance meets them all.

    On a CPU with one thread, CPU time of the process, so that others on the machine count less; with more
    threads, wall time. On CUDA, the device's time between two events; the host waits once a round, outside of
    what is timed.
    """
    seconds: dict[str, list[float]] = {name: [] for name in rivals}
    for i in range(warm_up + rounds):
        for name, value in (_cuda_round if device.type == "cuda" else _cpu_round)(rivals).items():
            if i >= warm_up:
                seconds[name].append(value)
    return seconds


def _cpu_round(rivals: dict[str, Run]) -> dict[str, float]:
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    found = {}
    for name, run in rivals.items():
        start = clock()
        run()
        found[name] = clock() - start
    return found


def _cuda_round(rivals: dict[str, Run]) -> dict[str, float]:
    events = {}
    for name, run in rivals.items():
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        events[name] = start, end
    torch.cuda.synchronize()
    return {name: start.elapsed_time(end) / 1e3 for name, (start, end) in events.items()}
