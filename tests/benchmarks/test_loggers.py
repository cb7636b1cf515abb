"""W&B without a network: what its file holds is what our files hold. The file is read with a reader of its
own, record by record."""

import json
import os
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from moabench.benchmarks.config.choices import CONF
from moabench.benchmarks.config.run import RunConfig
from moabench.benchmarks.machine import files
from moabench.benchmarks.run import loggers


def config(*overrides: str) -> RunConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return RunConfig.from_composed(
            OmegaConf.to_container(compose("config", list(overrides)), resolve=True)
        )


def records(folder: Path) -> list:
    """The records of the one offline run in `folder`, all of them: W&B's own process may still be writing
    when `finish` returns."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
        found = read(file.read_bytes())
        if found and found[-1].WhichOneof("record_type") in ("exit", "footer"):
            return found
        time.sleep(0.05)
    raise AssertionError("W&B wrote no last record")


def read(data: bytes) -> list:
    """Records of a LevelDB log: a header, then blocks of 32 KiB; crc, length, kind, payload."""
    from wandb.proto import wandb_internal_pb2

    position, payload, found = 7, b"", []
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
            continue
        length, kind = struct.unpack("<HB", data[position + 4 : position + 7])
        payload += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4) and position <= len(data):  # a whole record, or the last part of one
            found.append(wandb_internal_pb2.Record.FromString(payload))
            payload = b""
    return found


def values(items) -> dict:
    """Items of a history or summary record; W&B's own keys begin with an underscore."""
    pairs = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
    return {key: value for key, value in pairs.items() if not key.startswith("_")}


def summary(found: list) -> dict:
    return {
        k: v
        for record in found
        if record.WhichOneof("record_type") == "summary"
        for k, v in values(record.summary.update).items()
    }


def history(found: list) -> list[dict]:
    return [values(record.history.item) for record in found if record.WhichOneof("record_type") == "history"]


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)


def test_the_offline_run_equals_our_record(tmp_path):
    metrics = {"eval/arc_easy@builtin/acc": 0.5, "params/trainable": 12, "load/max_vio": 0.25}
    rows = [
        {"step": 10, "loss/task": 1.5, "load/max_vio": 0.5, "note": "text"},
        {"step": 20, "loss/task": 1.25, "load/max_vio": 0.75},
    ]
    logger = loggers.start(config("seed=3"), tmp_path, "ab" * 32)
    logger.log(10, rows[0])
    logger.log_history(rows)
    logger.finish(metrics)
    found = records(tmp_path)
    (run,) = [record.run for record in found if record.WhichOneof("record_type") == "run"]
    assert (run.run_group, run.job_type) == (loggers.study(config()), "moa_sparse")
    assert (set(run.tags), run.run_id) == ({"arc", "tiny", "builtin"}, "ab" * 8)
    assert os.uname().nodename != run.host
    kept = {
        item.key: json.loads(item.value_json) for item in run.config.update if not item.key.startswith("_")
    }
    assert kept == config("seed=3").to_dict()
    assert history(found) == [{k: v for k, v in row.items() if k != "note"} for row in rows], "each step once"
    assert summary(found) == metrics


def test_a_study_is_what_may_be_compared():
    """Method, seed and settings of the machine make no other group; recipe, data and protocol do."""
    group = loggers.study(config())
    assert group.startswith("arc-tiny-")
    assert group == loggers.study(
        config("method=lora", "seed=4", "threads=1", "quiet=true", "logger.project=other")
    )
    assert (
        len(
            {
                group,
                *(
                    loggers.study(config(word))
                    for word in ("train.steps=7", "data.eval_limit=7", "protocol=label")
                ),
            }
        )
        == 4
    )


