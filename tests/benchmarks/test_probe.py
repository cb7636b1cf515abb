"""Probes against measures computed apart: explicit outputs, captured routings, hidden states; and that they
disturb nothing.

pytest tests/benchmarks/test_probe.py
"""

import json
import math
from dataclasses import replace

import pytest
import torch
from test_training import METHODS, Stop, assert_equal, rows, trainable

from moabench import methods
from moabench.analysis.measures import balance, experts, representation
from moabench.analysis.measures import catalog as measures
from moabench.analysis.measures import routing as measure
from moabench.benchmarks.config.sections import ProbeConfig
from moabench.benchmarks.data import batches
from moabench.benchmarks.observing.probe import Probe, first_tokens, spread
from moabench.benchmarks.observing.probe_tokens import probe_set
from moabench.benchmarks.tasks.rows import Reader
from moabench.benchmarks.training.train import train
from moabench.methods import catalog
from moabench.methods.spec import ConfigError


@pytest.fixture
def small(config, tmp_path):
    """small(method, **options of the probe) -> config whose probes read 600 tokens at up to 3 places."""

    def make(method="molora", train=None, **options):
        probe = ProbeConfig(**({"tokens": 600, "alone": 200, "sites": 3, "times": 3} | options))
        return replace(config(method, **(train or {})), probe=probe, runs_dir=str(tmp_path))

    return make


@pytest.fixture
def probed(small, llama, attached, tokenizer):
    """probed(method) -> (probe after one measurement, model, values by (site, measure))."""

    def make(method, **options):
        probe, model = Probe(small(method, **options), llama, tokenizer), attached(method)
        probe.measure(model, 0)
        return probe, model, {(row["site"], row["measure"]): row["value"] for row in probe.rows}

    return make


def captured(probe, model):
    """Routing of each site on the real tokens of the probe set."""
    real = probe.batch["attention_mask"].bool().flatten()
    found = methods.capture_routing(model, batches.inputs(model, probe.batch))
    return {site: r.map(lambda t: t[real]) for site, r in found.items()}, real


# the tokens


def test_the_tokens_are_those_of_data_and_tokenizer_alone(small, tokenizer, tmp_path):
    cfg = small("molora")
    found = probe_set(cfg, tokenizer, Reader(cfg.data))
    assert found.tokens == 600 and set(found.tasks) == {"arc_easy", "arc_challenge"}
    assert [found.tasks[i] for i in range(4)] == ["arc_easy", "arc_challenge"] * 2, "the tasks take turns"
    for same in (
        replace(cfg, seed=7),
        small("lora", train={"lr": 1e-4, "max_length": 16}),
        small("molora", times=1, sites=1),
    ):
        assert probe_set(same, tokenizer, Reader(same.data)).hash == found.hash
    assert probe_set(small("molora", tokens=400), tokenizer, Reader(cfg.data)).hash != found.hash
    few = replace(cfg.data, eval_limit=2)
    assert probe_set(replace(cfg, data=few), tokenizer, Reader(few)).hash != found.hash
    kept = (tmp_path / ".probes" / f"{found.hash[:16]}.json").read_text()
    assert json.loads(kept) == found.plain()


def test_fewer_questions_than_tokens(small, tokenizer):
    cfg = small("molora", tokens=100_000)
    found = probe_set(cfg, tokenizer, Reader(cfg.data))
    assert 100 < found.tokens < 100_000 and len(found.examples) == 48


def test_places_are_spread_over_depth():
    assert spread(30, 8) == [0, 4, 8, 12, 17, 21, 25, 29]
    assert spread(3, 8) == [0, 1, 2] and spread(5, 1) == [0] and spread(0, 8) == []


def test_part_of_the_tokens():
    examples = [batches.Example([1] * n, 1) for n in (30, 20, 40)]
    assert [len(first_tokens(examples, n)) for n in (10, 30, 49, 50, 1000)] == [1, 1, 1, 2, 3]


# the values


