"""Run folders: atomic files, states, the lock. Processes that die are real processes that are killed."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from moabench.benchmarks.machine import files
from moabench.benchmarks.machine.files import StorageError
from moabench.benchmarks.run import folder as runs
from moabench.benchmarks.run.folder import Busy, RunFolder
from moabench.methods.spec import ConfigError


def folder_in(path: Path) -> RunFolder:
    return RunFolder(path, "arc-lora-tiny-s0", "ab12" * 16)


def done(folder: RunFolder) -> None:
    """What a run leaves that has come to its end."""
    files.write_json(folder.path / "metrics.json", {"eval/t@s:p/acc": 0.5})
    files.write_yaml(folder.path / "config.yaml", {"seed": 12})


HOLDER = """
import sys, time
from moabench.benchmarks.run.folder import RunFolder
with RunFolder(sys.argv[1], "arc-lora-tiny-s0", "ab12" * 16).claim() as state:
    print(state, flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the run."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline().strip() == "new"
    yield process
    process.kill()
    process.wait()


# ---- files


def test_a_failing_write_leaves_the_old_file_and_nothing_else(tmp_path):
    file = tmp_path / "metrics.json"
    files.write_json(file, {"a": 1})

    def half(path: Path) -> None:
        path.write_text('{"a"')
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(StorageError, match="the disk is full"):
        files.write(file, half)
    assert json.loads(file.read_text()) == {"a": 1}
    assert os.listdir(tmp_path) == ["metrics.json"]


def test_a_failing_folder_leaves_the_old_folder_and_nothing_else(tmp_path):
    files.write_folder(tmp_path / "adapter", lambda path: (path / "a").write_text("old") and None)

    def half(path: Path) -> None:
        (path / "a").write_text("ne")
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    with pytest.raises(StorageError, match="quota"):
        files.write_folder(tmp_path / "adapter", half)
    assert (tmp_path / "adapter" / "a").read_text() == "old"
    assert os.listdir(tmp_path) == ["adapter"]


def test_readers_never_see_half_a_file(tmp_path):
    """A writer that is killed at any moment leaves a whole old or new file."""
    code = """
import sys
from pathlib import Path
from moabench.benchmarks.machine import files
for i in range(10**9):
    files.write_json(Path(sys.argv[1]), {"i": i, "filling": ["x" * 100] * 2000})
"""
    file = tmp_path / "metrics.json"
    for _ in range(5):
        process = subprocess.Popen([sys.executable, "-c", code, str(file)])
        while not file.exists():
            time.sleep(0.01)
        time.sleep(0.1)
        process.kill()
        process.wait()
        assert len(json.loads(file.read_text())["filling"]) == 2000


def test_json_is_strict(tmp_path):
    files.write_json(tmp_path / "m.json", {"loss": float("nan"), "list": [float("inf"), 1.5]})
    assert json.loads((tmp_path / "m.json").read_text(), parse_constant=pytest.fail) == {
        "loss": None,
        "list": [None, 1.5],
    }


def test_parquet_rows_may_differ_in_keys_and_hold_lists(tmp_path):
    files.write_parquet(tmp_path / "t.parquet", [{"a": 1, "choices": ["x", "y"]}, {"a": 2, "b": "z"}])
    table = pd.read_parquet(tmp_path / "t.parquet")
    assert list(table["a"]) == [1, 2] and list(table["choices"][0]) == ["x", "y"] and table["b"][1] == "z"
    files.write_parquet(tmp_path / "empty.parquet", [])
    assert len(pd.read_parquet(tmp_path / "empty.parquet")) == 0


# ---- states


def test_states(tmp_path):
    folder = folder_in(tmp_path)
    assert folder.state() == "new"
    with folder.claim() as found:
        assert found == "new" and folder.state() == "running"
        done(folder)
    assert folder.state() == "finished"
    with folder.claim() as found:
        assert found == "finished"
    assert folder.status()["attempt"] == 1
    assert folder.status()["hash"] == folder.hash


def test_a_failed_run_keeps_its_reason_when_it_is_tried_again(tmp_path):
    folder = folder_in(tmp_path)
    with pytest.raises(ZeroDivisionError), folder.claim():
        _ = 1 / 0
    assert folder.state() == "failed" and "division by zero" in folder.status()["reason"]
    with folder.claim() as found:
        assert found == "failed"
        done(folder)
    status = folder.status()
    assert status["state"] == "finished" and status["attempt"] == 2
    assert "division by zero" in status["before"][0]["reason"] and "reason" not in status


@pytest.mark.parametrize("error", [KeyboardInterrupt(), StorageError("cannot write x: the disk is full.")])
def test_interrupted(tmp_path, error):
    folder = folder_in(tmp_path)
    with pytest.raises(type(error)), folder.claim():
        raise error
    assert folder.state() == "interrupted"
    with folder.claim() as found:
        assert found == "interrupted"


def test_a_config_error_leaves_nothing_of_a_new_run(tmp_path):
    folder = folder_in(tmp_path)
    with pytest.raises(ConfigError), folder.claim():
        raise ConfigError("bad")
    assert not folder.path.exists()
    with pytest.raises(KeyboardInterrupt), folder.claim():
        raise KeyboardInterrupt
    with pytest.raises(ConfigError), folder.claim():
        raise ConfigError("bad")
    assert folder.state() == "failed", "a run that has work in it is kept"


def test_status_names_no_machine_and_no_process(tmp_path):
    folder = folder_in(tmp_path)
    with folder.claim():
        text = (folder.path / "status.json").read_text()
    assert os.uname().nodename not in text and f'"{os.getpid()}' not in text


def test_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="choose another runs_dir"), folder_in(tmp_path / "file").claim():
        pass
    assert os.listdir(tmp_path) == ["file"]


