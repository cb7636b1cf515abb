"""`moabench runs ...`: what lies in a folder of runs, and doing runs again.

    moabench runs ls [RUNS] [--where 'method == "lora" and seed < 3']     state, accuracy and disk use of each
                                                                          run
    moabench runs show RUN                                                 its result, command, attempts, disk
                                                                           use by part
    moabench runs diff RUN RUN                                             config keys and metrics in which
                                                                           two runs differ
    moabench runs rm RUN ... [--yes]                                       without --yes: what would be
                                                                           removed
    moabench runs retry [RUN ...]                                          failed and interrupted runs again,
                                                                           one after the other
    moabench runs rerun RUN                                                the same run anew, and whether its
                                                                           result is equal

RUN is a run folder, the name of one in --runs (default: runs), or at least six characters that one name or
hash there begins with.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from moabench.benchmarks.config.run import RunConfig
from moabench.benchmarks.config.sections import LoggerConfig
from moabench.benchmarks.machine import environment, files
from moabench.benchmarks.machine.terminal import shown
from moabench.benchmarks.run import folder as runs
from moabench.benchmarks.run import summary
from moabench.methods.spec import ConfigError, build, nearest

MEASURED = ("seconds", "per_second", "peak_bytes")
"""In the name of a metric or column: a time or memory, which no two runs have in common."""


def main(argv: Sequence[str]) -> int:
    """Run `moabench runs <argv>`; returns the exit code. Raises ConfigError and RunError."""
    given = _parser().parse_args(argv)
    return given.do(given)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="moabench runs", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, do, about, named in (
        ("ls", _ls, "list the runs", None),
        ("show", _show, "all about one run", 1),
        ("diff", _diff, "how two runs differ", 2),
        ("rm", _rm, "remove runs", "*"),
        ("retry", _retry, "do failed and interrupted runs again", "*"),
        ("rerun", _rerun, "repeat a finished run and compare", 1),
    ):
        command = commands.add_parser(name, help=about, description=about)
        command.set_defaults(do=do)
        if named:
            command.add_argument("run", nargs=named, metavar="RUN")
            command.add_argument(
                "--runs", default="runs", metavar="FOLDER", help="folder of run folders (default: runs)"
            )
        else:
            command.add_argument(
                "runs",
                nargs="?",
                default="runs",
                metavar="FOLDER",
                help="folder of run folders (default: runs)",
            )
        if name in ("ls", "rm", "retry"):
            command.add_argument(
                "--where",
                metavar="QUERY",
                help="only runs for which this holds: 'method == \"lora\" and seed < 3'",
            )
        if name == "rm":
            command.add_argument("--yes", action="store_true", help="remove them")
    return parser


# ---- finding


SHORTEST = 6
"""Characters of the beginning of a name: fewer name another run when there is one more."""


def _all(runs_dir: str | Path) -> list[Path]:
    """Every run folder. Raises ConfigError where there is no such folder."""
    folder = Path(runs_dir).expanduser()
    if not folder.is_dir():
        raise ConfigError(f"{str(runs_dir)!r} is no folder; expected a folder of run folders, as runs_dir.")
    return runs.find(folder)


def find(text: str, runs_dir: str | Path) -> Path:
    """The run folder that `text` names. Raises ConfigError with the nearest name."""
    path = Path(os.path.abspath(Path(text).expanduser()))
    if text and "hash" in runs.status_of(path):  # a file of that name alone makes no run of a folder
        return path
    there = {path.name: path for path in _all(runs_dir)}
    if text in there:
        return there[text]
    if len(text) < SHORTEST:
        raise ConfigError(
            f"run {text!r}: expected a whole name, or at least {SHORTEST} characters that one name or hash "
            "begins with."
        )
    found = [
        path
        for name, path in there.items()
        if name.startswith(text) or name.rpartition("-")[2].startswith(text)
    ]
    if len(found) == 1:
        return found[0]
    if found:
        raise ConfigError(
            f"run {text!r}: {len(found)} runs begin so, {', '.join(sorted(p.name for p in found)[:5])}; "
            "expected one."
        )
    raise ConfigError(f"run {text!r}: no such run in {runs_dir}.{nearest(text, there)}")


def _chosen(given: argparse.Namespace) -> list[Path]:
    """The runs that are named, or all; of them those for which --where holds."""
    named = [find(text, given.runs) for text in getattr(given, "run", ())]
    if not given.where:
        return named or _all(given.runs)
    from moabench.benchmarks.run.reading import load

    kept = load(*(named or [given.runs])).where(given.where).runs["path"]
    return [Path(path) for path in kept]


def size(path: Path) -> int:
    """Bytes of a file, or of all files below a folder; what vanishes meanwhile counts nothing."""
    total = 0
    for part in [path] if path.is_file() else path.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            total += part.stat().st_size if part.is_file() else 0
    return total


def config(path: Path) -> RunConfig:
    """The config of a run, from its folder. Raises ConfigError where this version cannot read it, and where
    it would run a model's own code."""
    return build(RunConfig, files.read_yaml(path / "config.yaml") or {}).trusting()


