"""Identities between methods that the cards state: one expert is LoRA, forced gates give the naive sum,
limits of thresholds, equal ones.

Run: python -m pytest tests/methods/test_equivalences.py
"""

from __future__ import annotations

import pytest
import references
import torch
from tiny import (
    METHODS,
    MIXTURES,
    ROUTED,
    answer_only,
    assert_near,
    attached,
    base,
    batch,
    given,
    logits,
    trainable,
)

BOUND = 1e-5
ALONE = {name: references.of("methods", name).ONE_EXPERT for name in MIXTURES}
"""Overrides by method with which one expert is plain LoRA."""
LINEAR = [
    name
    for name in ROUTED
    if METHODS[name].mixtures[0].site == "linear"
    and METHODS[name].mixtures[0].router.linear
    and all(bank.low_rank for bank in METHODS[name].mixtures[0].banks.values())
]
"""Routers of one linear map and low-rank experts on each linear."""
ONE = {"experts.n": 1, "experts.r": 4, "experts.alpha": 6}


def site_tensors(model):
    """(bank, place, layer) -> tensors of every bank, for copying between methods."""
    found = {}
    for site in model.base_model.sites():
        for bank in site.banks:
            found[bank.name, bank.place, site.name.split(".")[2]] = bank.tensors
    return found


@torch.no_grad()
def copy_banks(source, target):
    """Give the experts of `target` the values that the experts of `source` have at the same places."""
    given = {key[1:]: tensors for key, tensors in site_tensors(source).items()}
    for key, tensors in site_tensors(target).items():
        for name, tensor in tensors.items():
            tensor.copy_(given[key[1:]][name])
    return target


@torch.no_grad()
def force_gates(model, values):
    """Make a linear gate network give the constant gates 0 or 1 (sigmoid of -200 and 200 are exact in fp32),
    one for each output."""
    for site in model.base_model.sites():
        site.tensors["weight"].zero_()
        site.tensors["bias"].copy_(torch.tensor([400.0 * v - 200.0 for v in values]))
    return model


def peft_lora(model, **overrides):
    """PEFT's LoRA with the values of a one-expert mixture."""
    lora = attached("lora", **{"experts.r": 4, "experts.alpha": 6, **overrides})
    modules = dict(lora.named_modules())
    with torch.no_grad():
        for site in model.base_model.sites():
            for bank in site.banks:
                parent = "mlp" if bank.place in ("gate", "up", "down") else "self_attn"
                layer = modules[
                    f"base_model.model.model.layers.{site.name.split('.')[2]}.{parent}.{bank.place}_proj"
                ]
                layer.lora_A["default"].weight.copy_(bank.A)
                layer.lora_B["default"].weight.copy_(bank.B)
    return lora


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("name", [*(n for n, options in ALONE.items() if options is not None), "none"])
def test_one_expert_is_lora(name, rslora):
    """Outputs and gradients equal PEFT's LoRA with the same A and B (p = 1 for a softmax over one expert)."""
    options = ALONE.get(name, {"router.kind": "none"}) | {"experts.targets": ["q", "k", "v", "o", "down"]}
    model = attached("molora" if name == "none" else name, **ONE, **{"experts.rslora": rslora}, **options)
    lora = peft_lora(model, **{"experts.rslora": rslora})
    inputs = batch(left=2)
    for m in (model, lora):
        m(**given(m, inputs), labels=answer_only(inputs["input_ids"])).loss.backward()
    assert_near("logits", logits(model, **inputs), logits(lora, **inputs), BOUND)
    modules = dict(lora.named_modules())
    sites = model.base_model.sites()
    for site, bank in ((one, bank) for one in sites for bank in one.banks):
        parent = "mlp" if bank.place == "down" else "self_attn"
        layer = modules[f"base_model.model.model.layers.{site.name.split('.')[2]}.{parent}.{bank.place}_proj"]
        assert_near(f"{site.name}.A.grad", bank.A.grad, layer.lora_A["default"].weight.grad, 1e-4)
        assert_near(f"{site.name}.B.grad", bank.B.grad, layer.lora_B["default"].weight.grad, 1e-4)


