"""A run folder of which any file is cut at any byte, or holds something else: never a traceback, never a
wrong answer, never a write outside of the folder.

Run: python -m pytest tests/benchmarks/test_fuzz.py
"""

import contextlib
import dataclasses
import io
import math
import shutil
import tempfile
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moabench.analysis import load
from moabench.analysis.cli import main as analysis
from moabench.benchmarks.command import cli
from moabench.benchmarks.config.overrides import composed
from moabench.benchmarks.fairness import budget
from moabench.benchmarks.machine import files
from moabench.benchmarks.run.folder import find, state_of
from moabench.benchmarks.run.reading import TABLES
from moabench.benchmarks.run.run import run
from moabench.methods.spec import ConfigError

WORDS = [
    "method=molora", "model=random_tiny", "train=smoke", "task=arc_easy", "data.eval_limit=8",
    "data.train_limit=32", "forgetting=none", "logger=none", "quiet=true", "device=cpu", "probe.times=1",
]  # fmt: skip
FOREIGN = [b"", b"{}", b"[]", b"null", b"3", b"\xff\xfe", b"PAR1", b'{"state": 3}', b"a: [", b"{" * 3000]
FOREIGN += [b'{"state": "finished"}', b'{"state": "finished", "attempt": "x", "before": [3]}']


def answer(config) -> dict:
    """The metrics of a run, but for times and memory."""
    metrics = run(config).metrics
    return {k: v for k, v in metrics.items() if not any(w in k for w in ("seconds", "per_second", "peak"))}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(config, runs_dir with one finished run, its answer, what is read of it)."""
    runs_dir = tmp_path_factory.mktemp("whole") / "runs"
    config = composed([*WORDS, f"runs_dir={runs_dir}"])
    metrics = answer(config)
    study = load(runs_dir)
    return config, runs_dir, metrics, study.runs, {name: getattr(study, name) for name in TABLES}


@contextlib.contextmanager
def copied(runs_dir: Path):
    """A copy of the runs, alone in a folder."""
    with tempfile.TemporaryDirectory() as scratch:
        yield Path(shutil.copytree(runs_dir, Path(scratch) / "runs"))
        assert [path.name for path in Path(scratch).iterdir()] == ["runs"], "written outside"


def part(run_dir: Path, choice: float) -> Path:
    """One of the files that stand side by side in a run folder."""
    there = sorted(path for path in run_dir.iterdir() if path.is_file() and path.name != "lock")
    return there[int(choice * len(there))]


def look(runs_dir: Path, name: str) -> str:
    """Every command that only reads, over a folder; what they said together."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        codes = [
            cli.main(["runs", "ls", str(runs_dir)]),
            cli.main(["runs", "show", name, "--runs", str(runs_dir)]),
            cli.main(["runs", "diff", name, name, "--runs", str(runs_dir)]),
            analysis(["table", str(runs_dir)]),
        ]
    assert set(codes) <= {0, 1, 2}
    return said.getvalue()


def judge(runs_dir: Path, broken: Path, whole: pd.DataFrame, tables: dict[str, pd.DataFrame]) -> None:
    """What is read is what was there, or the file is named."""
    said = look(runs_dir, broken.parent.name)
    assert "Traceback" not in said
    try:
        study = load(runs_dir)
    except ConfigError:
        return
    finished = study.finished
    if len(finished):
        for column in set(whole.columns) - {"path"}:
            mine, right = (t[column].iloc[0] if column in t else None for t in (finished, whole))
            known = column.startswith("environment.") and mine is None  # a part that is no result
            assert known or repr(mine) == repr(right), (broken.name, column, mine, right)
        for name, right in tables.items():
            found = getattr(study, name)
            lost = f"{name}.parquet" in set(study.skipped["file"])
            assert lost or found.astype(str).equals(right.astype(str)), (broken.name, name)
    else:
        assert broken.name in said + "".join(study.skipped["file"]), "not named"


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(choice=st.floats(0, 0.999), share=st.floats(0, 1, exclude_max=True))
def test_a_file_cut_at_any_byte(made, choice, share):
    _, runs_dir, _, whole, tables = made
    with copied(runs_dir) as copy:
        (run_dir,) = find(copy)
        file = part(run_dir, choice)
        file.write_bytes(file.read_bytes()[: math.floor(share * file.stat().st_size)])
        judge(copy, file, whole, tables)


@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(choice=st.floats(0, 0.999), content=st.sampled_from(FOREIGN) | st.binary(max_size=40) | st.none())
def test_a_file_that_holds_something_else_or_is_gone(made, choice, content):
    _, runs_dir, _, whole, tables = made
    with copied(runs_dir) as copy:
        (run_dir,) = find(copy)
        file = part(run_dir, choice)
        if content is None:
            file.unlink()
        else:
            file.write_bytes(content)
        if (run_dir / "status.json").exists():
            judge(copy, file, whole, tables)


@pytest.mark.parametrize("name", ["status.json", "metrics.json", "config.yaml"])
def test_the_same_command_gives_the_same_answer(made, name):
    """Whatever was cut: what can be made anew is, what cannot be read is never the answer."""
    config, runs_dir, metrics, _, _ = made
    with copied(runs_dir) as copy:
        (run_dir,) = find(copy)
        file = run_dir / name
        file.write_bytes(file.read_bytes()[:-20])
        assert state_of(run_dir) == "broken"
        config = dataclasses.replace(config, runs_dir=str(copy))
        assert answer(config) == metrics and state_of(run_dir) == "finished"
        assert files.read_json(run_dir / "metrics.json")


def test_a_cache_that_is_cut_is_made_anew(tmp_path, capsys):
    config = composed([*WORDS, "budget=26.6k", f"runs_dir={tmp_path}"])
    first = budget.apply(config)[1]
    (file,) = tmp_path.glob(".budget/*.json")
    whole = file.read_bytes()
    file.write_bytes(whole[:-20])
    assert budget.apply(config)[1] == first and file.read_bytes() == whole
    assert file.name in capsys.readouterr().err