# ---- commands


def _ls(given: argparse.Namespace) -> int:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    found = _chosen(given)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name, justify in (
        ("run", "left"),
        ("state", "left"),
        ("ended", "left"),
        ("accuracy %", "right"),
        ("MB", "right"),
    ):
        table.add_column(name, justify=justify, no_wrap=True)
    total, lines = 0, []
    for path in found:
        status, state, used = runs.status_of(path), runs.state_of(path), size(path)
        metrics = (files.read_json(path / "metrics.json") or {}) if state == "finished" else {}
        accuracy, name = summary.accuracy(metrics), shown(path.name)
        total += used
        if state in ("failed", "broken") and status.get("reason"):
            lines.append(shown(f"{path.name} {state}: {status['reason']}"))
        percent = "" if accuracy is None else f"{100 * accuracy:.1f}"
        table.add_row(Text(name), state, Text(shown(status.get("ended", ""))), percent, f"{used / 1e6:.1f}")
    console = Console(highlight=False)
    console.width = max(
        console.width, 60 + max((len(path.name) for path in found), default=0)
    )  # names are typed again: whole, always
    console.print(table)
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)
    console.print(f"{len(found)} runs, {total / 1e6:,.1f} MB", markup=False)
    return 0


def _show(given: argparse.Namespace) -> int:
    from moabench.benchmarks.command.again import command

    path = find(given.run[0], given.runs)
    status, state = runs.status_of(path), runs.state_of(path)
    if state == "finished":
        summary.show(path)
    plain = None if state == "broken" else files.read_yaml(path / "config.yaml")
    lines = [("state", state + (f": {status['reason']}" if status.get("reason") else ""))]
    lines += [
        ("before", f"{entry['state']} {entry.get('ended', '')} {entry.get('reason', '')}")
        for entry in status.get("before", [])
    ]
    described = {} if state == "broken" else files.read_json(path / "environment.json") or {}
    if changed := environment.changed(described):
        lines.append(("resumed", f"with other {', '.join(changed)}; environment.json has both"))
    lines += [
        (
            "command",
            (plain and command(plain))
            or "no command of this version composes it; config.yaml has the config",
        )
    ]
    parts = sorted(((size(part), part.name) for part in path.iterdir()), reverse=True)
    lines += [
        (
            "disk",
            ", ".join(f"{name} {used / 1e6:.1f} MB" for used, name in parts if used >= 5e4) or "under 0.1 MB",
        )
    ]
    for name, text in lines:
        print(f"  {name:<11} {shown(text.strip())}")
    return 0


def _diff(given: argparse.Namespace) -> int:
    paths = [find(text, given.runs) for text in given.run]
    for file, read in (("config.yaml", files.read_yaml), ("metrics.json", files.read_json)):
        for key, a, b in differences(*(read(path / file) or {} for path in paths)):
            if not any(word in key for word in MEASURED):
                print(shown(f"{key}: {_shown(a)} | {_shown(b)}"))
    return 0


