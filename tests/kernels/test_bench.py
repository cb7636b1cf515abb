"""The benchmark measures the right things: other code's forms against loops over tokens and experts, peers
against attached methods, counters and goals against cases done by hand.

Run: python -m pytest tests/kernels/test_bench.py
"""

from __future__ import annotations

import csv
from dataclasses import replace
from functools import partial

import pytest
import torch
from compare import assert_near
from torch.nn import functional as F

from moabench.benchmarks.machine.timing import interleaved, quartiles
from moabench.benchmarks.speed import __main__ as command
from moabench.benchmarks.speed import goals, levels, mixture, whole
from moabench.benchmarks.speed import published_forms as forms
from moabench.benchmarks.speed.measure import (
    Counted,
    Options,
    Report,
    Setting,
    largest_error,
    relative_error,
    saved_storages,
)
from moabench.methods.routing import Routing

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
TINY = Setting("mixture", width=16, dtype="fp32", tokens=13, experts=5, rank=4, k=2, device="cpu")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# Forms


def routing(tokens: int, experts: int, k: int, dtype: torch.dtype) -> Routing:
    """Random weights on k random experts of each token; expert 0 gets no token where it can be spared."""
    scores = torch.rand(tokens, experts)
    scores[:, 0] = -1.0 if k < experts else 2.0
    ids = scores.topk(k).indices
    chosen = torch.zeros(tokens, experts, dtype=torch.bool).scatter_(1, ids, True)
    return Routing(weights=torch.rand(tokens, experts, dtype=dtype) * chosen, chosen=chosen, ids=ids)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(
    ("tokens", "experts", "r", "k"), [(13, 5, 4, 2), (1, 3, 4, 1), (7, 1, 8, 1), (6, 4, 4, 4)]
)
@pytest.mark.parametrize("name", forms.FORMS)
def test_every_form_is_the_equation(name, tokens, experts, r, k, shared):
    if shared and name == "grouped":
        pytest.skip("grouped GEMMs are for experts with an A each")
    torch.manual_seed(0)
    dtype = torch.float32 if name == "grouped" else torch.float64  # grouped GEMMs have no fp64
    x, a, b = (
        torch.randn(tokens, 8, dtype=dtype),
        torch.randn(r if shared else experts * r, 8, dtype=dtype),
        torch.randn(12, experts * r),
    )
    b, decision = b.to(dtype), routing(tokens, experts, k, dtype)
    want = torch.zeros(tokens, 12, dtype=torch.float64)
    for t in range(tokens):
        for e in range(experts):
            rows = slice(e * r, (e + 1) * r)
            code = (a if shared else a[rows]).double() @ x[t].double()
            want[t] += 1.5 * decision.weights[t, e].double() * (b[:, rows].double() @ code)
    assert_near(name, forms.FORMS[name](x, a, b, decision, 1.5), want, 1e-6 if name == "grouped" else 1e-13)


@pytest.mark.parametrize("name", forms.FFN_FORMS)
def test_every_feed_forward_form_is_the_equation(name):
    torch.manual_seed(0)
    tokens, d, f, experts, r = 9, 6, 10, 4, 3

    def randn(*shape):
        return torch.randn(shape, dtype=torch.float64)

    x, decision = randn(tokens, d), routing(tokens, experts, 2, torch.float64)
    frozen = {"gate": randn(f, d), "up": randn(f, d), "down": randn(d, f)}
    p = {f"{n}_A": randn(experts * r, w.shape[1]) for n, w in frozen.items()} | {
        f"{n}_B": randn(w.shape[0], experts * r) for n, w in frozen.items()
    }
    want = torch.zeros(tokens, d, dtype=torch.float64)
    for t in range(tokens):
        for e in range(experts):
            rows = slice(e * r, (e + 1) * r)
            merged = {n: w + 0.5 * p[f"{n}_B"][:, rows] @ p[f"{n}_A"][rows] for n, w in frozen.items()}
            inner = F.silu(merged["gate"] @ x[t]) * (merged["up"] @ x[t])
            want[t] += decision.weights[t, e] * (merged["down"] @ inner)
    assert_near(name, forms.FFN_FORMS[name](x, p, frozen, decision, 0.5), want, 1e-13)