def test_one_mixlora_expert_is_lora_on_the_block():
    model = attached(
        "mixlora", **ONE, **{"router.k": 1, "experts.dropout": 0.0, "also.attention.experts.targets": ["q"]}
    )
    lora = attached(
        "lora", **{"experts.r": 4, "experts.alpha": 6, "experts.targets": ["q", "gate", "up", "down"]}
    )
    modules = dict(lora.named_modules())
    with torch.no_grad():
        for site in model.base_model.sites():
            layer = f"base_model.model.model.layers.{site.name.split('.')[2]}"
            for bank in site.banks:
                roles = (
                    {"q": "self_attn.q_proj"}
                    if bank.place == "q"
                    else {r: f"mlp.{r}_proj" for r in ("gate", "up", "down")}
                )
                for role, path in roles.items():
                    prefix = "" if role == "q" else f"{role}_"
                    modules[f"{layer}.{path}"].lora_A["default"].weight.copy_(bank.tensors[f"{prefix}A"])
                    modules[f"{layer}.{path}"].lora_B["default"].weight.copy_(bank.tensors[f"{prefix}B"])
    assert_near("logits", logits(model, **batch(left=2)), logits(lora, **batch(left=2)), BOUND)


def test_rslora_is_lora_at_another_alpha():
    inputs = batch()
    first, second = (
        attached("rslora", **{"experts.r": 4, "experts.alpha": 6}),
        attached("lora", **{"experts.r": 4, "experts.alpha": 12}),
    )
    assert_near("logits", logits(first, **inputs), logits(second, **inputs), 1e-6)


@pytest.mark.parametrize("name", LINEAR)
def test_equal_experts_make_the_router_irrelevant(name):
    sizes = references.of("methods", name).SIZES
    model = attached(name, **(sizes | {"experts.n": 3, "experts.r": 2}))
    with torch.no_grad():
        for site in model.base_model.sites():
            a, b = site.banks[0].A, site.banks[0].B
            if a.shape[0] > 2:
                a.copy_(a[:2].repeat(3, 1))
            b.copy_(b[:, :2].repeat(1, 3))
        want = logits(model, **batch())
        for site in model.base_model.sites():
            site.tensors["weight"].mul_(-3.0)
    assert_near("logits", logits(model, **batch()), want, BOUND)


@pytest.mark.parametrize("name", [*LINEAR, *(n for n in ROUTED if METHODS[n].mixtures[0].site == "ffn")])
def test_permuting_experts_with_their_router_rows_changes_nothing(name):
    sizes = references.of("methods", name).SIZES
    model = attached(name, **(sizes | {"experts.n": 4, "experts.r": 2}))
    want = logits(model, **batch())
    order = torch.tensor([2, 0, 3, 1])
    rows = (order[:, None] * 2 + torch.arange(2)).flatten()
    with torch.no_grad():
        for site in (s for s in model.base_model.sites() if s.router is not None):
            for tensor in site.tensors.values():
                if tensor.shape[0] >= 4:
                    tensor[:4] = tensor[order]  # a threshold's row comes after the experts'
            for key, tensor in site.banks[0].tensors.items():
                if key.endswith("B"):
                    tensor.copy_(tensor[:, rows])
                elif tensor.shape[0] == 8:
                    tensor.copy_(tensor[rows])
    assert_near("logits", logits(model, **batch()), want, BOUND)


@pytest.mark.parametrize(
    ("name", "selective"), [("moe_lora_topk", {"router.k": 3}), ("adamole", {"router.tau_max": 1e-9})]
)
def test_selecting_everything_is_the_soft_mixture(name, selective):
    """k = E, and tau -> 0, give MoLoRA."""
    many = {"experts.n": 3, "experts.r": 2, "router.bias": False}
    soft, hard = attached("molora", **many), attached(name, **many, **selective)
    copy_banks(soft, hard)
    with torch.no_grad():
        for one, other in zip(soft.base_model.sites(), hard.base_model.sites(), strict=True):
            other.tensors["weight"][:3].copy_(one.tensors["weight"])
    assert_near("logits", logits(hard, **batch()), logits(soft, **batch()), BOUND)


def test_naive_sum_is_the_block_mixture_with_gates_forced_to_one():
    plain, inputs = attached("naive_sum"), batch(left=2)
    want = logits(plain, **inputs)
    for name, outputs in (("moa_soft", 7), ("moa_instance", 7), ("unipeft", 3)):
        model = force_gates(copy_banks(plain, attached(name, **{"router.net": "linear"})), [1] * outputs)
        assert_near(name, logits(model, **inputs), want, BOUND)
    only_lora = attached(
        "naive_sum",
        **{"experts.prompt": None, "experts.parallel_adapter": None, "experts.r": 4, "experts.alpha": 6},
    )
    assert_near("LoRA alone", logits(only_lora, **inputs), logits(peft_lora(only_lora), **inputs), BOUND)


