"""`moabench runs`: listing, showing, comparing, removing, retrying and repeating runs.

Run: python -m pytest tests/benchmarks/test_housekeeping.py
"""

import dataclasses
import shutil

import pytest
import yaml
from test_config import composed

from moabench.analysis.cli import main as analysis
from moabench.benchmarks.command import cli
from moabench.benchmarks.command import runs as housekeeping
from moabench.benchmarks.config.choices import groups
from moabench.benchmarks.config.run import RunConfig, run_hash
from moabench.benchmarks.machine import files
from moabench.benchmarks.run import run as experiment
from moabench.benchmarks.run.out_of_memory import OutOfMemory
from moabench.methods.spec import ConfigError, build

SMALL = [
    "model=random_tiny",
    "train=smoke",
    "task=arc_easy",
    "data.eval_limit=8",
    "data.train_limit=32",
    "forgetting=none",
    "logger=none",
]


def made(tmp_path, *more):
    return composed(*SMALL, "quiet=true", "device=cpu", *more, f"runs_dir={tmp_path}")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A folder with runs of two seeds of molora."""
    folder = tmp_path_factory.mktemp("runs")
    for seed in (0, 1):
        experiment.run(made(folder, "method=molora", f"seed={seed}", "probe.times=1"))
    return folder


@pytest.fixture
def runs_dir(two, tmp_path):
    """A copy to change."""
    return shutil.copytree(two, tmp_path / "runs")


def ended(*argv) -> int:
    return cli.main(["runs", *map(str, argv)])


@pytest.mark.parametrize("method", groups()["method"])
def test_config_yaml_is_the_whole_config(method, tmp_path):
    cfg = composed(
        f"method={method}",
        "train=paper",
        "task=[arc,gsm8k]",
        "+mix.parts={gsm8k: {cap: 10}}",
        "budget.size=lora_r64",
    )
    files.write_yaml(tmp_path / "config.yaml", cfg.to_dict())
    again = housekeeping.config(tmp_path)
    assert again.to_dict() == cfg.to_dict() and run_hash(again) == run_hash(cfg)


def test_ls(runs_dir, capsys):
    assert ended("ls", runs_dir) == 0
    out = capsys.readouterr().out
    assert (
        "arc_easy-molora-random_tiny-s0" in out
        and "arc_easy-molora-random_tiny-s1" in out
        and "2 runs" in out
    )
    assert ended("ls", runs_dir, "--where", "seed == 1") == 0
    out = capsys.readouterr().out
    assert "-s0-" not in out and "1 runs" in out


def test_show(runs_dir, capsys):
    assert ended("show", "arc_easy-molora-random_tiny-s1", "--runs", runs_dir) == 0
    out = capsys.readouterr().out
    assert (
        "molora on random_tiny" in out
        and "state       finished" in out
        and "python run.py" in out
        and "disk" in out
    )


def test_diff_names_what_differs_and_nothing_else(runs_dir, capsys):
    a, b = sorted(path for path in runs_dir.iterdir() if path.name.startswith("arc"))
    assert ended("diff", a, b) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "seed: 0 | 1" and all("seconds" not in line for line in lines)
    assert ended("diff", a, a) == 0 and capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["show", "arc_easy-molora"], "2 runs begin so"),
        (["show", "arc_easy-molra-random_tiny-s0"], "Did you mean 'arc_easy-molora-random_tiny-s0"),
        (["rm"], "expected the runs to be removed, or --where"),
        (["rm", ""], "run '': expected a whole name, or at least 6 characters"),
        (["rm", "a", "--yes"], "run 'a': expected a whole name, or at least 6 characters"),
        (["rm", "arc_e", "--yes"], "at least 6 characters"),
        (["show", "."], "at least 6 characters"),
        (["rm", "--where", "sed == 1"], "Did you mean 'seed'"),
    ],
)
def test_bad_input_is_one_line(argv, message, runs_dir, capsys):
    assert ended(*argv, "--runs", runs_dir) == 2
    err = capsys.readouterr().err.strip()
    assert err.count("\n") == 0 and err.startswith("error: ") and message in err


@pytest.mark.parametrize(
    "argv", [["ls"], ["rm", "--where", "seed == 0", "--runs"], ["show", "abcdef", "--runs"]]
)
def test_a_folder_that_is_not_there_is_an_error(argv, tmp_path, capsys):
    assert ended(*argv, tmp_path / "nope") == 2
    err = capsys.readouterr().err
    assert "nope" in err and "is no folder" in err and err.count("\n") == 1


@pytest.mark.parametrize("name", ["status.json", "metrics.json", "config.yaml", "environment.json"])
def test_one_cut_file_costs_its_own_row_and_is_named(name, runs_dir, capsys):
    bad, good = sorted(runs_dir.glob("arc*"))
    text = (bad / name).read_text()
    (bad / name).write_text(text[: len(text) // 2])
    assert ended("ls", runs_dir) == 0
    out = capsys.readouterr().out
    assert good.name in out and "2 runs" in out
    if name != "environment.json":  # it holds no result
        assert f"{bad.name} broken: {name}: " in out
        assert ended("show", bad.name, "--runs", runs_dir) == 0 and "broken" in capsys.readouterr().out
        assert ended("rerun", bad.name, "--runs", runs_dir) == 2
    assert ended("show", good.name, "--runs", runs_dir) == 0
    assert analysis(["table", str(runs_dir)]) == 0
    assert f"{name}: " in capsys.readouterr().err.split("runs are finished")[1]
    assert ended("rm", bad.name, "--runs", runs_dir, "--yes") == 0
    assert [path.name for path in runs_dir.glob("arc*")] == [good.name]


def test_a_broken_run_and_a_broken_cache_are_made_anew(runs_dir, capsys):
    (path,) = runs_dir.glob("arc_easy-molora-random_tiny-s1*")
    metrics = files.read_json(path / "metrics.json")
    (path / "metrics.json").unlink()
    assert ended("retry", path.name, "--runs", runs_dir) == 0
    again = files.read_json(path / "metrics.json")
    assert again["train/loss_task"] == metrics["train/loss_task"]
    assert files.read_json(path / "status.json")["before"][-1]["state"] == "broken"


def test_rm_takes_what_an_earlier_one_left(runs_dir):
    (path,) = runs_dir.glob("arc_easy-molora-random_tiny-s1*")
    path.rename(runs_dir / f".{path.name}.tmp")  # killed after the first step
    assert ended("rm", "--where", "seed == 0", "--runs", runs_dir, "--yes") == 0
    assert [file.name for file in runs_dir.iterdir() if path.name in file.name] == []


def test_nothing_of_a_foreign_run_reaches_the_terminal(runs_dir, capsys):
    (path,) = runs_dir.glob("arc_easy-molora-random_tiny-s1*")
    status = files.read_json(path / "status.json")
    files.write_json(
        path / "status.json", status | {"state": "failed", "reason": "\x1b]0;x\x07 [red]a[/b]\u202e"}
    )
    for argv in (["ls", runs_dir], ["show", path], ["diff", path, path], ["retry", "--where", "seed == 9"]):
        ended(*argv, *(["--runs", runs_dir] if argv[0] == "retry" else []))
        said = capsys.readouterr()
        assert not {"\x1b", "\x07", "\u202e"} & set(said.out + said.err), argv
    assert ended("ls", runs_dir) == 0 and "[red]a[/b]" in capsys.readouterr().out


def test_rm_removes_only_when_told(runs_dir, capsys):
    assert ended("rm", "--where", "seed == 0", "--runs", runs_dir) == 0
    assert "would remove" in capsys.readouterr().out and len(list(runs_dir.glob("arc*"))) == 2
    assert ended("rm", "--where", "seed == 0", "--runs", runs_dir, "--yes") == 0
    assert [path.name.split("-")[3] for path in runs_dir.glob("arc*")] == ["s1"]


def test_a_run_in_progress_is_not_removed(runs_dir, monkeypatch, capsys):
    monkeypatch.setattr(housekeeping.runs, "state_of", lambda path: "running")
    assert ended("rm", "--where", "seed == 0", "--runs", runs_dir, "--yes") == 2
    assert "is running" in capsys.readouterr().err and len(list(runs_dir.glob("arc*"))) == 2


def test_retry_does_the_failed_ones_again(runs_dir, monkeypatch, capsys):
    cfg = made(runs_dir, "method=lora", "probe.times=0")

    def full(*args, **kwargs):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: out of memory")

    monkeypatch.setattr(experiment, "_through", full)
    with pytest.raises(OutOfMemory):
        experiment.run(cfg)
    monkeypatch.undo()
    (path,) = runs_dir.glob("arc_easy-lora*")
    assert files.read_json(path / "status.json")["reason"].startswith("OutOfMemory: out of memory")
    assert ended("retry", "--runs", runs_dir) == 0
    status = files.read_json(path / "status.json")
    assert status["state"] == "finished" and status["before"][0]["reason"].startswith("OutOfMemory")
    assert ended("retry", path.name, "--runs", runs_dir) == 0 and "is finished" in capsys.readouterr().err


def test_rerun_says_that_a_result_is_equal(runs_dir, capsys):
    (path,) = runs_dir.glob("arc_easy-molora-random_tiny-s0*")
    for argv in (["runs", "rerun", path.name, "--runs", str(runs_dir)], ["--rerun", str(path)]):
        assert cli.main(argv) == 0
        assert "equal in every metric and table" in capsys.readouterr().out


def test_rerun_says_what_is_not_equal(runs_dir, capsys):
    (path,) = runs_dir.glob("arc_easy-molora-random_tiny-s0*")
    metrics = files.read_json(path / "metrics.json")
    files.write_json(path / "metrics.json", metrics | {"train/loss_task": metrics["train/loss_task"] + 1e-12})
    environment = files.read_json(path / "environment.json")
    files.write_json(path / "environment.json", environment | {"python": "2.7"})
    assert ended("rerun", path) == 1
    out = capsys.readouterr().out
    assert "environment: python: 2.7 |" in out and "train/loss_task:" in out and "1 differences" in out


@pytest.mark.parametrize(
    ("keep", "adapter", "checkpoints"),
    [("adapter", True, False), ("all", True, True), ("none", False, False)],
)
def test_what_is_kept(keep, adapter, checkpoints, tmp_path):
    cfg = made(tmp_path, "method=lora", f"keep={keep}", "probe.times=0")
    folder = experiment.run(cfg).folder
    assert (folder / "adapter").exists() == adapter and any(folder.glob("checkpoints/*")) == checkpoints
    assert run_hash(cfg) == run_hash(dataclasses.replace(cfg, keep="adapter")), (
        "what is kept changes no result"
    )


def test_a_config_of_another_version_is_refused(tmp_path):
    plain = composed("method=lora").to_dict() | {"no_such_key": 1}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(plain))
    with pytest.raises(ConfigError, match="no_such_key"):
        housekeeping.config(tmp_path)
    assert build(RunConfig, composed("method=lora").to_dict()).parsed_method.name == "lora"