@pytest.mark.parametrize("name", mixture.CASES)
def test_rivals_of_a_mixture_agree(name):
    drawn = mixture.draw(mixture.CASES[name], TINY).to(torch.float64)
    x, dy = (t.detach().double() for t in mixture.inputs(TINY, drawn))
    found, reasons = mixture.rivals(drawn, torch.device("cpu"), torch.float64, compiled=False)
    results = {
        rival: mixture.gradients(f, x.clone().requires_grad_(), dy, drawn.tensors)
        for rival, f in found.items()
        if rival != "grouped"
    }
    for rival, got in results.items():
        assert largest_error(got, results["loop"]) < 1e-10, rival
    assert set(reasons) <= {"loop, compiled"}


@pytest.mark.parametrize("name", ["molora", "moe_lora_topk"])
def test_ours_on_triton_agrees_too(name):
    drawn = mixture.draw(mixture.CASES[name], TINY)
    x, dy = mixture.inputs(TINY, drawn)
    got, want = (
        mixture.gradients(partial(drawn.ours, name=backend), x, dy, drawn.tensors)
        for backend in ("triton", "torch")
    )
    assert largest_error(got, want) < 1e-5


def test_inputs_leave_no_selection_to_rounding():
    setting = replace(TINY, tokens=4096, experts=3)
    drawn = mixture.draw(mixture.CASES["moe_lora_topk"], setting)
    x, _ = mixture.inputs(setting, drawn)
    scores = (x.double() @ drawn.tensors["weight"].double().t()).sort(-1, descending=True).values
    assert (scores[:, 1] - scores[:, 2]).min() > 1e-4


@pytest.mark.parametrize(
    ("dtype", "widths", "fits"),
    [("bf16", (8, 1024), True), ("bf16", (4, 1024), False), ("fp32", (4, 43), False)],
)
def test_grouped_gemms_that_cannot_run_say_why(dtype, widths, fits):
    why = forms.grouped_unfit({"bf16": torch.bfloat16, "fp32": torch.float32}[dtype], *widths)
    assert (why is None) == fits
    assert fits or "16 bytes" in why


# Parts of a model


def part(level: str, **sizes) -> Setting:
    return replace(TINY, level=level, width=64, experts=3, rank=4, tokens=24, **sizes)


@pytest.mark.parametrize("level", ["linear", "ffn", "block"])
def test_peers_agree_with_attached_methods(level):
    report = Report()
    names = [n for n in levels.METHODS[level] if n in whole.PEERS]
    levels.check_parts(part(level), report, names, lambda name: True)
    assert not report.disagreements


@pytest.mark.parametrize(
    ("table", "form", "level"),
    [("FORMS", "gather", "linear"), ("FORMS", "loop", "block"), ("FFN_FORMS", "vanilla", "ffn")],
)
def test_a_wrong_form_is_found(monkeypatch, table, form, level):
    right = getattr(forms, table)[form]
    monkeypatch.setitem(getattr(forms, table), form, lambda *args: right(*args) * 1.01)
    report = Report()
    levels.check_parts(
        part(level), report, [n for n in levels.METHODS[level] if n in whole.PEERS], lambda name: True
    )
    assert any(form in line or form == "loop" for line in report.disagreements)
    assert command.finish(report, None) == 1


def test_a_part_runs_on_the_backend_of_its_rival():
    setting = whole.small(part("linear"))
    base = whole.llama(setting, 1)
    ours, (x, dy) = whole.attach("molora", base, setting), whole.hidden(setting)
    ys = [
        whole.forward_backward(setting, whole.Rival("molora", b, ours, b), x, dy) for b in ("torch", "triton")
    ]
    assert relative_error(ys[1], ys[0]) < 1e-5


def test_the_floor_is_the_flop_count_by_hand():
    frozen = torch.nn.Linear(4, 8, bias=False).requires_grad_(False)
    model = torch.nn.Sequential(frozen)
    model.register_parameter("a", torch.nn.Parameter(torch.zeros(2, 4)))
    model.config = type("Config", (), {"hidden_size": 4, "num_hidden_layers": 1})
    assert whole.floor(model, length=10) == pytest.approx(1 + 6 * 8 / (4 * 32 + 7 * 10 * 4))