@pytest.mark.parametrize("output", range(7))
def test_a_gate_of_zero_removes_exactly_its_adapter(output):
    """Setting one gate to 0 equals zeroing that adapter's last factor, and no other."""
    model = force_gates(attached("moa_soft", **{"router.net": "linear"}), [i != output for i in range(7)])
    got = logits(model, **batch())
    force_gates(model, [1] * 7)
    everything = logits(model, **batch())
    name = model.base_model.sites()[0].experts[output]
    with torch.no_grad():
        for site in model.base_model.sites():
            bank = next(
                b for b in site.banks if name in (b.place, b.name) and (b.name == name or b.name == "lora")
            )
            for key in ("B", "gamma", "up", "up_bias"):
                if key in bank.tensors:
                    bank.tensors[key].zero_()
    assert_near(name, got, logits(model, **batch()), BOUND)
    assert (got - everything).norm() > 1e-2 * everything.norm(), f"{name} has no effect"


def test_sparse_moa_at_its_limits():
    """Gamma_max = 0 is soft MoA without the prompt; a constant Gamma_max above 1 is the base, bitwise."""
    soft, inputs = attached("moa_soft", **{"experts.prompt": None}), batch(left=2)
    sparse = copy_banks(soft, attached("moa_sparse", **{"router.gamma_max": 0.0}))
    with torch.no_grad():
        for one, other in zip(soft.base_model.sites(), sparse.base_model.sites(), strict=True):
            for name, tensor in one.tensors.items():
                other.tensors[name].copy_(tensor)
    assert_near("Gamma_max = 0", logits(sparse, **inputs), logits(soft, **inputs), 1e-6)
    nothing = attached("moa_sparse", **{"router.gamma_max": 1.5, "router.dynamic": False})
    assert torch.equal(logits(nothing, **inputs), logits(base(), **inputs))


def test_official_slip_ties_the_adapter_to_the_prompts_gate():
    """unipeft.md: with the published slip the adapter follows the prompt's gate, and its own gate learns
    nothing."""
    slip = {"lora": "lora", "prompt": "prompt", "parallel_adapter": "prompt"}
    model = attached("unipeft", gates=slip)
    model(**batch(), labels=answer_only(batch()["input_ids"])).loss.backward()
    for site in model.base_model.sites():
        grad = site.tensors["weight"].grad
        assert grad[:2].norm(dim=1).gt(0).all() and not grad[2].count_nonzero()
    closed = force_gates(attached("unipeft", gates=slip), [1, 0, 1])
    without = force_gates(attached("unipeft"), [1, 0, 0])
    assert_near("logits", logits(closed, **batch()), logits(without, **batch()), BOUND)


def test_shared_a_gets_gradient_from_all_experts():
    """hydralora.md: one A; its gradient is the sum over experts, and the output is linear in the B's for
    fixed weights."""
    model = attached(
        "hydralora",
        **{"experts.n": 3, "experts.r": 2, "experts.targets": ["down"]},
        model=base(num_hidden_layers=1),
    )
    bank = model.base_model.sites()[0].banks[0]
    assert bank.A.shape == (2, 48) and bank.B.shape == (32, 6)
    kept, hidden = bank.B.detach().clone(), torch.randn(1, 4, 48)
    down = model.base_model.model.model.layers[0].mlp.down_proj
    outputs, grads = [], []
    for experts in ([0], [1], [2], [0, 1, 2]):
        with torch.no_grad():
            bank.B.copy_(kept * torch.tensor([float(e in experts) for e in range(3)]).repeat_interleave(2))
        bank.A.grad = None
        increment = down(hidden) - down.base_layer(hidden)
        increment.sum().backward()
        outputs.append(increment.detach())
        grads.append(bank.A.grad.clone())
    assert_near("output", sum(outputs[:3]), outputs[3], BOUND)
    assert_near("A.grad", sum(grads[:3]), grads[3], BOUND)
    assert len([n for n in trainable(model) if n.endswith("__A")]) == 1