def test_names_are_safe():
    assert RunFolder("runs", "../a b/c", "f" * 64).path.parent == Path("runs")
    assert "/" not in RunFolder("runs", "../a b/c", "f" * 64).name


# ---- lock


def test_two_processes_never_share_a_run(tmp_path, holder):
    folder = folder_in(tmp_path)
    assert folder.state() == "running"
    with pytest.raises(Busy, match="another process"), folder.claim():
        pytest.fail("claimed a run that another process holds")
    assert folder.state() == "running"


def test_two_claims_in_one_process_never_share_a_run(tmp_path):
    with folder_in(tmp_path).claim():
        with pytest.raises(Busy), folder_in(tmp_path).claim():
            pytest.fail("claimed twice")
        done(folder_in(tmp_path))
    assert folder_in(tmp_path).state() == "finished"


def test_a_killed_owner_is_replaced_at_once(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    folder = folder_in(tmp_path)
    assert folder.status()["state"] == "running" and folder.state() == "interrupted"
    with folder.claim() as found:
        assert found == "interrupted"
        done(folder)
    assert folder.state() == "finished" and [entry["state"] for entry in folder.status()["before"]] == [
        "interrupted"
    ]


@pytest.mark.parametrize("age", [0.0, 1e6, -1e6], ids=["fresh", "long past", "of the future"])
def test_a_lock_of_another_machine_is_judged_by_its_heartbeat(tmp_path, monkeypatch, age):
    """Whatever its date says, since the clocks of two machines need not agree."""
    folder = folder_in(tmp_path)
    folder.path.mkdir()
    lock, date, now = folder.path / "lock", time.time() - age, [0.0]
    lock.write_text("0therone-12345678")
    os.utime(lock, (date, date))
    files.write_json(folder.path / "status.json", {"state": "running"})
    assert folder.state() == ("running" if age == 0 else "interrupted")

    def sleep(seconds: float, beats: bool) -> None:
        now[0] += seconds
        if beats and now[0] >= runs.HEARTBEAT_SECONDS:
            os.utime(lock, (date + now[0], date + now[0]))

    monkeypatch.setattr(runs.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(runs.time, "sleep", lambda seconds: sleep(seconds, beats=True))
    with pytest.raises(Busy, match="another machine"), folder.claim():
        pytest.fail("claimed a run whose owner lives")
    now[0] = 0.0
    monkeypatch.setattr(runs.time, "sleep", lambda seconds: sleep(seconds, beats=False))
    with folder.claim() as found:
        assert found == "interrupted"
    assert 3 * runs.HEARTBEAT_SECONDS <= now[0] <= 1.1 * runs.STALE_SECONDS


def test_the_heart_beats(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "HEARTBEAT_SECONDS", 0.01)
    folder = folder_in(tmp_path)
    with folder.claim():
        os.utime(folder.path / "lock", (0, 0))
        deadline = time.monotonic() + 30
        while (folder.path / "lock").stat().st_mtime == 0:
            assert time.monotonic() < deadline, "no heartbeat"
            time.sleep(0.01)


# ---- folders that are not whole


def test_a_run_that_says_finished_without_its_result_is_done_again(tmp_path):
    folder = folder_in(tmp_path)
    with folder.claim():
        done(folder)
    (folder.path / "metrics.json").unlink()
    assert folder.state() == "broken" and "metrics.json" in folder.status()["reason"]
    with folder.claim() as found:
        assert found == "broken"
        done(folder)
    assert folder.state() == "finished" and folder.status()["before"][0]["state"] == "broken"


def test_a_config_of_which_a_line_is_missing_is_no_config(tmp_path):
    """The rest is whole YAML, and another config."""
    folder = folder_in(tmp_path)
    with folder.claim():
        done(folder)
    (folder.path / "config.yaml").write_text("seed: 1")
    assert folder.state() == "broken" and "config.yaml" in folder.status()["reason"]


def test_what_is_being_removed_is_no_run(tmp_path, monkeypatch):
    """The folder is renamed first: a removal that is killed on the way leaves nothing that is found."""
    folder = folder_in(tmp_path)
    with folder.claim():
        done(folder)
    monkeypatch.setattr(files, "_remove", lambda path: None)  # killed before the first file was gone
    files.remove_folder(folder.path)
    assert runs.find(tmp_path) == [] and folder.state() == "new" and len(os.listdir(tmp_path)) == 1
    monkeypatch.undo()
    files.remove_unfinished(tmp_path)
    assert os.listdir(tmp_path) == []


def test_of_a_link_the_link_is_removed(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    files.remove_folder(tmp_path / "link")
    assert os.listdir(tmp_path) == ["there"]


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"a":' * 5000, '{"n": ' + "9" * 6000 + "}", "\ud800"])
def test_a_file_that_is_no_mapping_is_named_and_a_cache_made_anew(text, tmp_path, capsys):
    file = tmp_path / "x.json"
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(files.Unreadable, match=r"x\.json: cannot be read"):
        files.read_json(file)
    assert files.cached(file) is None and "x.json" in capsys.readouterr().err
    assert files.read_json(tmp_path / "none.json") is None