def test_a_method_takes_the_sizes_of_the_comparison():
    setting = part("block")
    for name, attribute in (("molora", "lora"), ("mixlora", "ffn_lora")):
        main = whole.catalog.parse(whole.sized(name, setting)).mixtures[0]
        bank = main.banks[attribute]
        assert (bank.n, bank.r, bank.dropout) == (3, 4, 0.0), name
    assert whole.catalog.parse(whole.sized("moe_lora_topk", replace(setting, k=1))).mixtures[0].router.k == 1
    assert len(whole.catalog.parse(whole.sized("mixlora", part("ffn"))).mixtures) == 1


def test_saved_bytes_of_a_block_by_hand():
    """A rank-4 LoRA in the model's dtype keeps S [T, 4] for dB and, with the inputs of the seven linears,
    nothing else."""
    setting = part("block")
    base = whole.llama(setting, 1)
    frozen, lora = (
        whole.Rival("frozen", "frozen", base),
        whole.Rival("lora", "PEFT", whole.peft_lora(base, setting, 4, True)),
    )
    (total, inputs), (base_total, base_inputs) = (
        levels.saved_bytes(setting, lora),
        levels.saved_bytes(setting, frozen),
    )
    assert total - inputs - base_total + base_inputs == 7 * 4 * 4
    assert inputs > base_inputs


# Counters


@pytest.mark.parametrize(
    "waiting",
    [
        lambda x: x.nonzero(),
        lambda x: torch.where(x > 0),
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).any()),
        lambda x: x[x > 0],
        lambda x: x.clone().index_put_((x > 0,), torch.tensor(0.0)),
        lambda x: x.masked_select(x > 0),
        lambda x: x.int().abs().bincount(minlength=9),
        lambda x: x.unique(),
        lambda x: torch.repeat_interleave(x, x.int().abs() + 1),
        lambda x: F.one_hot(x.long().abs()),
    ],
)
def test_waits_are_counted(waiting):
    with Counted() as counted:
        waiting(torch.linspace(-1, 2, 5))
    assert counted.waits.total() >= 1, counted.launches


@pytest.mark.parametrize(
    "quiet",
    [
        lambda x: x[torch.tensor([0, 2])],
        lambda x: x.where(x > 0, 0.0),
        lambda x: x.repeat_interleave(3),
        lambda x: x.topk(2),
    ],
)
def test_what_needs_no_host_is_no_wait(quiet):
    x = torch.linspace(-1, 2, 5)
    with Counted() as counted:
        quiet(x)
    assert not counted.waits


def test_launches_are_operators_that_are_no_views():
    x = torch.randn(6, 4, requires_grad=True)
    with Counted() as counted:
        y = (x.view(4, 6).t() @ torch.ones(4, 2)).transpose(0, 1)  # ones, mm
        y.sum().backward()  # sum, ones_like, and the product's gradient
    assert counted.launches["aten.mm.default"] == 2
    assert not [
        n
        for n, count in counted.launches.items()
        if count and ("view" in n or n.startswith(("aten.t.", "aten.transpose")))
    ]


def test_a_saved_storage_counts_once():
    x = torch.randn(10, 4, requires_grad=True)
    with saved_storages() as found:
        y = x.exp()  # keeps its result
        z = y * y.view(4, 10).view(10, 4)  # keeps y twice, as two views
    assert found == {y.untyped_storage().data_ptr(): 160}
    del z


def test_rounds_are_interleaved_and_the_warm_up_does_not_count():
    calls = []
    seconds = interleaved(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3, torch.device("cpu"), warm_up=2
    )
    assert calls == ["a", "b"] * 5
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}


def test_ratios_are_medians_over_the_rounds():
    report = Report()
    row = report.add(TINY, "molora", "loop", "time", "s", [2.0, 9.0, 4.0], "torch", [1.0, 3.0, 4.0])
    assert (row.ratio, row.median, row.n) == (2.0, 4.0, 3)
    assert quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 3.0, 4.0)


def test_errors_that_are_not_finite_or_not_there_disagree():
    one = {"y": torch.ones(3), "x": torch.ones(2)}
    assert relative_error(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0])) == pytest.approx(0.5**0.5)
    report = Report()
    for got in (
        {"y": torch.ones(3)},
        {"y": torch.full((3,), torch.nan), "x": torch.ones(2)},
        {"y": torch.ones(3), "x": torch.ones(2) * 2},
    ):
        report.check("rival", largest_error(got, one), torch.float32)
    report.check("same", largest_error(one, one), torch.float32)
    assert len(report.disagreements) == 3


