"""`budget=`: what a method gets is what the real model has, in the proportions of its file; what cannot be
met is refused.

Run: python -m pytest tests/benchmarks/test_budget.py
"""

import json

import pytest
import torch
from test_config import composed
from torch import nn

from moabench import methods
from moabench.benchmarks.bases.loading import load_model
from moabench.benchmarks.bases.skeleton import Skeleton
from moabench.benchmarks.config.budget import BudgetConfig, Goal
from moabench.benchmarks.config.run import run_hash
from moabench.benchmarks.fairness import budget
from moabench.benchmarks.run.run import run
from moabench.methods import catalog
from moabench.methods.sizes import dials, sized
from moabench.methods.spec import ConfigError

SIZED = sized()
LORA_41 = 41 * (4 * (256 + 256) + 704 + 256) * 6
"""LoRA of rank 41 on q, k, v, o and down of the shipped model, by hand."""


def solved(tmp_path, *overrides):
    return budget.apply(composed(*overrides, f"runs_dir={tmp_path}"))


@pytest.mark.parametrize("name", SIZED)
def test_every_method_has_the_same_number_of_parameters(name, tmp_path):
    cfg, solution = solved(tmp_path, f"method={name}", "budget.size=lora_r41")
    model = methods.attach(load_model(cfg.model, 0, "cpu")[0], cfg.method)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert solution.target == LORA_41 and trainable == solution.reached
    assert abs(trainable - LORA_41) <= 0.02 * LORA_41
    assert f"{trainable:,}" in solution.words and f"{LORA_41:,}" in solution.words


@pytest.mark.parametrize("name", SIZED)
def test_proportions_scales_and_numbers_of_experts_stay(name, tmp_path):
    before = catalog.parse(catalog.raw(name))
    after = solved(tmp_path, f"method={name}", "budget.size=lora_r41")[0].parsed_method
    for variant in (after, *(method for _, method in after.layers)):
        ratios = []
        for old, new in zip(dials(before), dials(variant) or dials(after), strict=True):
            assert new.bank.n == old.bank.n or old.bank.size == "n"
            ratios.append((new.size / old.size, 1 / old.size))
            if hasattr(old.bank, "scales") and not old.bank.rslora:
                assert new.bank.scales == pytest.approx(old.bank.scales)
        lowest = min(ratio for ratio, _ in ratios)
        assert all(ratio - lowest <= step + min(s for _, s in ratios) for ratio, step in ratios), (
            "sizes differ by rounding alone"
        )


def test_a_solved_config_is_its_own_solution(tmp_path):
    for name in ("molora", "mixlora", "moa_soft", "lora"):
        cfg, _ = solved(tmp_path, f"method={name}", "budget.size=lora_r41")
        again, solution = budget.apply(cfg)
        assert again.method == cfg.method and run_hash(again) == run_hash(cfg)
        assert solution.reached == methods.param_count(Skeleton(cfg.model).attached(cfg.method))["trainable"]


def test_some_layers_take_what_a_whole_step_of_the_size_is_too_coarse_for(tmp_path):
    cfg, solution = solved(tmp_path, "method=mixlora", "budget.size=lora_r41")
    ((span, larger),) = cfg.parsed_method.layers
    assert 0 < len(span) < 6 and all(0 <= layer < 6 for layer in span)
    sizes = [d.size for d in dials(cfg.parsed_method)]
    assert [bank.r for m in larger.mixtures for bank in m.banks.values()] == [size + 1 for size in sizes]
    assert "in layers" in solution.words


@pytest.mark.parametrize("name", ["none", "full"])
def test_reference_points_have_no_budget(name, tmp_path):
    cfg = composed(f"method={name}", "budget.size=lora_r41")
    assert budget.apply(cfg) == (cfg, None)


def test_what_cannot_be_reached_is_refused_with_what_can(tmp_path):
    with pytest.raises(ConfigError) as caught:
        solved(tmp_path, "method=molora", "budget.size=10k")
    routers = 6 * 8 * (4 * 256 + 704)
    smallest = routers + 8 * LORA_41 // 41
    for part in (
        "molora",
        "10,000",
        "within 2%",
        f"{smallest:,} (lora r 1)",
        f"{routers:,} lie outside of experts",
    ):
        assert part in str(caught.value)
    assert not list(tmp_path.rglob("*.json"))


def test_a_share_is_of_the_base(tmp_path):
    base = sum(p.numel() for p in load_model(composed().model, 0, "cpu")[0].parameters())
    _, solution = solved(tmp_path, "method=lora", "budget.size=10%")
    assert solution.target == pytest.approx(0.1 * base)