def test_expert_measures_are_those_of_explicit_outputs(probed):
    probe, model, values = probed("molora")
    routing, real = captured(probe, model)
    sites = {site.name: site for site in model.base_model.sites()}
    chosen = {site for site, name in values if name == "experts/cka"}
    assert len(chosen) == 3
    for name in chosen:
        site, inputs = sites[name], {}
        handle = site.module.register_forward_pre_hook(
            lambda module, args, inputs=inputs: inputs.update(x=args[0])
        )
        routing = methods.capture_routing(model, batches.inputs(model, probe.batch))
        handle.remove()
        x, bank = inputs["x"].flatten(0, 1)[real], site.banks[0]
        owner = bank.owner
        explicit = torch.stack(
            [bank.scale[e] * x @ bank.A[owner == e].T @ bank.B[:, owner == e].T for e in range(bank.part.n)]
        ).detach()  # fmt: skip
        assert values[name, "experts/cka"] == pytest.approx(
            experts.off_diagonal(experts.cka(explicit)).item(), rel=1e-3
        )
        cosine = experts.off_diagonal(experts.output_cosine(explicit)).item()
        assert values[name, "experts/output_cosine"] == pytest.approx(cosine, rel=1e-3, abs=1e-5)
        norms = (routing[name].weights[real].unsqueeze(-1) * explicit.transpose(0, 1)).norm(dim=-1).sum(0)
        share = balance.contribution(norms)
        assert values[name, "load/contribution_effective_experts"] == pytest.approx(
            balance.effective_experts(share).item(), rel=1e-4
        )
        updates = torch.stack(
            [(bank.B[:, owner == e] @ bank.A[owner == e]).flatten() for e in range(bank.part.n)]
        )
        expected = experts.off_diagonal(
            torch.cosine_similarity(updates.unsqueeze(0), updates.unsqueeze(1), dim=-1)
        ).item()
        assert values[name, "experts/weight_cosine"] == pytest.approx(expected, rel=1e-4, abs=1e-6)
        share = balance.membership(routing[name].weights[real])
        assert values[name, "representation/rc"] == pytest.approx(
            representation.within_between(x, share).item(), rel=1e-4
        )


@pytest.mark.parametrize("name", ["molora", "hydralora", "mixlora", "moa_soft"])
def test_experts_that_have_learnt_nothing_are_as_alike_as_the_null_says(
    name, small, llama, attached, tokenizer
):
    """Experts drawn at random have a CKA that is far from 0, by their inputs alone. The draws change nothing,
    to the bit."""
    probe, model = Probe(small(name), llama, tokenizer), attached(name)
    tensors = {n: p for n, p in model.named_parameters() if p.requires_grad}
    banks = [
        view.tensors for site in model.base_model.sites() if site.router is not None for view in site.banks
    ]
    torch.manual_seed(1)
    with torch.no_grad():
        for t in (t for bank in banks for t in bank.values()):
            t.normal_(std=0.1)
    before = {n: p.detach().clone() for n, p in tensors.items()}
    probe.measure(model, 0)
    assert_equal({n: p.detach() for n, p in tensors.items()}, before)
    metrics = probe.metrics()
    assert metrics["experts/cka_null"] > 0.05
    assert abs(metrics["experts/cka_minus_null"]) < 0.25 * metrics["experts/cka_null"] + 0.02
    values = {(row["site"], row["measure"]): row["value"] for row in probe.rows}
    for site in {site for site, name in values if name == "experts/cka"}:
        cka, null, less = (values[site, f"experts/cka{end}"] for end in ("", "_null", "_minus_null"))
        assert less == pytest.approx(cka - null, abs=1e-6)


def test_equal_experts_are_alike_beyond_the_null(small, llama, attached, tokenizer):
    probe, model = Probe(small("molora"), llama, tokenizer), attached("molora")
    with torch.no_grad():
        for site in model.base_model.sites():
            (bank,) = site.banks
            bank.A.copy_(bank.A[bank.owner == 0].repeat(bank.part.n, 1))
            bank.B.copy_(torch.randn(len(bank.B), int((bank.owner == 0).sum())).repeat(1, bank.part.n))
    probe.measure(model, 0)
    metrics = probe.metrics()
    assert metrics["experts/cka"] == pytest.approx(1, abs=1e-4)
    assert metrics["experts/cka_minus_null"] == pytest.approx(1 - metrics["experts/cka_null"], abs=1e-4)


