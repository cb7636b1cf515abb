"""Configs of methods: what is refused and how the error reads, overrides, adapter folders from strangers,
imports.

Run: python -m pytest tests/methods/test_spec.py
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from tiny import MIXTURES, attached, base

from moabench import methods
from moabench.methods import catalog
from moabench.methods.bank import Experts
from moabench.methods.loss import Loss
from moabench.methods.router import Router
from moabench.methods.spec import ConfigError, drop_stale, nearest

REFUSED = [  # method, override, what the message must contain
    ("molora", {"experts.r": 0}, ["experts.r", "0", ">= 1"]),
    ("molora", {"experts.r": -1}, ["experts.r", "-1", ">= 1"]),
    ("molora", {"experts.r": "abc"}, ["experts.r", "abc"]),
    ("molora", {"experts.r": 2.5}, ["experts.r", "2.5"]),
    ("molora", {"experts.r": True}, ["experts.r", "True"]),
    ("molora", {"experts.r": [4, 4]}, ["experts", "r", "n=8"]),
    ("molora", {"experts.r": [4, 4, 4, 0, 4, 4, 4, 4]}, ["experts.r", "0"]),
    ("molora", {"experts.n": 0}, ["experts.n", "0", ">= 1"]),
    ("molora", {"experts.alpha": -1}, ["experts.alpha", "-1", ">= 0"]),
    ("molora", {"experts.alpha": float("nan")}, ["experts.alpha", "nan"]),
    ("molora", {"experts.dropout": 1.0}, ["experts.dropout", "1.0", "< 1"]),
    ("molora", {"experts.targets": []}, ["targets", "q, k, v"]),
    ("molora", {"experts.targets": ["q", "q"]}, ["targets", "once"]),
    ("molora", {"experts.targets": ["q", "z"]}, ["targets[1]", "z"]),
    ("molora", {"experts.targets": "q"}, ["targets", "q"]),
    ("molora", {"experts.kind": "lorra"}, ["experts", "lorra", "Did you mean 'lora'"]),
    ("molora", {"experts.kind": "prompt"}, ["prompt", "site=linear"]),
    ("molora", {"experts.rank": 4}, ["experts.rank", "4"]),
    ("molora", {"router.kind": "topp"}, ["router.kind", "topp", "Did you mean"]),
    ("molora", {"router": {"bias": True, "kind": None}}, ["router"]),
    ("molora", {"routr": {}}, ["routr", "Did you mean 'router'"]),
    ("molora", {"site": "nowhere"}, ["site", "nowhere", "linear"]),
    ("molora", {"gates": "family"}, ["gates", "expert"]),
    ("molora", {"router.granularity": "word"}, ["granularity", "word"]),
    ("molora", {"losses.switch_balace.coef": 1}, ["losses.switch_balace", "Did you mean 'switch_balance'"]),
    ("molora", {"dora": True}, ["dora", "tuner=peft"]),
    ("hydralora", {"experts.r": [8] * 8}, ["r=", "share A"]),
    ("moe_lora_topk", {"router.k": 9}, ["router", "k=9", "8"]),
    ("moe_lora_topk", {"router.k": 0}, ["router.k", "0", ">= 1"]),
    ("moe_lora_topk", {"experts.n": 1}, ["router", "k=2", "1"]),
    ("moe_lora_topk", {"router.K": 2}, ["router.K", "2", "k"]),
    ("adamole", {"router.tau_max": 0}, ["router.tau_max", "> 0"]),
    ("mixlora_dynamic", {"router.p": 1.0}, ["router.p", "1.0", "< 1"]),
    ("mixlora", {"also.attention.experts.targets": ["q", "z"]}, ["also.attention.experts", "z"]),
    ("mixlora", {"experts.kind": "lora"}, ["lora", "site=ffn"]),
    ("moa_soft", {"experts.rr": 4}, ["experts.rr", "4"]),
    ("moa_soft", {"experts.prompt.length": 0}, ["prompt.length", "0", ">= 1"]),
    ("moa_soft", {"experts.parallel_adapter.bottleneck": -3}, ["bottleneck", "-3"]),
    ("moa_soft", {"input": "norm"}, ["input", "norm", "normed"]),
    ("moa_sparse", {"router.gamma_max": -0.5}, ["gamma_max", "-0.5"]),
    ("moa_sparse", {"router.grad": "straight"}, ["router.grad", "straight", "ste"]),
    ("unipeft", {"gates": {"lora": "promt"}}, ["gates", "promt", "Did you mean 'prompt'"]),
    ("naive_sum", {"losses": {"z_loss": {"coef": 1.0}}}, ["losses", "z_loss"]),
    ("lora", {"experts.n": 3}, ["n=3", "tuner=peft"]),
    ("lora", {"router.kind": "softmax"}, ["router.kind", "tuner=peft"]),
    ("dora", {"experts.r": [4]}, ["experts.r=[4]", "tuner=peft"]),
    ("full", {"experts": {"kind": "lora"}}, ["experts", "tuner=full"]),
]


@pytest.mark.parametrize("name", catalog.names())
def test_shipped_methods_are_valid(name):
    method = catalog.parse(catalog.raw(name))
    assert method.name == name and catalog.raw(name)["about"]
    if method.tuner in ("mixture", "peft"):
        assert methods.load(name).peft_type is not None
    else:
        with pytest.raises(ConfigError, match="attach"):
            methods.load(name)


@pytest.mark.parametrize(
    ("name", "override", "parts"), REFUSED, ids=lambda v: next(iter(v)) if isinstance(v, dict) else None
)
def test_bad_configs(name, override, parts):
    with pytest.raises(ConfigError) as error:
        catalog.parse(catalog.override(catalog.raw(name), override))
    for part in parts:
        assert part in str(error.value), f"{part!r} is not in: {error.value}"
    assert "\n" not in str(error.value) and isinstance(error.value, ValueError)


def test_unknown_method_names_the_nearest():
    with pytest.raises(ConfigError, match="Did you mean 'moa_sparse'"):
        methods.load("moa_spars")
    with pytest.raises(ConfigError):
        methods.load("../method/lora")
    assert nearest("k", []) == ""


def test_a_new_kind_drops_the_options_of_the_old_one_but_no_typo():
    """`router.kind=topk` alone turns AdaMoLE into a top-k mixture."""
    method = catalog.parse(catalog.override(catalog.raw("adamole"), {"router.kind": "topk", "router.k": 3}))
    assert (
        method.mixtures[0].router.kind == "topk"
        and method.mixtures[0].router.k == 3
        and method.mixtures[0].router.bias
    )
    with pytest.raises(ConfigError, match="taumax"):
        catalog.parse(catalog.override(catalog.raw("adamole"), {"router.kind": "topk", "router.taumax": 3}))
    with pytest.raises(ConfigError, match=r"tau_mx.*Did you mean 'tau_max'"):
        catalog.parse(catalog.override(catalog.raw("adamole"), {"router.tau_mx": 3}))
    assert drop_stale(
        {"kind": "topk", "k": 1, "tau_max": 1}, {"kind": "adaptive_threshold", "tau_max": 1}, Router, ""
    ) == {
        "kind": "topk",
        "k": 1,
    }


def test_overrides_nest_dot_and_remove():
    data = {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
    assert catalog.override(data, {"a.c.d": 5, "a": {"b": 4}, "f.g": 6}) == {
        "a": {"b": 4, "c": {"d": 5}},
        "e": 3,
        "f": {"g": 6},
    }
    assert data == {"a": {"b": 1, "c": {"d": 2}}, "e": 3}, "the original changed"
    assert (
        "prompt"
        not in catalog.parse(catalog.override(catalog.raw("moa_soft"), {"experts.prompt": None}))
        .mixtures[0]
        .banks
    )
    first = catalog.raw("molora")
    first["experts"]["n"] = 99
    assert catalog.raw("molora")["experts"]["n"] == 8, "raw() hands out its cache"


def test_shared_scalars_reach_every_bank_that_knows_them():
    banks = (
        catalog.parse(catalog.override(catalog.raw("moa_soft"), {"experts.r": 5, "experts.n": 2}))
        .mixtures[0]
        .banks
    )
    assert banks["lora"].r == 5 and [b.n for b in banks.values()] == [2, 2, 2]
    attention = (
        catalog.parse(catalog.override(catalog.raw("mixlora"), {"experts.r": 5})).mixtures[1].banks["lora"]
    )
    assert (attention.r, attention.alpha, attention.dropout, attention.n) == (5, 32, 0.05, 1)


def test_router_outputs_are_in_the_order_of_the_official_code():
    """moa_soft.md: Q, K, V, prompt, O, then UP, GATE, DOWN, then the adapter; whatever the order of the
    YAML's keys."""
    names = catalog.parse(catalog.raw("moa_soft")).mixtures[0].expert_names
    assert names == ("q", "k", "v", "prompt", "o", "down", "parallel_adapter")
    data = catalog.override(
        catalog.raw("moa_soft"), {"experts.lora.targets": ["down", "gate", "up", "o", "q"]}
    )
    data["experts"] = dict(sorted(data["experts"].items(), reverse=True))
    assert catalog.parse(data).mixtures[0].expert_names == (
        "q",
        "prompt",
        "o",
        "up",
        "gate",
        "down",
        "parallel_adapter",
    )
    assert catalog.parse(catalog.raw("unipeft")).mixtures[0].expert_names == (
        "lora",
        "prompt",
        "parallel_adapter",
    )


