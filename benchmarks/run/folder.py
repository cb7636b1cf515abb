"""Run folders: found again when finished, resumed when interrupted, never shared by two processes, never
half-written.

    <runs_dir>/<task>-<method>-<model>-s<seed>-<hash>/
        config.yaml  status.json  metrics.json  history.parquet  routing.parquet  samples.parquet  adapter/
                     environment.json

`status.json` is the state (running, finished, failed with its reason, interrupted). A folder whose status
cannot be read, or that says finished and lacks its result, is broken: it is named, and its run is done again.
config.yaml, of which a part can be whole YAML, is compared with the digest in status.json.

The lock is a file that the owner holds by flock, which the kernel lets go when the owner dies, however it
dies. For file systems whose flock does not reach other machines there is the owner's heartbeat, the lock
file's mtime: a lock taken on another machine is dead when its heartbeat has stopped, which is seen by
watching it, since two clocks need not agree.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import os
import secrets
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from moabench.benchmarks.machine.files import (
    RunError,
    StorageError,
    Unreadable,
    read_json,
    remove_folder,
    remove_unfinished,
    storage_error,
    write_json,
)
from moabench.methods.spec import ConfigError

HEARTBEAT_SECONDS = 10.0
STALE_SECONDS = 120.0
"""A lock of another machine that was watched for so long without a heartbeat is dead; three heartbeats do
where its date, too, says so."""

State = Literal["new", "running", "finished", "failed", "interrupted", "broken"]


class Busy(RunError):
    """Another process is doing this run."""


class RunFolder:
    """The folder of one run; `hash` is the whole hash of its config."""

    def __init__(self, runs_dir: str | Path, name: str, hash: str):
        self.name = f"{_safe(name)}-{hash[:8]}"
        self.path = Path(runs_dir).expanduser() / self.name
        self.hash = hash

    def status(self) -> dict[str, Any]:
        """As `status_of` its folder."""
        return status_of(self.path)

    def state(self) -> State:
        """As `state_of` its folder."""
        return state_of(self.path)

    def metrics(self) -> dict[str, Any]:
        return read_json(self.path / "metrics.json") or {}

    @contextlib.contextmanager
    def claim(self) -> Iterator[State]:
        """Hold the run; gives the state in which it was found ('finished' included: somebody may have
        finished it just now).

        The run of a broken folder is done from the start. Leaving normally records 'finished'; Ctrl-C and a
        full disk 'interrupted'; an error 'failed' with its reason. A config error in a run that was new
        leaves nothing behind. Raises Busy if another process holds the run.
        """
        with hold(self.path) as owner:
            remove_unfinished(self.path)
            found = self.status()
            if found["state"] == "finished":
                yield "finished"
                return
            state: State = "interrupted" if found["state"] == "running" else found["state"]
            record = {
                "hash": self.hash,
                "owner": owner,
                "attempt": found.get("attempt", 0) + 1,
                "started": _now(),
            }
            if state != "new":
                earlier = {key: found[key] for key in ("reason", "started", "ended") if key in found}
                record["before"] = [*found.get("before", []), {"state": state, **earlier}]
            try:
                self._record(record, "running")
                yield state
                self._record(record, "finished")
            except BaseException as error:
                self._record_error(record, error, new=state == "new")
                raise

    def _record_error(self, record: dict[str, Any], error: BaseException, new: bool) -> None:
        recorded = (self.path / "status.json").exists()
        if new and (isinstance(error, ConfigError) or not recorded):
            remove_folder(self.path)
            return
        state: State = (
            "failed"
            if isinstance(error, Exception) and not isinstance(error, StorageError)
            else "interrupted"
        )
        with contextlib.suppress(
            StorageError
        ):  # a full disk cannot record that it is full; the first error is the one that counts
            self._record(record, state, reason=f"{type(error).__name__}: {error}".rstrip(": "))

    def _record(self, record: dict[str, Any], state: State, **more: Any) -> None:
        ended = {} if state == "running" else {"ended": _now(), "config": _digest(self.path / "config.yaml")}
        write_json(self.path / "status.json", {"state": state, **record, **ended, **more})


def state_of(path: Path) -> State:
    """The state of the run in a folder; one that says 'running' but that nobody holds was interrupted."""
    state = status_of(path)["state"]
    return "interrupted" if state == "running" and not is_held(path / "lock") else state


def status_of(path: Path) -> dict[str, Any]:
    """What status.json says, with `state` 'new' where there is none and 'broken', with the reason, where the
    folder cannot be what it says."""
    try:
        status = read_json(path / "status.json")
        if status is None:
            return {"state": "new"}
        _check(status, path)
    except Unreadable as error:
        return {"state": "broken", "reason": error.said(path)}
    reason = _lacks(path, status)
    return status | {"state": "broken", "reason": reason} if reason else status


def _check(status: dict[str, Any], path: Path) -> None:
    """Raises Unreadable for a mapping that is no status."""
    before = status.get("before", [])
    if not (
        status.get("state") in ("running", "finished", "failed", "interrupted")
        and isinstance(status.get("attempt", 0), int)
        and isinstance(before, list)
        and all(isinstance(entry, dict) and isinstance(entry.get("state"), str) for entry in before)
    ):
        raise Unreadable(f"{path / 'status.json'}: cannot be read (no status of a run).")


def _lacks(path: Path, status: dict[str, Any]) -> str | None:
    """Why the folder cannot be what its status says; None where it can."""
    try:
        if status["state"] == "finished" and read_json(path / "metrics.json") is None:
            return "metrics.json: the run says that it is finished but has none."
    except Unreadable as error:
        return error.said(path)
    if status.get("config") and status["config"] != _digest(path / "config.yaml"):
        return "config.yaml: not what the run has written."
    return None


def _digest(file: Path) -> str | None:
    """SHA-256 (16 hex digits) of a file; None where there is none."""
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()[:16]
    except OSError:
        return None


def find(runs_dir: str | Path) -> list[Path]:
    """The run folders of `runs_dir`, sorted by name; one with a dot is being written or removed."""
    return sorted(p.parent for p in Path(runs_dir).glob("*/status.json") if not p.parent.name.startswith("."))


def _safe(name: str) -> str:
    return (
        "".join(c if c.isalnum() or c in "-_.@" else "_" for c in name)
        .lstrip(".")
        .encode()[:100]
        .decode(errors="ignore")
    )


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


@functools.cache
def _machine() -> str:
    """Tells machines apart without naming them: a hash of the boot id, which also changes with every boot."""
    try:
        identity = Path("/proc/sys/kernel/random/boot_id").read_bytes()
    except OSError:
        import uuid

        identity = str(uuid.getnode()).encode()
    return hashlib.sha256(identity).hexdigest()[:8]


@contextlib.contextmanager
def hold(folder: Path) -> Iterator[str]:
    """Hold `<folder>/lock`; gives the owner's token. Raises Busy."""
    file, owner = folder / "lock", f"{_machine()}-{secrets.token_hex(4)}"
    descriptor = _open_and_flock(file)
    stop = threading.Event()
    try:
        if _elsewhere(descriptor) and _beats(file, descriptor):
            raise Busy(f"{folder} is being run by another machine.")
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, owner.encode(), 0)
        beat = threading.Thread(target=_beat, args=(descriptor, stop), daemon=True)
        beat.start()
        try:
            yield owner
        finally:
            stop.set()
            beat.join()
            os.ftruncate(descriptor, 0)  # an empty lock file is nobody's, on every machine
    finally:
        os.close(descriptor)