# Goals


def test_goals_are_met_missed_or_not_measured():
    report, setting = Report(), replace(TINY, level="model", width=256)
    for case, ratio, floor in (("molora", 1.3, 1.2), ("mixlora", 2.0, 1.3)):
        report.add(setting, case, "torch", "step", "s", [ratio], "frozen", [1.0])
        report.add(setting, case, "torch", "floor of the step", "ratio", [floor])
    assert goals.above_floor(report) == {
        "molora 256 fp32": pytest.approx(1.3 / 1.2),
        "mixlora 256 fp32": pytest.approx(2.0 / 1.3),
    }
    lines = {line.split()[0]: line for line in goals.summary(report, "cpu").splitlines()}
    assert "MISSED at 1 of 2; worst 1.54 (mixlora 256 fp32)" in lines["step"]
    assert "not measured" in lines["G11"] and "G1" not in lines
    mixed = replace(TINY, width=1024, dtype="bf16")
    for rival, seconds in (("torch", 1.0), ("loop", 12.5)):
        report.add(mixed, "molora", rival, "time", "s", [seconds])
    assert "met; 12.5" in next(
        line for line in goals.summary(report, "cpu").splitlines() if line.split()[0] == "G9"
    )


def test_every_goal_can_be_measured_by_a_rival_that_exists():
    """The rivals that goals speak of are those that the levels make."""
    made = {"torch", "triton", "frozen", "loop", "PEFT r8"} | {f for fs in whole.PEERS.values() for f in fs}
    for goal in goals.GOALS:
        cells = [c.cell_contents for c in goal.values.__closure__ or ()]
        for case, rival in (c for c in cells if isinstance(c, tuple)):
            assert rival in made and (case in {"frozen", "lora"} or case in whole.catalog.names()), goal.name


# Command line


def test_the_command_writes_its_table_and_picture(tmp_path, capsys):
    argv = (
        "mixture linear --width 64 --dtype fp32 --tokens 16 --rank 4 --rounds 2 --methods molora "
        "--rivals torch loop PEFT --quick"
    )
    assert command.main([*argv.split(), "--out", str(tmp_path)]) == 0
    rows = list(csv.DictReader((tmp_path / "measurements.csv").open()))
    assert {(r["level"], r["rival"]) for r in rows} == {
        ("mixture", "torch"),
        ("mixture", "loop"),
        ("linear", "frozen"),
        ("linear", "PEFT r8"),
        ("linear", "PEFT r64"),
        ("linear", "torch"),
        ("linear", "loop"),
    }
    assert {r["quantity"] for r in rows} == {"time", "launches", "host waits"}
    assert (tmp_path / "ratios.png").stat().st_size > 1000
    out = capsys.readouterr().out
    assert "goals (cpu)" in out and "DISAGREES" not in out


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["modle"], "modle"),
        (["mixture", "--k", "9"], "--k 9"),
        (["mixture", "--rank", "0"], "--rank 0"),
        (["mixture", "--methods", "molorra"], "molorra"),
        (
            [
                "mixture",
                "--methods",
                "hydralora",
                "--width",
                "16",
                "--tokens",
                "4",
                "--rounds",
                "1",
                "--rivals",
                "loup",
                "--quick",
            ],
            "loup",
        ),
    ],
)
def test_wrong_arguments_are_errors_that_name_them(argv, named, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(argv)
    assert stopped.value.code == 2
    assert named in capsys.readouterr().err


def test_a_whole_model_is_measured():
    report, setting = Report(), replace(part("model"), tokens=16)
    levels.measure_model(
        setting,
        report,
        ["molora", "moa_sparse", "molora_oracle", "lora"],
        Options(1, lambda n: True, 1, False),
    )
    assert not report.disagreements
    assert {r.quantity for r in report.rows} == {
        "step",
        "floor of the step",
        "launches",
        "host waits",
        "decode of 16 tokens",
    }
    assert goals.added_waits(report) == {"molora 64 fp32": 0, "moa_sparse 64 fp32": 0}
    assert {r.case for r in report.find(quantity="step")} == {
        "frozen",
        "molora",
        "moa_sparse",
        "molora_oracle",
        "lora",
    }
    assert all(r.ratio > 0 for r in report.find(quantity="step"))