@pytest.mark.parametrize("family", [Router, Experts, Loss])
def test_kinds_register_under_their_own_family(family):
    kinds = family.kinds()
    assert kinds and all(issubclass(c, family) and c.kind == k for k, c in kinds.items())


@pytest.mark.parametrize("name", MIXTURES)
def test_config_round_trip(name, tmp_path):
    """adapter_config.json holds plain data; what is read equals what was written."""
    from peft import PeftConfig

    config = methods.load(name)
    config.save_pretrained(tmp_path)
    text = json.loads((tmp_path / "adapter_config.json").read_text())
    assert text["peft_type"] == "MIXTURE" and text["spec"]["name"] == name
    assert PeftConfig.from_pretrained(tmp_path).spec == config.spec


@pytest.mark.parametrize(
    "kind",
    [
        "evil",
        "os.system",
        "moabench.methods.routers.topk",
        "../../topk",
        "__import__('os').system('touch hacked')",
        ["topk"],
        {"a": 1},
        None,
        3,
    ],
    ids=str,
)
def test_a_strangers_adapter_runs_no_code(kind, tmp_path, monkeypatch):
    """Kinds are looked up among our own by name; nothing in an adapter folder is imported or evaluated."""
    from peft import PeftModel

    attached("molora").save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    data = json.loads(path.read_text())
    (tmp_path / "evil.py").write_text("raise SystemExit('imported')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for part in ("router", "experts"):
        changed = json.loads(json.dumps(data))
        changed["spec"][part]["kind"] = kind
        path.write_text(json.dumps(changed))
        with pytest.raises(ConfigError):
            PeftModel.from_pretrained(base(), tmp_path)
    assert "evil" not in sys.modules and not (tmp_path / "hacked").exists()


@pytest.mark.parametrize(
    "spec",
    [None, [], "molora", {}, {"name": "molora", "tuner": "peft"}, {"name": "x", "experts": 3}],
    ids=str,
)
def test_an_adapter_without_a_usable_spec_is_refused(spec, tmp_path):
    from peft import PeftModel

    attached("molora").save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "spec": spec}))
    with pytest.raises(ConfigError):
        PeftModel.from_pretrained(base(), tmp_path)


