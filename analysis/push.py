"""Send finished offline runs to W&B, several at a time, each once: `pushed.json` in a run folder says what
was sent.

W&B's own `wandb sync` does the sending, in a process a run. A run that was resumed has several offline
folders with one id, which are sent together, oldest first; a run that was made again after it was sent has a
new folder and is sent again.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from moabench.benchmarks.machine.files import RunError, read_json, write_json
from moabench.benchmarks.run.reading import Study

MARKER = "pushed.json"

Sync = Callable[[Sequence[Path]], str | None]
"""Sends offline folders of one run; None, or why not."""


class NotLoggedIn(RunError):
    """W&B has no key: no run can be sent."""


@dataclass(frozen=True)
class Pending:
    """Offline folders of a run that were not sent yet, oldest first."""

    run: Path
    folders: tuple[Path, ...]


def push(study: Study, dry_run: bool = False, workers: int = 4, sync: Sync | None = None) -> list[Path]:
    """Send what was not sent, print a line a run, return the runs sent. Raises RunError, after all others, if
    some could not be sent."""
    waiting, known = [], 0
    for path in map(Path, study.finished["path"]):
        found = pending(path)
        waiting += [found] if found else []
        known += found is None and (path / MARKER).is_file()
    without = len(study.finished) - len(waiting) - known
    unfinished = len(study.runs) - len(study.finished)
    print(
        f"{len(waiting)} to send, {known} sent before, {without} without offline files, {unfinished} "
        "not finished"
    )
    if dry_run:
        for item in waiting:
            print(f"would send {item.run.name}")
        return []
    return _send(waiting, workers, sync or wandb_sync)


def pending(run: Path) -> Pending | None:
    """What of a run is still to be sent; None if nothing is."""
    sent = set((read_json(run / MARKER) or {}).get("folders", []))
    folders = tuple(sorted(path for path in run.glob("wandb/offline-run-*") if any(path.glob("*.wandb"))))
    return Pending(run, folders) if {path.name for path in folders} - sent else None


def wandb_sync(folders: Sequence[Path]) -> str | None:
    """`wandb sync` of the folders. Raises NotLoggedIn."""
    command = [
        sys.executable,
        "-m",
        "wandb",
        "sync",
        "--include-synced",
        *(str(path.resolve()) for path in folders),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, stdin=subprocess.DEVNULL, cwd=folders[0].parent
    )
    text = " ".join((done.stdout + done.stderr).split())
    if "No API key" in text or "api_key not configured" in text:
        raise NotLoggedIn("W&B has no key for sending runs. Run `wandb login`, or set WANDB_API_KEY.")
    return None if done.returncode == 0 else text[-300:] or f"exit code {done.returncode}"


def _send(waiting: Sequence[Pending], workers: int, sync: Sync) -> list[Path]:
    if not waiting:
        return []
    sent, failed = [], []
    # The first alone: what keeps every run from being sent is then said once.
    for item, reason in _outcomes(waiting, workers, sync):
        if reason is None:
            write_json(item.run / MARKER, {"folders": [path.name for path in item.folders], "time": _now()})
            sent.append(item.run)
            print(f"sent {item.run.name}")
        else:
            failed.append(item.run.name)
            print(f"not sent {item.run.name}: {reason}", file=sys.stderr)
    if failed:
        raise RunError(
            f"{len(failed)} of {len(waiting)} runs were not sent ({', '.join(failed[:5])}); the same "
            "command tries these again."
        )
    return sent


def _outcomes(waiting: Sequence[Pending], workers: int, sync: Sync) -> Iterator[tuple[Pending, str | None]]:
    first, *rest = waiting
    yield first, sync(first.folders)
    with ThreadPoolExecutor(max(1, workers)) as pool:
        yield from zip(rest, pool.map(lambda item: sync(item.folders), rest), strict=True)


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
