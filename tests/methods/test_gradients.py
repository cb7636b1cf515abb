"""Gradients reach exactly what each card says, under plain backward, gradient checkpointing and gradient
accumulation.

Run: python -m pytest tests/methods/test_gradients.py
"""

from __future__ import annotations

import pytest
import references
import torch
from tiny import (
    ADAPTERS,
    METHODS,
    MIXTURES,
    ROUTED,
    answer_only,
    assert_near,
    attached,
    base,
    batch,
    given,
    losses,
    of_routers,
    randomise,
    train,
    trainable,
)

from moabench import methods
from moabench.methods import catalog


def backward(model, auxiliary: bool = False, inputs=None, seed: int = 0):
    """Gradients of the task loss (and the auxiliary losses) by parameter name, in training mode; None where
    there is none."""
    inputs = inputs or batch(left=2)
    model.train()
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    task, extra = losses(model, inputs, answer_only(inputs["input_ids"]))
    (task + sum(extra.values()) * auxiliary).backward()
    return {n: None if p.grad is None else p.grad.clone() for n, p in trainable(model).items()}


def part(name: str) -> tuple[str, str, str]:
    """(bank or `router`, place, tensor) of a mixture's parameter name."""
    return tuple(name.rpartition(".")[2].split("__")[1:])


def size(grad) -> float:
    return 0.0 if grad is None else grad.norm().item()


@pytest.mark.parametrize("name", ADAPTERS)
def test_the_base_gets_no_gradient(name):
    model = attached(name)
    backward(model, auxiliary=True)
    assert not [n for n, p in model.named_parameters() if not p.requires_grad and p.grad is not None]
    assert all(
        not p.requires_grad
        for n, p in model.named_parameters()
        if "base_layer" in n or ("embed" in n and "mixture" not in n)
    )


@pytest.mark.parametrize("name", MIXTURES)
def test_every_trained_tensor_learns_once_nothing_is_zero(name):
    overrides = references.of("methods", name).LEARNING
    grads = backward(attached(name, **overrides), auxiliary=True)
    assert not [n for n, g in grads.items() if size(g) == 0]
    assert all(g.isfinite().all() for g in grads.values())


@pytest.mark.parametrize("name", MIXTURES)
def test_gradients_at_step_zero(name):
    """B = 0: gradient for B, none for A and the linears' routers; gamma = 0: for gamma, none for the prompt
    (lora.md, moa_soft.md)."""
    model = attached(name, trained=False)
    for n, g in backward(model).items():
        bank, _, tensor = part(n)
        if tensor.endswith("A") or tensor == "embedding":
            assert size(g) == 0, f"{n}: {size(g)}"
        elif tensor.endswith("B") or tensor == "gamma":
            assert size(g) > 0, n
        elif bank == "router" and (bound := references.of("methods", name).ROUTER_AT_START) is not None:
            assert size(g) <= bound, f"{n}: {size(g)}"


@pytest.mark.parametrize("name", [n for n in ROUTED if "never" not in of_routers(n, "LEARNS")])
def test_routers_learn_once_the_experts_do(name):
    model = train(attached(name, trained=False), steps=2, lr=0.05)
    routers = {n: g for n, g in backward(model).items() if part(n)[0] == "router" and "threshold" not in n}
    assert routers
    quiet = [n for n, g in routers.items() if size(g) == 0]
    sometimes = "sometimes" in of_routers(name, "LEARNS")  # AdaMoLE: not where one expert is selected
    assert len(quiet) < len(routers) if sometimes else not quiet, quiet


@pytest.mark.parametrize(
    "name", [n for n in MIXTURES if any("prompt" in m.banks for m in METHODS[n].mixtures)]
)
def test_prompt_learns_after_gamma(name):
    model = attached(name, trained=False)
    train(model, steps=1, lr=0.05)
    grads = {part(n)[2]: size(g) for n, g in backward(model).items() if part(n)[0] == "prompt"}
    assert grads["gamma"] > 0 and grads["embedding"] > 0


@pytest.mark.parametrize("net", ["linear", "swiglu"])
def test_sparse_threshold_of_the_official_code_never_moves(net):
    """moa_sparse.md: the comparison passes no gradient; AdamW with weight decay leaves the head alone."""
    model = attached("moa_sparse", **{"router.net": net})
    heads = {n: p for n, p in trainable(model).items() if "threshold" in n}
    before = {n: p.detach().clone() for n, p in heads.items()}
    assert len(heads) == 4  # weight and bias in two layers
    assert all(g is None for n, g in backward(model).items() if "threshold" in n)
    train(model, steps=3, lr=0.1, weight_decay=0.5)
    for n, p in heads.items():
        assert p.grad is None and torch.equal(p, before[n]), n


@pytest.mark.parametrize("grad", ["subtract", "ste"])
def test_sparse_threshold_of_the_other_modes_learns(grad):
    model = attached("moa_sparse", **{"router.grad": grad})
    heads = {n: g for n, g in backward(model).items() if "threshold" in n}
    assert all(g is not None and g.isfinite().all() and size(g) > 0 for g in heads.values())