def _open_and_flock(file: Path) -> int:
    """Descriptor of the lock file, exclusively locked."""
    for attempt in range(5):
        if attempt:
            time.sleep(0.05)  # somebody may only be looking (`is_held`), or be removing the folder
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise storage_error(error, file.parent) from error
        with contextlib.suppress(BlockingIOError, FileNotFoundError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), file.stat()):
                return descriptor
        os.close(descriptor)
    raise Busy(f"{file.parent} is being run by another process.")


def _beat(descriptor: int, stop: threading.Event) -> None:
    while not stop.wait(HEARTBEAT_SECONDS):
        with contextlib.suppress(OSError):
            os.utime(descriptor)


def _elsewhere(descriptor: int) -> bool:
    """Whether the lock file was left by, or is held on, another machine."""
    owner = os.pread(descriptor, 64, 0).decode(errors="replace")
    return bool(owner) and owner.partition("-")[0] != _machine()


def _fresh(descriptor: int) -> bool:
    """Whether the last heartbeat is near to the time of this machine, whose clock may be another."""
    return abs(time.time() - os.fstat(descriptor).st_mtime) < STALE_SECONDS


def _beats(file: Path, descriptor: int) -> bool:
    """Whether the heart of a lock of another machine beats, by watching it."""
    seconds = STALE_SECONDS if _fresh(descriptor) else 3 * HEARTBEAT_SECONDS
    print(f"{file} was taken by another machine; watching it for {seconds:.0f} seconds", file=sys.stderr)
    first, end = file.stat().st_mtime_ns, time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(seconds / 60)
        # Opened anew: a file system of several machines looks at the server then.
        with contextlib.suppress(FileNotFoundError), file.open("rb") as again:
            if os.fstat(again.fileno()).st_mtime_ns != first:
                return True
    return False


def is_held(file: Path) -> bool:
    """Whether a living process holds the lock file, as far as one look tells; `hold` looks longer at a lock
    of another machine."""
    try:
        descriptor = os.open(file, os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return _elsewhere(descriptor) and _fresh(descriptor)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