def _rm(given: argparse.Namespace) -> int:
    if not given.run and not given.where:
        raise ConfigError("runs rm: expected the runs to be removed, or --where.")
    found = _chosen(given)
    if busy := [path.name for path in found if runs.state_of(path) == "running"]:
        raise ConfigError(
            f"runs rm: {', '.join(busy)} {'is' if len(busy) == 1 else 'are'} running; expected runs "
            "that nobody holds."
        )
    if given.yes and Path(given.runs).is_dir():
        files.remove_unfinished(Path(given.runs))  # of an earlier `rm` that was killed
    for path in found:
        used = size(path)
        if given.yes:
            with runs.hold(path):
                files.remove_folder(path)
        print(shown(f"{'removed' if given.yes else 'would remove'} {path} ({used / 1e6:.1f} MB)"))
    if found and not given.yes:
        print("--yes removes them")
    return 0


def _retry(given: argparse.Namespace) -> int:
    from moabench.benchmarks.run.run import run

    from .cli import report

    worst = 0
    for path in _chosen(given):
        if (state := runs.state_of(path)) not in ("failed", "interrupted", "broken"):
            if given.run:
                print(shown(f"{path.name} is {state}"), file=sys.stderr)
            continue
        try:
            outcome = run(dataclasses.replace(config(path), runs_dir=str(path.parent)))
            if outcome.folder.name != path.name:
                print(
                    shown(f"{path.name}: with this version of code or data it is another run, "),
                    outcome.folder.name,
                    file=sys.stderr,
                )
        except Exception as error:
            worst = max(worst, report(error, False, label=f"{path.name}: "))
    return worst


def _rerun(given: argparse.Namespace) -> int:
    from moabench.benchmarks.run.run import run

    path = find(given.run[0], given.runs)
    if runs.state_of(path) != "finished":
        raise ConfigError(f"runs rerun {path.name}: it is {runs.state_of(path)}; expected a finished run.")
    with tempfile.TemporaryDirectory() as scratch:
        again = run(
            dataclasses.replace(config(path), runs_dir=scratch, quiet=True, logger=LoggerConfig(kind="none"))
        ).folder
        environments = [files.read_json(folder / "environment.json") or {} for folder in (path, again)]
        for key, a, b in differences(*environments):
            print(shown(f"environment: {key}: {_shown(a)} | {_shown(b)}"))
        found = list(unequal(path, again))
        for line in found:
            print(shown(line))
    equal = "equal in every metric and table, but for times and memory"
    print(f"{path.name}: {f'{len(found)} differences' if found else equal}")
    return 1 if found else 0


def unequal(a: Path, b: Path) -> Iterator[str]:
    """In words, how the results of two run folders differ, times and memory left out."""
    import pandas as pd

    metrics = [
        {
            k: v
            for k, v in (files.read_json(path / "metrics.json") or {}).items()
            if not any(word in k for word in MEASURED)
        }
        for path in (a, b)
    ]
    yield from (f"{key}: {_shown(one)} | {_shown(other)}" for key, one, other in differences(*metrics))
    for name in sorted({file.name for path in (a, b) for file in path.glob("*.parquet")}):
        there = [path / name for path in (a, b)]
        if not all(file.is_file() for file in there):
            yield f"{name}: only one of the two has it"
            continue
        tables = [pd.read_parquet(file) for file in there]
        tables = [
            table[[c for c in table.columns if not any(word in c for word in MEASURED)]] for table in tables
        ]
        try:
            pd.testing.assert_frame_equal(*tables, check_exact=True)
        except AssertionError as error:
            yield f"{name}: {' '.join(str(error).split())[:160]}"


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(dotted key, value in a, value in b) where two nested mappings differ; a missing value is None."""
    from moabench.benchmarks.run.reading import flat

    one, other = flat(a), flat(b)
    return [
        (key, one.get(key), other.get(key))
        for key in dict.fromkeys((*one, *other))
        if one.get(key) != other.get(key)
    ]


def _shown(value: Any) -> str:
    return "-" if value is None else f"{value:.6g}" if isinstance(value, float) else f"{value}"
