"""Sending offline runs once each, with a fake sender; and W&B's own command, which has no login here."""

import threading

import pytest
from synthetic import write_run

from moabench.analysis import load
from moabench.analysis.push import MARKER, NotLoggedIn, pending, push, wandb_sync
from moabench.benchmarks.machine.files import RunError, read_json


def offline(run, stamp="20260101_000000"):
    folder = run / "wandb" / f"offline-run-{stamp}-abcd"
    folder.mkdir(parents=True)
    (folder / "run-abcd.wandb").write_bytes(b"")
    return folder


@pytest.fixture
def runs(tmp_path):
    made = [write_run(tmp_path, "lora", seed) for seed in range(4)]
    for run in made:
        offline(run)
    return made


def test_each_run_is_sent_once(runs, tmp_path, capsys):
    calls = []
    assert sorted(push(load(tmp_path), sync=calls.append)) == sorted(runs)
    assert len(calls) == 4 and all(
        read_json(run / MARKER)["folders"] == ["offline-run-20260101_000000-abcd"] for run in runs
    )
    assert push(load(tmp_path), sync=calls.append) == [] and len(calls) == 4
    assert "0 to send, 4 sent before" in capsys.readouterr().out


def test_a_run_made_again_is_sent_again_and_resumed_parts_go_together(runs, tmp_path):
    push(load(tmp_path), sync=lambda folders: None)
    offline(runs[0], "20260102_000000")
    calls = []
    assert push(load(tmp_path), sync=calls.append) == [runs[0]]
    assert [[folder.name[12:20] for folder in folders] for folders in calls] == [["20260101", "20260102"]]


def test_only_finished_runs_with_files_are_sent(tmp_path, capsys):
    offline(write_run(tmp_path, "lora", state="failed", reason="RunError: x"))
    write_run(tmp_path, "molora")
    assert push(load(tmp_path), sync=lambda folders: pytest.fail("nothing is to be sent")) == []
    assert "0 to send, 0 sent before, 1 without offline files, 1 not finished" in capsys.readouterr().out


def test_dry_run_sends_nothing(runs, tmp_path, capsys):
    assert push(load(tmp_path), dry_run=True, sync=lambda folders: pytest.fail("dry run")) == []
    assert capsys.readouterr().out.count("would send") == 4
    assert pending(runs[0]) is not None


def test_runs_are_sent_at_the_same_time(runs, tmp_path):
    """The three after the first meet: each waits for the other two."""
    meeting, first = threading.Barrier(3), threading.Event()

    def sync(folders):
        if first.is_set():
            meeting.wait(timeout=60)
        first.set()

    assert len(push(load(tmp_path), workers=3, sync=sync)) == 4


def test_what_fails_is_said_and_tried_again(runs, tmp_path, capsys):
    bad = sorted(runs)[1]
    with pytest.raises(RunError, match=f"1 of 4 runs were not sent .{bad.name}"):
        push(
            load(tmp_path), sync=lambda folders: "the network is gone" if bad in folders[0].parents else None
        )
    assert f"not sent {bad.name}: the network is gone" in capsys.readouterr().err
    assert push(load(tmp_path), sync=lambda folders: None) == [bad]


def test_without_a_login_it_stops_at_once(runs, tmp_path):
    calls = []

    def sync(folders):
        calls.append(folders)
        raise NotLoggedIn("no key")

    with pytest.raises(NotLoggedIn):
        push(load(tmp_path), sync=sync)
    assert len(calls) == 1 and not (runs[0] / MARKER).exists()


def test_wandbs_own_command_without_a_login(runs, tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "nobody"))
    monkeypatch.setenv("NETRC", str(tmp_path / "nobody" / "netrc"))
    with pytest.raises(NotLoggedIn, match="wandb login"):
        wandb_sync([runs[0] / "wandb" / "offline-run-20260101_000000-abcd"])