def test_constant_threshold_has_no_head():
    assert not [n for n in trainable(attached("moa_sparse", **{"router.dynamic": False})) if "threshold" in n]


@pytest.mark.parametrize(("renormalize", "learns"), [(True, False), (False, True)])
@pytest.mark.parametrize("name", ["moe_lora_topk", "mixlora"])
def test_top_one_router_learns_from_the_task_only_unrenormalised(name, renormalize, learns):
    model = attached(
        name, **{"router.k": 1, "router.renormalize": renormalize, "losses.switch_balance.coef": 0.5}
    )
    routers = [size(g) for n, g in backward(model).items() if part(n)[0] == "router"]
    assert all(s > 1e-6 for s in routers) if learns else not any(routers)
    assert all(
        size(g) > 0
        for n, g in backward(model, auxiliary=True).items()
        if part(n)[0] == "router" and part(n)[2] == "weight"
    )


def test_an_expert_without_tokens_gets_no_gradient():
    model = attached("moe_lora_topk", **{"experts.n": 4, "router.k": 2})
    with torch.no_grad():
        for n, p in trainable(model).items():
            if part(n)[0] == "router" and part(n)[2] == "bias":
                p.copy_(torch.tensor([50.0, 50.0, 0.0, 0.0]))
    for n, g in backward(model).items():
        bank, _, tensor = part(n)
        if bank == "lora":
            experts = g.unflatten(0, (4, -1)) if tensor == "A" else g.unflatten(1, (4, -1)).transpose(0, 1)
            assert experts[:2].count_nonzero() and not experts[2:].count_nonzero(), n


def test_dropout_of_a_mixture_is_seeded_and_shared_by_the_experts():
    """One mask for all experts of one input: E equal experts with weights that sum to 1 are one LoRA with the
    same mask."""
    many = attached(
        "molora", **{"experts.n": 3, "experts.r": 2, "experts.dropout": 0.5, "experts.targets": ["down"]}
    ).train()
    one = attached(
        "molora",
        **{
            "experts.n": 1,
            "experts.r": 2,
            "experts.dropout": 0.5,
            "experts.targets": ["down"],
            "router.kind": "none",
        },
    ).train()
    with torch.no_grad():
        for site, single in zip(many.base_model.sites(), one.base_model.sites(), strict=True):
            site.banks[0].A.copy_(single.banks[0].A.repeat(3, 1))
            site.banks[0].B.copy_(single.banks[0].B.repeat(1, 3))
        for value in (1.0, 4.0):
            many.base_model.sites()[0].tensors["weight"].mul_(value)
            out = []
            for model in (many, one):
                torch.manual_seed(9)
                out.append(model(**batch()).logits)
            assert_near("logits", *out, 1e-5)


@pytest.mark.parametrize("name", ADAPTERS)
def test_gradient_checkpointing(name):
    """The same loss, gradients, auxiliary losses and records, although every layer runs twice."""
    balanced = [m.routed and "probs" in m.router.gives for m in METHODS[name].mixtures]
    overrides = {"losses": {"switch_balance": {"coef": 0.3}}} if balanced[0] else {}
    seen = []
    for checkpointing in (False, True):
        model = attached(name, **overrides)
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
        inputs = batch(left=2)
        torch.manual_seed(0)
        with methods.record(model) as recorder:
            labels = answer_only(inputs["input_ids"])
            task = model(**given(model, inputs), labels=labels, use_cache=False).loss
            extra = recorder.losses
            (task + sum(extra.values())).backward()
        rows = {site: r.weights.shape[0] for site, r in recorder.routing.items()}
        seen.append((task, extra, rows, {n: p.grad for n, p in trainable(model).items()}))
    (task, extra, rows, grads), (task_2, extra_2, rows_2, grads_2) = seen
    assert torch.equal(task, task_2)
    assert rows == rows_2 and set(rows.values()) <= {inputs["input_ids"].numel()}, (
        "routing recorded more than once"
    )
    assert extra.keys() == extra_2.keys()
    for kind in extra:
        assert torch.equal(extra[kind], extra_2[kind]), kind
    for n, g in grads.items():
        assert (g is None) == (grads_2[n] is None), n
        if g is not None:
            assert_near(n, grads_2[n], g, 1e-5)


@pytest.mark.parametrize("name", ["molora", "moa_sparse", "mixlora"])
def test_reentrant_checkpointing_needs_no_other_code(name):
    grads = []
    for checkpointing in (False, True):
        model = attached(name)
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
        grads.append(backward(model))
    for n, g in grads[0].items():
        assert_near(n, grads[1][n], torch.zeros_like(trainable(model)[n]) if g is None else g, 1e-5)


@pytest.mark.parametrize("name", ADAPTERS)
def test_training_is_reproducible(name):
    """The same seed gives bitwise the same weights after three steps."""
    first, second = (train(randomise(attached(name, trained=False, model=base()))) for _ in range(2))
    for (n, p), q in zip(trainable(first).items(), trainable(second).values(), strict=True):
        assert torch.equal(p, q), n


def test_full_fine_tuning_gives_every_tensor_a_gradient():
    model = methods.attach(base(), catalog.raw("full"))
    assert all(size(g) > 0 for g in backward(model).values())