def test_a_solution_is_kept(tmp_path, monkeypatch):
    first, _ = solved(tmp_path, "method=molora", "budget.size=lora_r41")
    monkeypatch.setattr(budget, "solve", None)
    assert solved(tmp_path, "method=molora", "budget.size=lora_r41")[0] == first


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("none", "none", 0),
        ("0.5%", "share", 0.005),
        ("2M", "count", 2e6),
        ("1.5k", "count", 1500),
        (288768, "count", 288768),
    ],
)
def test_budgets_as_written(text, kind, value):
    goal = Goal.read(text)
    assert (goal.kind, goal.value) == (kind, pytest.approx(value))


def test_a_method_as_a_budget():
    assert Goal.read("moa_soft").method == catalog.raw("moa_soft")
    bank = next(iter(catalog.parse(Goal.read("molora_r3").method).mixtures[0].banks.values()))
    assert (bank.r, bank.scales[0], bank.n) == (3, 1.0, 8)


@pytest.mark.parametrize(
    "text", ["", "0", "200%", "-1", "lora_r0", "none_r3", "full", 0.5, None, "loar_r16", "2T"]
)
def test_bad_budgets(text):
    with pytest.raises(ConfigError, match="expected none, a method"):
        BudgetConfig(text)


def test_flops_and_time_are_matched_to_a_method_only():
    with pytest.raises(ConfigError, match="expected a method, as lora_r16, with match=flops"):
        BudgetConfig("2M", match="flops")


def _flops_by_hand(model: nn.Module, tokens: int) -> float:
    """Of a training step: 2 a weight and token forward, 2 for the gradient of the input, 2 for that of a
    trained weight. The first layer's input needs no gradient where nothing before it trains, and attention
    (one length, all methods) is left out."""
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    return sum(m.weight.numel() * tokens * (6 if m.weight.requires_grad else 4) for m in linears)


def test_flops_are_those_of_the_operators(tmp_path):
    """LoRA against a LoRA of four times the rank: the ratio of two counts by hand."""
    cfg = composed("method=lora", "budget.size=lora_r64", "budget.match=flops", f"runs_dir={tmp_path}")
    ours, reference = budget._flops(cfg, [cfg.method, Goal.read("lora_r64").method])
    skeleton, tokens = Skeleton(cfg.model), cfg.train.batch_size * budget.LENGTH
    small, large = (
        _flops_by_hand(skeleton.attached(data), tokens) for data in (cfg.method, Goal.read("lora_r64").method)
    )
    assert reference - ours == pytest.approx(large - small, rel=0.05)


@pytest.mark.parametrize("unit", ["steps", "epochs"])
def test_equal_flops_change_the_length_of_training(unit, tmp_path):
    length = {"steps": "train.steps=400", "epochs": "train.epochs=2"}[unit]
    cfg, solution = solved(tmp_path, "method=mixlora", "budget.size=lora_r16", "budget.match=flops", length)
    assert solution.length == solution.target / solution.reached < 1
    if unit == "steps":
        assert cfg.train.steps == round(400 * solution.length) and cfg.budget.reference_length == 400
    else:
        assert cfg.train.epochs == pytest.approx(2 * solution.length) and cfg.budget.reference_length == 2
    assert cfg.method == catalog.raw("mixlora")
    assert budget.apply(cfg) == (cfg, None), "a config that was solved stays"


def test_equal_time(tmp_path, monkeypatch):
    monkeypatch.setattr(budget, "ROUNDS", 1)
    cfg, solution = solved(
        tmp_path,
        "method=molora",
        "model=random_tiny",
        "budget.size=lora_r16",
        "budget.match=time",
        "train.steps=100",
    )
    assert cfg.train.steps == max(1, round(100 * solution.length)) and solution.reached > 0


def test_a_run_records_its_budget(tmp_path, capsys):
    overrides = [
        "method=moa_soft",
        "budget.size=20k",
        "budget.tolerance=0.05",
        "model=random_tiny",
        "train=smoke",
        "data.eval_limit=4",
    ]
    outcome = run(
        composed(
            *overrides,
            "task=arc_easy",
            "logger=none",
            "forgetting=none",
            "probe.times=0",
            f"runs_dir={tmp_path}",
        )
    )
    metrics = json.loads((outcome.folder / "metrics.json").read_text())
    assert metrics["budget/target"] == 20_000 and abs(metrics["params/trainable"] - 20_000) <= 1_000
    assert "budget 20k = 20,000; moa_soft gets" in capsys.readouterr().err
    assert torch.is_grad_enabled()
