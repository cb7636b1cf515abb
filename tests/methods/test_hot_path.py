"""What a training step of every shipped method does besides arithmetic: nothing that waits for the host,
nothing of output width kept for the backward, the same numbers under torch.compile.

Run: python -m pytest tests/methods/test_hot_path.py
"""

from __future__ import annotations

import pytest
import torch
from tiny import (
    METHODS,
    MIXTURES,
    answer_only,
    assert_near,
    attached,
    base,
    batch,
    given,
    losses,
    needing,
    trainable,
)

from moabench.benchmarks.speed.measure import Counted, saved_storages
from moabench.benchmarks.speed.whole import linear_inputs
from moabench.methods.bank import LinearExperts

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
OF_LINEARS = [
    n
    for n in MIXTURES
    if all(isinstance(b, LinearExperts) for m in METHODS[n].mixtures for b in m.banks.values())
]


def reads_skills(name: str) -> bool:
    return any(m.router.reads_skills(True) for m in METHODS[name].mixtures)


def step(model, device: str = "cpu") -> None:
    """A training step's forward and backward, auxiliary losses included; of a frozen model, to its
    embeddings."""
    inputs = {k: v.to(device) for k, v in batch(left=2).items()}
    labels = answer_only(inputs["input_ids"])
    if not trainable(model):
        inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids")).requires_grad_()
        model(**inputs, labels=labels).loss.backward()
        return
    task, extra = losses(model, inputs, labels)
    (task + sum(extra.values())).backward()


def waits(model) -> dict[str, int]:
    """Host waits of a step, by operator."""
    with Counted() as counted:
        step(model.train())
    return dict(counted.waits)


@pytest.fixture(scope="module")
def frozen_waits():
    return waits(base().requires_grad_(False))


@pytest.mark.parametrize("name", MIXTURES)
def test_no_adapter_makes_the_host_wait(name, frozen_waits):
    """No nonzero, item, boolean indexing, unique, masked_select or bincount beyond the frozen model's own, in
    forward, auxiliary losses and backward. On a CPU, and only there, an oracle's skill ids are checked by
    value."""
    allowed = dict(frozen_waits)
    if reads_skills(name):
        allowed["aten.nonzero.default"] = allowed.get("aten.nonzero.default", 0) + 1
    found = waits(attached(name))
    assert not {op: n for op, n in found.items() if n > allowed.get(op, 0)}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", MIXTURES)
def test_no_adapter_synchronises_a_gpu(name):
    """CUDA itself refuses to synchronise from the first layer's mixture to the last gradient."""
    model = attached(name, base().to("cuda")).train()
    step(model, "cuda")  # lazy initialisation may wait
    layers = model.base_model.mixture_layers()
    first, last = layers[0].layer.module, layers[-1].layer.module
    hooks = [
        first.register_forward_pre_hook(lambda *_: torch.cuda.set_sync_debug_mode("error")),
        last.register_forward_hook(lambda *_: torch.cuda.set_sync_debug_mode("default")),
        last.register_full_backward_pre_hook(lambda *_: torch.cuda.set_sync_debug_mode("error")),
    ]
    try:
        step(model, "cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")
        for hook in hooks:
            hook.remove()


# Bytes kept for the backward


def kept(model, sequences: int, length: int = 8) -> int:
    """Bytes that a forward keeps, the inputs of frozen linears (which every adapter keeps for dA) left
    out."""
    ids = torch.randint(3, 97, (sequences, length), generator=torch.Generator().manual_seed(0))
    seen, hooks = linear_inputs(model)
    if trainable(model):
        inputs = given(model, {"input_ids": ids})
    else:
        inputs = {"inputs_embeds": model.get_input_embeddings()(ids).requires_grad_()}
    with saved_storages() as storages:
        out = model.train()(**inputs, use_cache=False)
    for hook in hooks:
        hook.remove()
    del out
    return sum(n for at, n in storages.items() if at not in seen)


def added(name: str, overrides: dict | None = None, **sizes) -> float:
    """Bytes a token and block that an adapter keeps and the frozen model does not; what does not grow with
    the tokens is left out."""
    adapted, frozen = attached(name, base(**sizes), **(overrides or {})), base(**sizes).requires_grad_(False)
    growth = [kept(adapted, n) - kept(frozen, n) for n in (2, 6)]
    return (growth[1] - growth[0]) / (4 * 8) / frozen.config.num_hidden_layers


@pytest.mark.parametrize("name", OF_LINEARS)
def test_what_a_mixture_keeps_is_rank_side(name):
    """A linear keeps S (for a shared A: S once an expert) and Sw, [T, R] each, and a few [T, E] of its
    router."""
    mixture = METHODS[name].mixtures[0]
    bank = next(iter(mixture.banks.values()))
    linears = len(bank.targets)
    mixed = 2 if bank.gate_grad == "plain" else 3  # S, Sw, and S sqrt(w)
    allowed = linears * 4 * (mixed * len(bank.owner) + 6 * bank.n)
    assert linears * 4 * len(bank.owner) <= added(name) <= allowed


@pytest.mark.parametrize("name", OF_LINEARS)
def test_what_a_mixture_keeps_does_not_depend_on_the_output_widths(name):
    """More inner width (gate, up) and wider heads (q, k, v) leave it as it is."""
    overrides = {"experts.targets": ["q", "k", "v", "gate", "up"]}
    assert (
        added(name, overrides)
        == added(name, overrides, intermediate_size=96)
        == added(name, overrides, head_dim=16)
    )


# torch.compile


@pytest.mark.parametrize(
    "name",
    [
        n
        for n in MIXTURES
        if METHODS[n].mixtures[0].site in ("linear", "ffn")
        and n not in needing("skill") + needing("ids")
        and {"down", "ffn"} & {p for b in METHODS[n].mixtures[0].banks.values() for p in b.places}
    ],
)
def test_compiled_gives_the_same_numbers(name):
    """Output and gradients of a layer's feed-forward block with its mixtures, eager and compiled; the graph
    may break."""
    results = []
    for compiled in (False, True):
        torch._dynamo.reset()
        model = attached(
            name, base(num_hidden_layers=1), **({"also": None} if "also" in METHODS[name].data else {})
        )
        block = model.base_model.model.model.layers[0].mlp
        x = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(5)).requires_grad_()
        y = (torch.compile(block, backend="aot_eager") if compiled else block)(x)
        y.square().sum().backward()
        grads = {n: p.grad for n, p in trainable(model).items() if p.grad is not None}
        results.append({"y": y.detach(), "x": x.grad} | grads)
    eager, compiled = results
    assert eager.keys() == compiled.keys() and len(eager) > 3
    for n, t in eager.items():
        assert_near(n, compiled[n], t, 1e-6)
