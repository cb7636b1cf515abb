"""A run from config to folder, on an untrained model: what is recorded, what is shared between runs, what
becomes of errors."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from moabench.benchmarks.bases.adapters import load_adapter
from moabench.benchmarks.config.choices import CONF
from moabench.benchmarks.config.recipe import Recipe
from moabench.benchmarks.config.run import RunConfig
from moabench.benchmarks.evaluation import scoring
from moabench.benchmarks.machine.files import RunError, StorageError, read_json
from moabench.benchmarks.run import run as experiment
from moabench.benchmarks.run import stages
from moabench.benchmarks.run.folder import find
from moabench.benchmarks.run.out_of_memory import OutOfMemory
from moabench.benchmarks.run.prepared import Prepared
from moabench.benchmarks.training import trainer
from moabench.methods.spec import ConfigError

SMALL = (
    "model=random_tiny",
    "train=smoke",
    "data.eval_limit=6",
    "data.train_limit=20",
    "logger=none",
    "quiet=true",
    "++threads=1",
)
CLOCK = {"train/seconds", "train/tokens_per_second", "memory/peak_bytes"}
"""Metrics that are not determined by the config."""


def config(runs_dir: Path, *overrides: str) -> RunConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        data = OmegaConf.to_container(
            compose("config", [*SMALL, f"runs_dir={runs_dir}", *overrides]), resolve=True
        )
    return RunConfig.from_composed(data, overrides)


def settled(metrics: dict) -> dict:
    return {key: value for key, value in metrics.items() if key not in CLOCK}


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """Names of the expensive steps in the order in which they happen."""
    done: list[str] = []

    def counted(module, name):
        original = getattr(module, name)

        def call(*args, **kwargs):
            done.append(name + (" resumed" if kwargs.get("resume") else ""))
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, call)

    counted(stages.evaluate, "evaluate")
    counted(stages.train, "train")
    return done


def failing(monkeypatch, error: BaseException) -> None:
    def train(*args, **kwargs):
        raise error

    monkeypatch.setattr(stages.train, "train", train)


# ---- what is recorded


def test_the_record_is_complete(tmp_path):
    outcome = experiment.run(config(tmp_path))
    metrics = read_json(outcome.folder / "metrics.json")
    assert outcome.ran and outcome.metrics == metrics
    for task in ("arc_easy@builtin:loglikelihood", "arc_challenge@builtin:loglikelihood"):
        assert {
            f"{part}/{task}/{name}"
            for part in ("eval", "base")
            for name in ("acc", "acc_stderr", "acc_norm", "acc_norm_stderr")
        } <= metrics.keys()
    wanted = (
        "train/loss_task train/tokens_per_second train/seconds memory/peak_bytes params/trainable "
        "params/total load/effective_experts"
    )
    assert set(wanted.split()) <= metrics.keys()
    tables = {
        name: pd.read_parquet(outcome.folder / f"{name}.parquet")
        for name in ("history", "routing", "samples", "probes", "matrices")
    }
    assert list(tables["history"]["step"]) == [1, 2]
    assert {"site", "expert", "split", "task"} <= set(tables["routing"].columns)
    assert len(tables["samples"]) == 12
    assert not (outcome.folder / "checkpoints").exists()
    saved = RunConfig.from_composed(OmegaConf.to_container(OmegaConf.load(outcome.folder / "config.yaml")))
    assert outcome.folder.name.endswith(Prepared(saved).hash[:8])


HEADLINES = {
    f"headline/{name}"
    for name in (
        "max_vio",
        "effective_experts",
        "mi_minus_null",
        "expert_cka",
        "expert_cka_minus_null",
        "erank_ratio",
    )
}


@pytest.mark.parametrize("method", ["moe_lora_topk", "moa_sparse", "molora_oracle", "lora", "none"])
def test_measures_of_a_run_agree_with_its_tables(tmp_path, method):
    """metrics.json against the rows it was made from; a method without routers has no measure of them, and
    the frozen base has none."""
    overrides = ("method.experts.n=4",) if method == "molora_oracle" else ()
    outcome = experiment.run(
        config(
            tmp_path, f"method={method}", *overrides, "task=conflict", "train.lr=0.05", "data.eval_limit=12"
        )
    )
    metrics, tables = outcome.metrics, {p.stem: pd.read_parquet(p) for p in outcome.folder.glob("*.parquet")}
    found = {key for key in metrics if key.startswith("headline/") and not key.endswith("_worst")}
    assert found == {"none": set(), "lora": {"headline/erank_ratio"}}.get(method, HEADLINES)
    assert all(f"{key}_worst" in metrics for key in found)
    assert set(tables) == {"history", "routing", "samples", "probes", "matrices"}
    families = {key.split("/")[0] for key in metrics} & {"load", "routing", "specialisation", "experts"}
    assert bool(families) == (method not in ("lora", "none"))
    if method == "none":
        assert not len(tables["probes"]) and not (outcome.folder / "probe.json").exists()
        return
    probes = tables["probes"]
    assert sorted(probes["step"].unique()) == [0, 1, 2] == read_json(outcome.folder / "probe.json")["steps"]
    last = probes.query("step == 2 and measure == 'representation/erank_ratio'")["value"]
    assert metrics["headline/erank_ratio"] == pytest.approx(last.mean()) and metrics[
        "headline/erank_ratio_worst"
    ] == pytest.approx(last.min())
    if method == "lora":
        return
    last = probes.query("step == 2 and measure == 'experts/cka'")["value"]
    assert (metrics["headline/expert_cka"], metrics["headline/expert_cka_worst"]) == pytest.approx(
        (last.mean(), last.max())
    )
    effective = "load/contribution_effective_experts" if method == "moa_sparse" else "load/effective_experts"
    assert metrics["headline/effective_experts"] == metrics[effective]
    assert set(tables["matrices"].columns) == {"step", "site", "name", "i", "j", "value"}
    coactivation = tables["matrices"].query("name == 'coactivation' and i == j")
    assert (coactivation["value"] == 1).all() and set(coactivation["step"]) == {2}
    routing = tables["routing"]
    whole, parts = (
        routing[routing["skill"].isna() & (routing["split"] == "test")],
        routing[routing["skill"].notna()],
    )
    assert set(parts["skill"]) == {f"convention:{k}" for k in (1, 2, 3, 4)}
    keys = ["task", "site", "expert"]
    pd.testing.assert_series_equal(
        whole.groupby(keys)["assignments"].sum(), parts.groupby(keys)["assignments"].sum()
    )
    counts = whole.groupby(["site", "index"])["assignments"].sum().unstack()
    vio = counts.max(axis=1) / counts.sum(axis=1) * counts.shape[1] - 1
    assert (metrics["headline/max_vio"], metrics["headline/max_vio_worst"]) == pytest.approx(
        (vio.mean(), vio.max())
    )
    if method == "molora_oracle":
        assert (
            metrics["specialisation/skill_mi"] == pytest.approx(1) and metrics["headline/mi_minus_null"] > 0.5
        )


def test_all_methods_of_a_study_are_probed_on_the_same_tokens(tmp_path):
    runs = [("method=lora",), ("method=molora", "seed=3", "train.lr=1e-4"), ("method=full",)]
    folders = [experiment.run(config(tmp_path, *overrides)).folder for overrides in runs]
    hashes = {read_json(folder / "probe.json")["hash"] for folder in folders}
    assert len(hashes) == 1 and len(list((tmp_path / ".probes").iterdir())) == 1


def test_probes_can_be_left_out(tmp_path):
    outcome = experiment.run(config(tmp_path, "method=molora", "probe.times=0"))
    assert not len(pd.read_parquet(outcome.folder / "probes.parquet"))
    assert "headline/max_vio" in outcome.metrics and "headline/expert_cka" not in outcome.metrics
    probed = experiment.run(config(tmp_path, "method=molora")).metrics
    assert {k: v for k, v in settled(outcome.metrics).items() if k in probed} == {
        k: v for k, v in settled(probed).items() if k in outcome.metrics
    }


def test_accuracy_agrees_with_the_samples(tmp_path):
    outcome = experiment.run(config(tmp_path, "method=lora"))
    samples = pd.read_parquet(outcome.folder / "samples.parquet")
    for task, rows in samples.groupby("task"):
        assert rows["correct"].mean() == pytest.approx(outcome.metrics[f"eval/{task}/acc"])


@pytest.mark.parametrize(
    ("protocol", "template", "extraction"),
    [("label", "letters", None), ("generate", "llm_adapters", "choice_word")],
)
def test_the_way_of_asking_is_part_of_the_result(tmp_path, protocol, template, extraction):
    outcome = experiment.run(
        config(tmp_path, "method=lora", "task=arc_easy", f"protocol={protocol}", "train.loss=whole")
    )
    title = f"arc_easy@builtin:{protocol}"
    names = {
        "protocol": protocol,
        "template": template,
        "extraction": extraction,
        "loss": "whole",
        "split": "test",
        "version": 1,
    }
    names |= {"max_new_tokens": 32} if extraction else {}
    assert read_json(outcome.folder / "protocol.json") == {title: names}
    assert {f"eval/{title}/acc", f"base/{title}/acc"} <= outcome.metrics.keys()
    assert set(pd.read_parquet(outcome.folder / "samples.parquet")["task"]) == {title}


@pytest.fixture
def leaky(tmp_path):
    """A folder of questions of which two training rows are test rows, one of them in other letters."""
    folder = tmp_path / "data" / "arc_easy"
    folder.mkdir(parents=True)
    words = [
        a + b for a in ("amber", "bison", "cedar", "dune", "ember") for b in ("wick", "ford", "ley", "holm")
    ]
    made = [
        {"question": f"What is {w} near the {v}?", "choices": [w, v, "none"], "label": 0}
        for w, v in zip(words, words[5:], strict=False)
    ]
    test = made[:6]
    train = [*made[6:], test[0], test[1] | {"question": test[1]["question"].upper()}]
    for split, rows in (("train", train), ("test", test)):
        (folder / f"{split}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return folder.parent


@pytest.mark.parametrize(("mode", "rows"), [("drop", 9), ("mark", 11)])
def test_leaked_rows_are_recorded(tmp_path, leaky, mode, rows):
    made = config(
        tmp_path,
        "method=lora",
        "task=arc_easy",
        "data=local",
        f"data.root={leaky}",
        f"leakage={mode}",
        "data.train_limit=null",
    )
    outcome = experiment.run(made)
    record = read_json(outcome.folder / "leakage.json")
    assert (record["mode"], record["leaked"], [m["kind"] for m in record["matches"]]) == (
        mode,
        2,
        ["exact", "exact"],
    )
    assert (outcome.metrics["leakage/rows"], outcome.metrics["train/rows"]) == (2, rows)
    assert read_json(outcome.folder / "data.json")["rows"] == rows


def test_leaked_rows_can_stop_a_run(tmp_path, leaky):
    with pytest.raises(ConfigError, match="2 of 11 training rows are evaluation rows"):
        experiment.run(
            config(
                tmp_path / "runs",
                "method=lora",
                "task=arc_easy",
                "data=local",
                f"data.root={leaky}",
                "leakage=refuse",
            )
        )
    assert not find(tmp_path / "runs"), "nothing is left behind"


def test_what_was_hashed_is_what_is_used(tmp_path, leaky, monkeypatch):
    """Every file of rows and text replaced while the run goes on: the results of what was read at the
    start."""
    (tmp_path / "mix.json").write_text('[{"instruction": "Say so.", "output": "So."}]')
    (tmp_path / "text.txt").write_text("The red fox sleeps.\nThe river is green.\n")
    made = ("method=lora", "task=arc_easy", "data=local", f"data.root={leaky}", "forgetting=" + str(
        tmp_path / "text.txt"), f"+mix.file={tmp_path / 'mix.json'}")  # fmt: skip
    first = experiment.run(config(tmp_path / "one", *made))
    load = stages.base.load_model

    def replaced(*args, **kwargs):
        for file in (*leaky.rglob("*.jsonl"), tmp_path / "mix.json", tmp_path / "text.txt"):
            file.write_text("")
        return load(*args, **kwargs)

    monkeypatch.setattr(stages.base, "load_model", replaced)
    second = experiment.run(config(tmp_path / "two", *made))
    assert second.ran and second.folder.name == first.folder.name
    assert settled(second.metrics) == settled(first.metrics)


def test_rows_of_the_hub_are_hashed_where_no_commit_pins_them(tmp_path, monkeypatch):
    import datasets

    read, said = [], ["one"]

    def load(path, name, split, revision):
        read.append(split)
        row = {"question": said[0], "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "A"}
        return datasets.Dataset.from_list([{"id": "1", **row}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    (tmp_path / "mix.json").write_text('{"instruction": "Say so.", "output": "So."}')

    def inputs(*overrides):
        read.clear()
        cfg = config(tmp_path, "method=lora", "task=arc_easy", "data=hub", "forgetting=none", *overrides)
        return Prepared(cfg).inputs

    pinned = inputs()
    assert inputs(f"+data.revisions.arc_easy={'0' * 40}") != pinned and not read
    moving = inputs("+data.revisions.arc_easy=main")
    assert sorted(read) == ["test", "train"]
    mixed = inputs(f"+mix.file={tmp_path / 'mix.json'}")
    said[0] = "two"
    assert inputs() == pinned
    now = inputs("+data.revisions.arc_easy=main")
    assert now["evaluation"] != moving["evaluation"] and now["training"] != moving["training"]
    said[0] = "one"
    (tmp_path / "mix.json").write_text('{"instruction": "Say so.", "output": "No."}')
    assert inputs(f"+mix.file={tmp_path / 'mix.json'}")["training"] != mixed["training"]


def test_a_run_that_is_not_the_published_setting_says_so(tmp_path, capsys):
    cfg = config(tmp_path, "method=lora", "task=arc_easy", "quiet=false", "++forgetting=none")
    cfg = replace(cfg, recipe=Recipe(follows="its code", model=("org/large",), own=("train.lr",)))
    outcome = experiment.run(cfg)
    said = capsys.readouterr().err
    assert read_json(outcome.folder / "recipe.json") == {"follows": "its code", "differs": cfg.departures}
    assert len(cfg.departures) == 2 and all(text in said for text in cfg.departures)
    experiment.run(cfg)  # found finished
    shown = capsys.readouterr().out
    assert all(text in shown for text in cfg.departures)


def test_what_was_cut_is_said(tmp_path, leaky, capsys):
    length = 24
    made = ("method=lora", "task=arc_easy", "data=local", f"data.root={leaky}", f"train.max_length={length}")
    with pytest.raises(RunError, match=r"data.allow_cut=0.1: \d+ of \d+ training texts"):
        experiment.run(config(tmp_path, *made))
    outcome = experiment.run(config(tmp_path, *made, "data.allow_cut=1", "quiet=false"))
    cut = outcome.metrics["train/cut_examples"]
    assert cut > 0 and f"cut         {cut} training texts lost their beginning" in capsys.readouterr().out


@pytest.mark.parametrize("way", ["data.held_out=true", "train.lr_grid=[1e-3,2e-3]"])
def test_too_few_rows_to_hold_some_out_stop_a_run(tmp_path, leaky, way):
    train = leaky / "arc_easy" / "train.jsonl"
    train.write_text("\n".join(train.read_text().splitlines()[:2]))
    made = ("method=lora", "task=arc_easy", "data=local", f"data.root={leaky}", way)
    with pytest.raises(ConfigError, match="none of the 2 training rows of arc_easy is in the tenth"):
        experiment.run(config(tmp_path / "runs", *made))
    assert not find(tmp_path / "runs")


def test_training_rows_that_cannot_be_put_stop_a_run(tmp_path):
    root = tmp_path / "data"
    for task, row in {
        "aqua": {
            "question": "What is 2 + 2?",
            "choices": ["3", "4", "5", "6", "7"],
            "label": 1,
            "answer": "B",
        },
        "gsm8k": {"question": "What is 3 + 3?", "answer": "6", "solution": "3 + 3 = 6"},
    }.items():
        (root / task).mkdir(parents=True)
        for split in ("train", "test"):
            (root / task / f"{split}.jsonl").write_text(json.dumps(row))
    made = config(
        tmp_path / "runs",
        "method=lora",
        "task=aqua",
        "data=local",
        f"data.root={root}",
        "protocol=label",
        "++mix.parts.gsm8k.weight=1",
    )
    with pytest.raises(ConfigError, match=r"mix=own trains on gsm8k with .*: its rows have a free answer"):
        experiment.run(made)
    assert not find(tmp_path / "runs")


def test_what_was_forgotten_is_measured(tmp_path):
    text = tmp_path / "held_out.txt"
    text.write_text("A hare runs over the hill.\nThe pump stands in the barn.\n")
    metrics = experiment.run(config(tmp_path, "method=lora", f"forgetting={text}", "train.lr=1e-2")).metrics
    assert metrics["forgetting/change"] == pytest.approx(
        metrics["forgetting/loss"] - metrics["forgetting/before"]
    )
    assert metrics["forgetting/change"] != 0 and metrics["forgetting/tokens"] > 10
    frozen = experiment.run(config(tmp_path, "method=none", f"forgetting={text}")).metrics
    assert frozen["forgetting/change"] == 0 and frozen["forgetting/loss"] == metrics["forgetting/before"]
    assert "forgetting/loss" not in experiment.run(config(tmp_path, "method=lora", "forgetting=none")).metrics


def test_the_oracle_is_told_the_skill_in_training_and_evaluation(tmp_path):
    outcome = experiment.run(config(tmp_path, "method=molora_oracle", "method.experts.n=4", "task=conflict"))
    samples = pd.read_parquet(outcome.folder / "samples.parquet")
    assert set(samples["skill"]) == {f"convention:{k}" for k in (1, 2, 3, 4)}
    routing = pd.read_parquet(outcome.folder / "routing.parquet").query("split == 'test'")
    load = (
        routing.groupby(["task", "expert"])["share"].mean().unstack()
    )  # each task is one convention, and has one expert
    assert ((load == 0) | (load == 1)).all().all() and (load.sum(0) == 1).all()


def test_the_environment_names_no_place(tmp_path):
    outcome = experiment.run(config(tmp_path, "method=lora"))
    text = (outcome.folder / "environment.json").read_text()
    record = json.loads(text)
    assert {"packages", "code", "device", "threads", "seed", "config_hash", "inputs"} <= record.keys()
    assert record["threads"] == 1 and record["packages"]["torch"] == torch.__version__
    for place in (str(tmp_path), str(Path.home()), os.getcwd()):
        assert place not in text
    assert (
        str(Path(experiment.__file__).parent)
        not in (outcome.folder / "adapter" / "adapter_config.json").read_text()
    )


def test_equal_configs_give_equal_results_in_one_process(tmp_path):
    """The second run starts from whatever the first and the lines between left of the global state."""
    first = experiment.run(config(tmp_path / "a")).metrics
    torch.manual_seed(99), torch.rand(7), torch.set_num_threads(1)
    second = experiment.run(config(tmp_path / "b")).metrics
    assert settled(first) == settled(second)
    other = experiment.run(config(tmp_path / "b", "seed=1")).metrics
    assert other["train/loss_task"] != first["train/loss_task"]


def test_a_known_base_changes_nothing(tmp_path):
    first = experiment.run(config(tmp_path))
    shutil.rmtree(first.folder)
    assert settled(experiment.run(config(tmp_path)).metrics) == settled(first.metrics)


# ---- what is not done twice


def test_a_finished_run_is_read(tmp_path, calls):
    first = experiment.run(config(tmp_path, "method=lora"))
    done = len(calls)
    again = experiment.run(config(tmp_path, "method=lora", "traceback=true"))
    assert not again.ran and again.metrics == first.metrics and len(calls) == done


def test_the_base_is_evaluated_once(tmp_path, calls):
    experiment.run(config(tmp_path, "method=lora"))
    experiment.run(config(tmp_path, "method=molora", "train.lr=1e-3"))
    assert calls == ["evaluate", "train", "evaluate", "train", "evaluate"]
    experiment.run(config(tmp_path, "method=molora", "data.eval_limit=5"))
    assert calls[5:] == ["evaluate", "train", "evaluate"], "other questions are another evaluation"


def test_the_frozen_base_as_a_method(tmp_path, calls):
    outcome = experiment.run(config(tmp_path, "method=none"))
    assert calls == ["evaluate"]
    assert outcome.metrics["params/trainable"] == 0
    assert (
        outcome.metrics["eval/arc_easy@builtin:loglikelihood/acc"]
        == outcome.metrics["base/arc_easy@builtin:loglikelihood/acc"]
    )
    assert len(pd.read_parquet(outcome.folder / "samples.parquet")) == 12
    assert not (outcome.folder / "adapter").exists()


def test_other_weights_are_another_run(tmp_path, llama, tokenizer):
    llama.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    path = f"++model.path={tmp_path / 'base'}"
    first = experiment.run(config(tmp_path / "runs", "model=tiny", path, "method=none"))
    with torch.no_grad():
        llama.lm_head.weight.mul_(-1)
    llama.save_pretrained(tmp_path / "base")
    second = experiment.run(config(tmp_path / "runs", "model=tiny", path, "method=none"))
    assert second.ran and second.folder != first.folder


# ---- errors


def test_a_failed_run_stays_with_its_reason_and_is_tried_again(tmp_path, monkeypatch, calls):
    with monkeypatch.context() as patch:
        failing(patch, RuntimeError("boom"))
        with pytest.raises(RuntimeError, match="boom"):
            experiment.run(config(tmp_path, "method=lora"))
    (folder,) = find(tmp_path)
    assert (
        read_json(folder / "status.json")["state"] == "failed"
        and "boom" in read_json(folder / "status.json")["reason"]
    )
    assert not (folder / "metrics.json").exists(), "a half-run has no metrics"
    with pytest.raises(RunError, match=r"passed over \(RuntimeError: boom\); retry=true"):
        experiment.run(config(tmp_path, "method=lora"), again=False)
    assert read_json(folder / "status.json")["attempt"] == 1
    assert experiment.run(config(tmp_path, "method=lora")).ran
    assert "train" in calls and "train resumed" not in calls
    assert "boom" in read_json(folder / "status.json")["before"][0]["reason"]


@pytest.mark.parametrize(
    ("error", "raised", "state"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt, "interrupted"),
        (OSError(28, "No space left on device"), StorageError, "interrupted"),
        (
            RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 177408 vs 177300"),
            StorageError,
            "interrupted",
        ),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
            OutOfMemory,
            "failed",
        ),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
            OutOfMemory,
            "failed",
        ),
        (ConfigError("loss/task=nan at step 3: expected a finite loss."), RunError, "failed"),
    ],
)
def test_what_becomes_of_an_error_in_training(tmp_path, monkeypatch, calls, error, raised, state):
    with monkeypatch.context() as patch:
        failing(patch, error)
        with pytest.raises(raised):
            experiment.run(config(tmp_path, "method=lora"))
    (folder,) = find(tmp_path)
    status = read_json(folder / "status.json")
    assert status["state"] == state and status["reason"]
    experiment.run(config(tmp_path, "method=lora"))
    assert ("train resumed" in calls) == (state == "interrupted")


FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


def holding(monkeypatch, rows: int, from_step: int = 0) -> None:
    """Memory for passes of at most `rows` sequences in training, from a step on."""
    original = trainer.MixtureTrainer.compute_loss

    def compute_loss(self, model, batch, *args, **kwargs):
        if len(batch["input_ids"]) > rows and self.state.global_step >= from_step:
            raise FULL
        return original(self, model, batch, *args, **kwargs)

    monkeypatch.setattr(trainer.MixtureTrainer, "compute_loss", compute_loss)


HALVES = (
    "method=moe_lora_topk",
    "train.batch_size=12",
    "train.eval_batch_size=8",
    "train.steps=4",
    "train.save_every=1",
)


def test_passes_are_halved_until_they_fit(tmp_path, monkeypatch, capsys):
    """12 -> 6 -> 3: then every metric is that of a run asked to do so."""
    asked = experiment.run(config(tmp_path / "asked", *HALVES, "train.batch_size=3", "train.accumulation=4"))
    holding(monkeypatch, 3)
    halved = experiment.run(config(tmp_path / "halved", *HALVES, "train.halve=true"))
    assert settled(halved.metrics) == settled(asked.metrics)
    assert (halved.metrics["train/batch_size"], halved.metrics["train/accumulation"]) == (3, 4)
    said = capsys.readouterr().err
    assert said.count("out of memory; goes on with ") == 2
    assert "train.batch_size=3 (was 6), train.accumulation=4 (was 2)\n" in said
    assert halved.folder.name == experiment.run(config(tmp_path / "halved", *HALVES)).folder.name, (
        "the same run, found finished"
    )


def test_passes_of_evaluation_are_halved_apart(tmp_path, monkeypatch, capsys):
    original = scoring.batches.forward

    def forward(model, batch, *args, **kwargs):
        if not model.training and len(batch["input_ids"]) > 2:
            raise FULL
        return original(model, batch, *args, **kwargs)

    monkeypatch.setattr(scoring.batches, "forward", forward)
    found = experiment.run(
        config(
            tmp_path,
            "method=lora",
            "train.eval_batch_size=8",
            "train.halve=true",
            "probe.times=0",
            "forgetting=none",
        )
    )
    assert found.metrics["train/batch_size"] == config(tmp_path, "method=lora").train.batch_size
    assert "out of memory; goes on with train.eval_batch_size=2 (was 4)\n" in capsys.readouterr().err


def test_a_run_that_fills_the_memory_late_goes_on_from_its_checkpoint(tmp_path, monkeypatch, calls):
    whole = experiment.run(config(tmp_path / "whole", *HALVES))
    holding(monkeypatch, 6, from_step=2)
    calls.clear()
    halved = experiment.run(config(tmp_path / "halved", *HALVES, "train.halve=true"))
    assert calls.count("train") == 1 and calls.count("train resumed") == 1
    histories = [pd.read_parquet(outcome.folder / "history.parquet") for outcome in (whole, halved)]
    pd.testing.assert_frame_equal(*(h[["step", "tokens"]] for h in histories))
    assert histories[0]["loss/task"].to_numpy() == pytest.approx(
        histories[1]["loss/task"].to_numpy(), rel=1e-5
    )


def test_nothing_is_halved_unasked_or_below_one_sequence(tmp_path, monkeypatch):
    holding(monkeypatch, 0)
    for more in ((), ("train.halve=true",)):
        with pytest.raises(OutOfMemory, match="out of memory"):
            experiment.run(config(tmp_path, *HALVES, *more))
    (folder,) = find(tmp_path)
    status = read_json(folder / "status.json")
    assert status["state"] == "failed" and status["attempt"] == 2


def test_bad_input_found_late_leaves_nothing(tmp_path, monkeypatch):
    from moabench import methods

    def attach(*args, **kwargs):
        raise ConfigError("method.experts.targets: no such linear")

    monkeypatch.setattr(methods, "attach", attach)
    with pytest.raises(ConfigError, match="no such linear"):
        experiment.run(config(tmp_path, "method=lora"))
    assert find(tmp_path) == []


# ---- adapters


@pytest.mark.parametrize("method", ["lora", "molora"])
def test_a_trained_adapter_loads_on_its_base_only(tmp_path, method):
    from moabench.benchmarks.bases.loading import load_model

    cfg = config(tmp_path, f"method={method}", "train.lr=0.1")
    folder = experiment.run(cfg).folder / "adapter"
    base, tokenizer = load_model(cfg.model, cfg.seed, "cpu")
    ids = tokenizer("Question: what?", return_tensors="pt").input_ids
    plain = base(ids).logits
    adapted = load_adapter(base, folder).eval()
    assert not torch.allclose(adapted(ids).logits, plain)
    for size in ("layers=3", "hidden=32", "intermediate=64"):
        other, _ = load_model(config(tmp_path, f"model.random.{size}").model, 0, "cpu")
        with pytest.raises(ConfigError, match="made for random_tiny"):
            load_adapter(other, folder)


def test_a_folder_that_is_no_adapter(tmp_path, llama):
    with pytest.raises(ConfigError, match=r"no adapter_config\.json"):
        load_adapter(llama, tmp_path)
