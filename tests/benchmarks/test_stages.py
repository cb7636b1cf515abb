"""Methods that are trained in stages: what each training changes, what a killed run reads again, what is
counted.

Run: python -m pytest tests/benchmarks/test_stages.py
"""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from test_config import composed

from moabench import methods
from moabench.benchmarks.bases.loading import load_model
from moabench.benchmarks.data import labels
from moabench.benchmarks.fairness import budget
from moabench.benchmarks.run import stages
from moabench.benchmarks.run.run import run
from moabench.benchmarks.tasks.rows import Reader
from moabench.benchmarks.training import rounds
from moabench.methods import catalog
from moabench.methods.spec import ConfigError
from moabench.methods.stage import Round

SMALL = (
    "method=mixture_of_loras",
    "method.experts.r=2",
    "method.experts.targets=[q,down]",
    "task=arc_easy",
    "data.train_limit=24",
    "data.eval_limit=4",
    "train.steps=6",
    "train.batch_size=4",
    "train.save_every=2",
    "train.weight_decay=0.1",
    "probe.times=0",
    "forgetting=none",
    "quiet=true",
)


def config(tmp_path, *more):
    return composed(*SMALL, f"runs_dir={tmp_path}", *more)


def fitted(tmp_path, *more):
    cfg = config(tmp_path, *more)
    return labels.fitted(cfg, Reader(cfg.data))


def attached(cfg):
    return methods.attach(load_model(cfg.model, 0, "cpu")[0], cfg.method)


def snapshot(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if "mixture" in n}


def test_there_are_as_many_experts_as_labels(tmp_path):
    cfg = fitted(tmp_path)
    rows = Reader(cfg.data).rows("arc_easy", "train")
    names = labels.names(rows, "skill")
    assert (
        cfg.parsed_method.mixtures[0].banks["lora"].n == len(names) == len({row["skill"] for row in rows}) > 1
    )
    by_task = fitted(tmp_path, "method.stages=[{kind: each_expert, label: task}, {kind: routers}]")
    assert by_task.parsed_method.mixtures[0].banks["lora"].n == 1
    plain = composed("method=molora", f"runs_dir={tmp_path}")
    assert labels.fitted(plain, Reader(plain.data)) is plain


def test_rows_without_a_label_are_refused():
    rows = [{"task": "a", "skill": "s"}, {"task": "a"}]
    with pytest.raises(
        ConfigError, match="label='skill', but 1 of 2 training rows have no skill; they all have task"
    ):
        labels.names(rows, "skill")


def test_the_trainings_share_rows_and_steps():
    method = catalog.parse(catalog.raw("mixture_of_loras"))
    rows = [{"skill": "b"}] * 6 + [{"skill": "a"}] * 2
    first, second, last = rounds.planned(method, rows, ("a", "b"), "skill")
    assert [len(t.rows) for t in (first, second, last)] == [2, 6, 8]
    assert [t.round.share for t in (first, second, last)] == [0.25, 0.75, 1.0]
    assert [t.round.label for t in (first, second, last)] == [0, 1, None]
    assert first.round.parts == ("experts",) and last.round.parts == ("routers",)


def test_only_what_a_round_trains_moves(tmp_path):
    cfg = fitted(tmp_path)
    model = attached(cfg)
    experts = cfg.parsed_method.mixtures[0].banks["lora"].n
    before = snapshot(model)
    with rounds.only(model, Round("x", ("experts",), label=1)):
        assert all(
            p.requires_grad == ("router" not in n) for n, p in model.named_parameters() if "mixture" in n
        )
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p += 1.0
    after = snapshot(model)
    for name, tensor in before.items():
        moved = after[name] - tensor
        if "router" in name:
            assert not moved.any()
            continue
        axis = 0 if name.endswith("__A") else 1
        parts = moved.unflatten(axis, (experts, -1)).movedim(axis, 0)
        assert [bool(part.any()) for part in parts] == [e == 1 for e in range(experts)], name
    assert all(p.requires_grad for n, p in model.named_parameters() if "mixture" in n)


def finished(cfg):
    outcome = run(cfg)
    return outcome, load_file(outcome.folder / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize("killed", [1, -1], ids=["an expert's training", "the routers' training"])
def test_a_run_killed_in_any_stage_goes_on_there(tmp_path, monkeypatch, killed):
    plain = config(tmp_path / "whole")
    whole, expected = finished(plain)
    trainings = len(labels.names(Reader(plain.data).rows("arc_easy", "train")[:24], "skill")) + 1
    stop = killed % trainings
    calls = []
    real = stages.train.train

    def train(*args, **kwargs):
        calls.append(len(args[2]))
        if len(calls) == stop + 1:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    cfg = config(tmp_path / "cut")
    monkeypatch.setattr(stages.train, "train", train)
    with pytest.raises(KeyboardInterrupt):
        run(cfg)
    monkeypatch.setattr(stages.train, "train", lambda *a, **k: (calls.append(None), real(*a, **k))[1])
    outcome, found = finished(cfg)
    assert calls.count(None) == trainings - stop, "finished trainings are read"
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    told = {k: v for k, v in whole.metrics.items() if k.startswith(("eval/", "train/loss", "train/steps"))}
    assert {k: outcome.metrics[k] for k in told} == told
    assert sum("train/seconds_" in key for key in outcome.metrics) == trainings


def test_a_budget_counts_every_stage(tmp_path):
    """Two stages of one length cost what both cost, each with what it trains."""
    data = catalog.raw("mixture_of_loras")
    cfg = composed("method=lora", f"runs_dir={tmp_path}")
    both = budget._flops(cfg, [data])[0]
    one, other = (budget._flops(cfg, [{**data, "stages": [stage]}])[0] for stage in data["stages"])
    assert both == one + other and one != other
    longer = {**data, "stages": [{**data["stages"][0], "length": 2.0}, data["stages"][1]]}
    assert budget._flops(cfg, [longer])[0] == 2 * one + other


def test_stages_that_a_method_cannot_have():
    data = catalog.raw("molora")
    for stage, message in (
        ({"kind": "each_expert"}, "method.stages\\[0\\]: router.kind=softmax: expected label_classifier"),
        ({"kind": "each_exper"}, "Did you mean 'each_expert'"),
        ({"kind": "routers", "train_expert": True}, "Did you mean 'train_experts'"),
    ):
        with pytest.raises(ConfigError, match=message):
            catalog.parse({**data, "stages": [stage]})
    with pytest.raises(ConfigError, match=r"stages=.*expected none with tuner=peft"):
        catalog.parse({**catalog.raw("lora"), "stages": [{"kind": "routers"}]})