def test_experts_of_a_block_contribute_as_leaving_them_out_says(probed):
    probe, model, values = probed("moa_soft")
    real = probe.part["attention_mask"].bool().flatten()
    assert real.sum() <= 200 < probe.batch["attention_mask"].sum()
    name = "model.layers.1.block"
    with torch.no_grad(), methods.watch(model, [name]) as watched:
        batches.forward(model, probe.part, kept=1)
    norms = watched[name].removed()[:, real].norm(dim=-1).sum(-1)
    share = norms / norms.sum()
    assert values[name, "load/contribution_max_vio"] == pytest.approx(
        (share.max() * len(share) - 1).item(), rel=1e-4
    )
    cka = experts.off_diagonal(experts.cka(watched[name].outputs()[:, real])).item()
    assert values[name, "experts/cka"] == pytest.approx(cka, rel=1e-4)


def test_hidden_states_are_compared_with_the_frozen_models(probed, llama, small, tokenizer):
    probe, model, values = probed("lora")
    assert not any(name.split("/")[0] != "representation" for _, name in values), (
        "a method without routers has no other measure"
    )
    real = probe.batch["attention_mask"].bool()
    states = [
        m(**batches.inputs(m, probe.batch), output_hidden_states=True).hidden_states[1][real].detach()
        for m in (model, llama)
    ]
    assert values["model.layers.0", "representation/erank_ratio"] == pytest.approx(
        (representation.erank(states[0]) / representation.erank(states[1])).item(), rel=1e-4
    )
    assert values["model.layers.0", "representation/drift_norm"] == pytest.approx(
        ((states[0] - states[1]).norm() / states[1].norm()).item(), rel=1e-4
    )
    untouched = Probe(small("none"), llama, tokenizer)
    untouched.measure(llama, 0)
    found = {(row["site"], row["measure"]): row["value"] for row in untouched.rows}
    assert found["model.layers.1", "representation/drift_norm"] == 0
    assert found["model.layers.1", "representation/erank_ratio"] == 1


def test_what_is_undefined_is_absent(small, llama, tokenizer):
    """At its start LoRA adds nothing: no cosine, no CKA, no direction; random routers see no geometry that
    could cluster."""
    probe = Probe(small("molora"), llama, tokenizer)
    torch.manual_seed(0)
    probe.measure(methods.attach(llama, catalog.raw("molora")), 0)
    found = {row["measure"] for row in probe.rows}
    assert {"experts/zero_share", "representation/rc", "representation/erank_ratio"} <= found
    undefined = {
        "experts/cka",
        "experts/output_cosine",
        "experts/weight_cosine",
        "experts/overlap_out",
        "routing/fluctuation",
    }
    assert not undefined & found
    assert probe.metrics()["experts/zero_share"] == 1
    assert all(math.isfinite(row["value"]) for row in probe.rows)


@pytest.mark.parametrize("name", ["moe_lora_topk", "molora"])
def test_fluctuation_and_saturation_follow_the_choices(name, probed):
    probe, model, _ = probed(name)
    before, _ = captured(probe, model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.mul_(-1.5)
    probe.measure(model, 10)
    after, _ = captured(probe, model)
    probe.finish()
    metrics = probe.metrics()
    sites = {row["site"] for row in probe.rows if row["measure"] == "routing/fluctuation"}
    changes = []
    for site in sites:
        if name == "molora":
            changes.append(measure.total_variation(before[site].weights, after[site].weights).item())
        else:
            changes.append(measure.fluctuation(before[site].chosen, after[site].chosen).item())
    assert metrics["routing/fluctuation"] == pytest.approx(sum(changes) / len(changes), abs=1e-3)
    saturated = [
        row["value"] for row in probe.rows if row["measure"] == "routing/saturation" and row["step"] == 0
    ]
    assert sum(saturated) / len(saturated) == pytest.approx(1 - metrics["routing/fluctuation"], abs=1e-6)
    assert metrics["routing/fluctuation"] > 0.05


@pytest.mark.parametrize("name", [n for n in catalog.names() if n not in ("none", "dora", "rslora")])
def test_every_method_can_be_probed(name, small, llama, tokenizer):
    """Names are those of the list; the pairwise matrices of routed methods are there; memory of hooks and
    recorders is given back."""
    skills = ("none",)
    probe = Probe(small(name), llama, tokenizer, skills)
    torch.manual_seed(0)
    model = methods.attach(llama, catalog.raw(name))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape))
    probe.measure(model, 0)
    probe.measure(model, 5)
    metrics, routed = (
        probe.metrics(),
        catalog.parse(catalog.raw(name)).tuner == "mixture" and name != "naive_sum",
    )
    assert {key.removesuffix("_worst") for key in metrics} <= measures.MEASURES.keys()
    assert "representation/erank_ratio" in metrics and metrics["representation/drift_norm"] > 0
    assert ("experts/cka" in metrics) == ("output_cka" in {row["name"] for row in probe.matrices}) == routed
    assert set(probe.record()) == {"hash", "tokens", "alone", "sequences", "steps", "sites"}
    assert getattr(model.base_model, "mixture_recorder", None) is None