def test_what_has_a_value_an_expert_is_one_table_and_no_summary(tmp_path):
    rows = [
        {"split": split, "task": "t", "skill": skill, "site": "s", "index": i, "share": 0.5}
        for split in ("train", "test")
        for skill in (None, "a")
        for i in (0, 1)
    ]
    files.write_parquet(tmp_path / "routing.parquet", rows)
    files.write_parquet(
        tmp_path / "matrices.parquet",
        [{"step": step, "name": "n", "i": 0, "j": 1, "value": 0.5} for step in (0, 9)],
    )
    logger = loggers.start(config(), tmp_path, "ab" * 32)
    logger.log(9, {"loss/task": 1.0})
    logger.finish({"a": 1})
    found = records(tmp_path)
    assert summary(found) == {"a": 1}
    tables = {
        name: json.loads(
            next(tmp_path.glob(f"wandb/offline-run-*/files/media/table/tables/{name}_*.json")).read_text()
        )
        for name in ("routing", "matrices")
    }
    assert [len(table["data"]) for table in tables.values()] == [2, 1]
    assert tables["routing"]["columns"] == ["split", "task", "site", "index", "share"]


def test_several_runs_in_one_process_stay_apart(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        logger = loggers.start(
            config(f"method={'lora' if name == 'a' else 'molora'}"), tmp_path / name, name * 64
        )
        logger.log_history([{"step": 1, "loss/task": 1.0}])
        logger.finish({"name": name})
    for name in ("a", "b"):
        assert summary(records(tmp_path / name)) == {"name": name}


def test_a_resumed_run_is_one_file_with_all_steps(tmp_path):
    """Killed after step 65, resumed from the checkpoint of step 60: the server gets steps 5 to 200, each
    once."""
    rows = [{"step": step, "loss/task": 1 / step, "epoch": 0.5} for step in range(5, 205, 5)]
    logger = loggers.start(config(), tmp_path, "ab" * 32)
    for row in rows[:13]:
        logger.log(row["step"], row)
    logger.finish(None)
    for step in (55, 60, 65):
        state = {"log_history": [row for row in rows if row["step"] <= step], "best": None}
        files.write_json(tmp_path / f"checkpoints/checkpoint-{step}/trainer_state.json", state)
    cut = tmp_path / "checkpoints/checkpoint-65/trainer_state.json"
    cut.write_text(cut.read_text()[:50])
    logger = loggers.start(config(), tmp_path, "ab" * 32)
    for row in rows[12:]:
        logger.log(row["step"], row)
    logger.finish({"a": 1})
    found = records(tmp_path)  # of the one file that there is
    assert [row["step"] for row in history(found)] == list(range(5, 205, 5)) and summary(found) == {"a": 1}


@pytest.mark.parametrize("slow", ["init", "log", "finish"])
def test_a_run_never_waits_long_for_wandb(slow, tmp_path, monkeypatch, capsys):
    import wandb

    class Run:
        summary: dict = {}

        def __getattr__(self, name):
            return lambda *args, **kwargs: gate.wait(30) if name == slow else None

    gate, run = threading.Event(), Run()
    monkeypatch.setattr(wandb, "init", lambda **options: gate.wait(30) if slow == "init" else run)
    monkeypatch.setattr(loggers, "SECONDS", 0.05)
    logger = loggers.start(config(), tmp_path, "ab" * 32)
    logger.log(1, {"loss/task": 1.0})
    logger.log(2, {"loss/task": 1.0})
    logger.finish({"a": 1})
    gate.set()
    said = capsys.readouterr().err
    assert said.count("no answer within") == 1 and "recorded in its folder only" in said


def test_a_run_that_ended_early_has_no_metrics(tmp_path):
    logger = loggers.start(config(), tmp_path, "ab" * 32)
    logger.log_history([{"step": 1, "loss/task": 1.0}])
    logger.finish(None)
    found = records(tmp_path)
    assert summary(found) == {} and len(history(found)) == 1
    assert [record.exit.exit_code for record in found if record.WhichOneof("record_type") == "exit"] == [1]


def test_a_broken_wandb_fails_no_run(tmp_path, monkeypatch, capsys):
    import wandb

    def init(**options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(wandb, "init", init)
    logger = loggers.start(config(), tmp_path, "ab" * 32)
    logger.log(1, {"loss/task": 1.0})
    logger.finish({"a": 1})
    assert "No space left on device" in capsys.readouterr().err


def test_no_logger_needs_no_wandb(tmp_path):
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from test_loggers import config, loggers
logger = loggers.start(config("logger=none"), Path({str(tmp_path)!r}), "ab" * 32)
logger.log(1, {{"loss/task": 1.0}})
logger.finish({{"a": 1}})
assert "wandb" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []
