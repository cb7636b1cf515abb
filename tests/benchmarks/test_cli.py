"""The command line as users meet it, in processes of its own: every bad input is one clear line, a failing
exit code, and nothing left."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moabench.benchmarks import tasks
from moabench.benchmarks.command import cli
from moabench.benchmarks.config import overrides
from moabench.benchmarks.config.choices import CONF, groups
from moabench.benchmarks.config.run import RunConfig
from moabench.benchmarks.run.folder import find
from moabench.methods.spec import ConfigError

REPOSITORY = Path(__file__).resolve().parents[2]
SMALL = ("model=random_tiny", "train=smoke", "data.eval_limit=4", "logger=none")


def moabench(*args: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    """`python run.py` with these arguments in the folder `cwd`, whose `runs` it uses."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "120"} | environment
    command = [sys.executable, str(REPOSITORY / "run.py"), *args]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


def only_error(done: subprocess.CompletedProcess, code: int) -> str:
    """The error line, which has to be all of stderr."""
    assert done.returncode == code, done.stdout + done.stderr
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    return lines[0]


BAD = {
    "method": (["method=moa_sparce"], "method=moa_sparce: no such method. Did you mean 'moa_sparse'?"),
    "task": (["task=ark"], "task='ark': no such task or suite. Did you mean 'arc'?"),
    "model": (["model=tinny"], "model=tinny: no such model. Did you mean 'tiny'?"),
    "choice of a sweep": (["-m", "method=lora,molra"], "Did you mean 'molora'?"),
    "data": (["data=bultin"], "Did you mean 'builtin'?"),
    "key": (["train.stpes=3"], "unknown key 'train.stpes' (value 3). Did you mean 'train.steps'?"),
    "top-level key": (["sed=3"], "Did you mean 'seed'?"),
    "group": (["mehtod=lora"], "Did you mean 'method'?"),
    "method's key": (["method=molora", "method.experts.rr=3"], "method.experts"),
    "key with a plus": (["+train.stpes=3"], "Did you mean 'train.steps'?"),
    "rank 0": (["method=lora", "method.experts.r=0"], "r=0: expected a whole number >= 1"),
    "rank -1": (["method=lora", "method.experts.r=-1"], "r=-1: expected a whole number >= 1"),
    "rank abc": (["method=lora", "method.experts.r=abc"], "r='abc': expected a whole number >= 1"),
    "top-k above experts": (
        ["method=moe_lora_topk", "method.router.k=99"],
        "method.router.k=99: expected at most the number of experts, 8",
    ),
    "option of another kind": (
        ["method=molora", "method.router.gamma_max=1"],
        "unknown key 'method.router.gamma_max'",
    ),
    "kind": (["method=molora", "method.router.kind=topp"], "Did you mean 'top_p'?"),
    "no data root": (["data=local"], "expects a folder"),
    "missing data root": (["data=local", "data.root=not/there"], "data.root='not/there': no such folder"),
    "model path": (["model.path=./not_there"], "model.path='./not_there': no folder"),
    "model without weights": (["model.path=empty_model"], "no config.json in empty_model"),
    "task of a list": (["task=[arc,arc_esy]"], "Did you mean 'arc_easy'?"),
    "task of a sweep": (["-m", "task=arc,[boolq,gms8k]"], "Did you mean 'gsm8k'?"),
    "protocol": (["protocol=lable"], "Did you mean 'label'?"),
    "mix": (["mix=math_mx"], "Did you mean 'math_mix'?"),
    "mix without its file": (["mix=math_14k"], "mix.file=path/to/math_14k.json"),
    "key of the world": (["data.world.hop=2"], "Did you mean 'data.world.hops'?"),
    "text of forgetting": (["forgetting=not_there.txt"], "forgetting='not_there.txt'"),
    "number": (["train.lr=fast"], "train.lr='fast': expected a number"),
    "no value": (["train.steps="], "train.steps=''"),
    "syntax": (["train.lr=["], "cannot read 'train.lr=['"),
    "no equal sign": (["lora"], "Expected key=value"),
    "launcher": (["-m", "hydra/launcher=ray", "seed=0,1"], "pip install"),
    "no such launcher": (["-m", "hydra/launcher=jobli", "seed=0,1"], "Could not find 'hydra/launcher/jobli'"),
    "interpolation": (["runs_dir=${nowhere}"], "nowhere"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(case, tmp_path):
    given, says = BAD[case]
    if case == "launcher" and overrides.installed("hydra_plugins.hydra_ray_launcher"):
        pytest.skip("the Ray launcher is installed")
    (tmp_path / "empty_model").mkdir()
    assert says in only_error(moabench(*given, cwd=tmp_path), code=2)
    assert os.listdir(tmp_path) == ["empty_model"]


def test_a_broken_line_of_data_is_named(tmp_path):
    folder = tmp_path / "data" / "arc_easy"
    folder.mkdir(parents=True)
    row = json.dumps({"id": "a", "question": "Which?", "choices": ["x", "y"], "label": 0})
    (folder / "train.jsonl").write_text(f"{row}\n{row[:20]}\n")
    (folder / "test.jsonl").write_text(f"{row}\n")
    done = moabench("task=arc_easy", "data=local", "data.root=data", cwd=tmp_path)
    assert re.search(r"data/arc_easy/train\.jsonl, line 2: not JSON", only_error(done, code=2))
    assert os.listdir(tmp_path) == ["data"]


def test_a_runs_dir_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    done = moabench(*SMALL, "runs_dir=file/runs", cwd=tmp_path)
    assert "cannot write file/runs" in only_error(done, code=1)
    done = moabench("-m", *SMALL, "seed=0,1", "runs_dir=file/runs", cwd=tmp_path)
    assert "cannot write file/runs" in only_error(done, code=1)
    assert os.listdir(tmp_path) == ["file"]


def test_a_device_that_is_not_there(tmp_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    done = moabench(*SMALL, "device=cuda:7", "quiet=true", cwd=tmp_path)
    assert "device='cuda:7': not present on this machine" in only_error(done, code=2)
    assert os.listdir(tmp_path / "runs") == []


def test_traceback_on_request(tmp_path):
    done = moabench("train.lr=0", "traceback=true", cwd=tmp_path)
    assert (
        done.returncode == 2
        and "Traceback" in done.stderr
        and done.stderr.splitlines()[-1].startswith("error: train.lr=0")
    )


def test_help_lists_every_choice(capsys):
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    for name in (*tasks.names(), *tasks.suites()):
        assert re.search(rf"\b{name}\b", text), f"task={name} is not in --help"
    for group, choices in groups().items():
        assert group in text
        for choice in choices:
            assert re.search(rf"\b{re.escape(choice)}\b", text), f"{group}={choice} is not in --help"
    assert "train." in text and "lr_full" in text


def test_the_examples_of_help_compose():
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    examples = re.search(r"examples:\n(.*?)\n\n", cli.help_text(), re.S).group(1).splitlines()
    assert len(examples) >= 5
    for example in examples:
        given = [
            re.sub(r"=([^\[,]*),.*", r"=\1", word)
            for word in overrides.prepare(re.findall(r"\S+=\S+", example))
        ]
        with initialize_config_dir(str(CONF), version_base="1.3"):
            RunConfig.from_composed(
                OmegaConf.to_container(compose("config", given), resolve=True), [w.lstrip("+") for w in given]
            )


def test_the_installed_command_is_the_same(tmp_path):
    command = Path(sys.executable).with_name("moabench")
    if not command.exists():
        pytest.skip("the package is not installed with its console command")
    done = subprocess.run([command, "--help"], cwd=tmp_path, capture_output=True, text=True)
    ours = moabench("--help", cwd=tmp_path)
    assert done.returncode == ours.returncode == 0
    assert done.stdout.replace("moabench", "X") == ours.stdout.replace("python run.py", "X").replace(
        "moabench", "X"
    )


def test_a_run_is_found_again(tmp_path):
    first = moabench(*SMALL, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    (folder,) = [p for p in (tmp_path / "runs").iterdir() if not p.name.startswith(".")]
    files = {
        "config.yaml",
        "status.json",
        "metrics.json",
        "history.parquet",
        "routing.parquet",
        "samples.parquet",
        "adapter",
        "environment.json",
    }
    assert files <= set(os.listdir(folder))
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.name != "lock"}
    again = moabench(*SMALL, cwd=tmp_path)
    assert again.returncode == 0 and again.stderr == ""
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.name != "lock"} == before
    table = re.compile(r"arc_easy +\d.*")
    assert table.search(first.stdout).group() == table.search(again.stdout).group()
    assert os.listdir(tmp_path) == ["runs"], "nothing beside the run folders"


BITSANDBYTES = """
import importlib, logging, sys
logging.getLogger("bitsandbytes.backends.cpu.ops").warning("Failed to load CPU gemm_4bit_forward")
sys.path.remove(__path__[0].rpartition("/")[0])
del sys.modules["bitsandbytes"]
sys.modules["bitsandbytes"] = importlib.import_module("bitsandbytes")
"""
"""The package with what it says when it is imported on a CPU with avx512_bf16."""


def test_quiet_says_nothing(tmp_path):
    pytest.importorskip("bitsandbytes")
    talkative = tmp_path / "path" / "bitsandbytes"
    talkative.mkdir(parents=True)
    (talkative / "__init__.py").write_text(BITSANDBYTES)
    done = moabench(*SMALL, "method=lora", "quiet=true", cwd=tmp_path, PYTHONPATH=str(talkative.parent))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_failing_job_does_not_stop_a_sweep(tmp_path):
    done = moabench("-m", *SMALL, "method=moe_lora_topk", "method.router.k=99,1", "quiet=true", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "[0] error: method.router.k=99: expected at most the number of experts, 8."
    ]
    (folder,) = [p for p in (tmp_path / "runs").iterdir() if not p.name.startswith(".")]
    assert json.loads((folder / "status.json").read_text())["state"] == "finished"


def test_a_killed_run_resumes_to_the_same_result(tmp_path):
    """`kill -9` after a checkpoint; the same command then ends with the metrics of a run that nobody
    disturbed."""
    args = (
        "model=random_tiny",
        "method=molora",
        "train.steps=60",
        "train.save_every=10",
        "train.batch_size=2",
        "data.eval_limit=4",
    )
    args += ("logger=none", "quiet=true", "++threads=1")
    whole = moabench(*args, "runs_dir=whole", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    command = [sys.executable, str(REPOSITORY / "run.py"), *args, "runs_dir=killed"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list(
        tmp_path.glob("killed/*/checkpoints/checkpoint-*/trainer_state.json")
    ):
        time.sleep(0.005)
    process.kill()
    process.wait()
    (folder,) = find(tmp_path / "killed")
    assert (
        json.loads((folder / "status.json").read_text())["state"] == "running"
        and not (folder / "metrics.json").exists()
    )
    again = moabench(*args, "runs_dir=killed", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    clock = ("train/seconds", "train/tokens_per_second", "memory/peak_bytes")
    results = [
        json.loads(next(tmp_path.glob(f"{name}/*/metrics.json")).read_text()) for name in ("whole", "killed")
    ]
    results = [{key: value for key, value in metrics.items() if key not in clock} for metrics in results]
    assert results[0] == results[1]


# ---- overrides, in this process


@pytest.mark.parametrize(
    ("given", "passed_on"),
    [
        ("method=lora", "method=lora"),
        ("seed=1", "seed=1"),
        ("train.lr=1e-3", "++train.lr=1e-3"),
        ("method.router.k=1,2", "++method.router.k=1,2"),
        ("+method.router.k=1", "+method.router.k=1"),
        ("~method.losses", "~method.losses"),
        ("method=glob(mo*)", "method=glob(mo*)"),
        ("hydra.verbose=true", "hydra.verbose=true"),
        ("train.recipes.lora.lr=1e-3", "++train.recipes.lora.lr=1e-3"),
        ("model.random.layers=3", "++model.random.layers=3"),
        ("--multirun", "--multirun"),
    ],
)
def test_plain_assignments_may_add_keys(given, passed_on):
    assert overrides.prepare([given]) == [passed_on]


@pytest.mark.parametrize("given", ["seed.x=1", "model.random.leyers=3", "logger.knd=none", "runs_dri=x"])
def test_unknown_keys_are_found_at_every_depth(given):
    with pytest.raises(ConfigError, match="unknown key"):
        overrides.prepare([given])


def test_values_of_hydra_flags_are_no_overrides():
    assert overrides.prepare(["--config-dir", "elsewhere", "seed=1"]) == [
        "--config-dir",
        "elsewhere",
        "seed=1",
    ]


def test_quick_interrupts_show_no_traceback(monkeypatch, capfd):
    """The first ends the run, the second does not disturb the end, the third leaves at once."""
    left = []
    monkeypatch.setattr(cli.os, "_exit", left.append)
    handler = cli.Interrupts()
    with pytest.raises(KeyboardInterrupt):
        handler(signal.SIGINT, None)
    handler(signal.SIGINT, None)
    assert left == [] and "stopping" in capfd.readouterr().err
    handler(signal.SIGTERM, None)
    assert left == [130]


def test_an_interrupt_while_it_is_being_said_is_no_traceback(monkeypatch, capsys):
    def interrupted(argv):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(cli, "_compose_and_run", interrupted)
    monkeypatch.setattr(cli, "_close_bars", lambda: signal.raise_signal(signal.SIGINT))
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        assert cli.main(["seed=1"]) == 130
    finally:
        signal.signal(signal.SIGINT, before[0]), signal.signal(signal.SIGTERM, before[1])
    assert "the same command resumes the run" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["~/x", "a(b", "a=b", "x#y", "/x/y[1]", "a{b", "it's"])
def test_a_value_that_hydra_reads_is_answered_with_its_quoted_form(value):
    """What the message says to type is taken, and is that value."""
    with pytest.raises(ConfigError, match="needs quotes of its own") as error:
        overrides.prepare([f"model.path={value}"])
    (word,) = shlex.split(str(error.value).partition("quotes of its own: ")[2].removesuffix("."))
    assert overrides.composed([word]).model.path == value


@pytest.mark.parametrize(
    "word", ["data.revisions.addsub=12e4567", "data.revisions.addsub=1234567", "model.revision=1234567"]
)
def test_a_commit_that_reads_as_a_number_is_refused(word):
    with pytest.raises(ConfigError, match="needs quotes of its own"):
        overrides.composed(["data=hub", word])
    key, _, commit = word.partition("=")
    cfg = overrides.composed(["data=hub", f"{key}='{commit}'"])
    assert commit in (cfg.model.revision, cfg.data.revisions.get("addsub"))