def python(*codes: str) -> list[str]:
    """Output of each code in a fresh interpreter, all at once."""
    started = [
        subprocess.Popen([sys.executable, "-c", c], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for c in codes
    ]
    outputs = [process.communicate(timeout=240) for process in started]
    for process, (_, errors) in zip(started, outputs, strict=True):
        assert process.returncode == 0, errors[-2000:]
    return [out.strip() for out, _ in outputs]


def test_importing_methods_is_light():
    heavy = "('torch', 'transformers', 'peft', 'lm_eval', 'wandb', 'pandas', 'datasets')"
    code = f"""
import sys, moabench.methods, moabench.methods.spec, moabench.methods.catalog as c
[c.parse(c.raw(n)) for n in c.names()]
print([m for m in {heavy} if m in sys.modules])"""
    assert python(code) == ["[]"]


def test_any_import_order_registers_the_tuner():
    check = (
        "from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING as m; print(m['MIXTURE'].__name__, "
        "moabench.methods.load('molora').peft_type)"
    )
    orders = (
        "import moabench.methods, peft",
        "import peft, moabench.methods",
        "import moabench.methods.tuner, peft, moabench.methods",
    )
    assert python(*(f"{order}; {check}" for order in orders)) == ["MixtureModel MIXTURE"] * 3