# wiring


@pytest.mark.parametrize("name", METHODS)
def test_probes_change_no_training(name, small, llama, attached, tokenizer, tmp_path):
    cfg, results = small(name), {}
    for probes in (True, False):
        model = attached(name)
        probe = Probe(cfg, llama, tokenizer) if probes else None
        result = train(
            model,
            tokenizer,
            rows(cfg),
            cfg,
            tmp_path / str(probes),
            resume=False,
            progress=False,
            probe=probe,
        )
        results[probes] = trainable(model), [row["loss/total"] for row in result.history], result.routing
    assert_equal(results[True][0], results[False][0])
    assert results[True][1:] == results[False][1:]


@pytest.mark.parametrize("stop", [1, 5])
def test_a_resumed_run_has_the_probes_of_an_uninterrupted_one(
    stop, small, llama, attached, tokenizer, tmp_path
):
    """Probes at 0, 3, 5 and 8; cut before the first checkpoint (4), and after a probe that follows it."""
    cfg = small("moe_lora_topk", train={"steps": 8, "save_every": 4, "log_every": 4})

    def probes(folder, resume, callbacks=()):
        probe = Probe(cfg, llama, tokenizer)
        train(
            attached("moe_lora_topk"), tokenizer, rows(cfg), cfg, folder, resume, progress=False,
            callbacks=callbacks, probe=probe
        )  # fmt: skip
        return probe

    whole = probes(tmp_path / "whole", resume=False)
    with pytest.raises(KeyboardInterrupt):
        probes(tmp_path / "cut", resume=False, callbacks=[Stop(stop)])
    resumed = probes(tmp_path / "cut", resume=True)
    assert whole.record()["steps"] == [0, 3, 5, 8] == resumed.record()["steps"]
    assert resumed.metrics() == whole.metrics()
    assert resumed.rows == whole.rows and resumed.matrices == whole.matrices


def test_probing_takes_no_training_time(small, llama, attached, tokenizer, tmp_path, monkeypatch):
    """By a clock that jumps a thousand seconds at each probe."""
    from moabench.benchmarks.observing import training_log as tally
    from moabench.benchmarks.training import train as training

    now = [0.0]
    for module in (tally, training):
        monkeypatch.setattr(module.time, "perf_counter", lambda: now.__setitem__(0, now[0] + 0.001) or now[0])
    probe = Probe(small("lora"), llama, tokenizer)
    monkeypatch.setattr(probe, "measure", lambda model, step: now.__setitem__(0, now[0] + 1000))
    cfg = small("lora")
    result = train(
        attached("lora"), tokenizer, rows(cfg), cfg, tmp_path, resume=False, progress=False, probe=probe
    )
    assert 0 < result.metrics["train/seconds"] < 1


def test_an_unknown_architecture_is_told_how_to_go_on(small, tokenizer):
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    model = GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
        )
    )
    with pytest.raises(ConfigError, match=r"probe\.times=0 leaves probes out"):
        Probe(small("lora"), model, tokenizer)
