"""Mixtures of (IA)^3 vectors (mov.md).

Run: python -m pytest tests/methods/test_ia3_vectors.py
"""

from __future__ import annotations

import peft
import pytest
import torch
from tiny import assert_near, attached, base, batch, logits

from moabench import methods
from moabench.methods.spec import ConfigError


def test_one_vector_is_ia3():
    """Outputs and gradients of PEFT's (IA)^3 on k, v and the input of down."""
    model = attached("mov", **{"experts.n": 1, "router.kind": "none"})
    config = peft.IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"],
        feedforward_modules=["down_proj"],
        task_type="CAUSAL_LM",
    )
    other = peft.get_peft_model(base(), config).eval()
    modules, pairs = dict(other.named_modules()), []
    for site in model.base_model.sites():
        vectors = site.banks[0].tensors["vectors"]
        parent = "mlp" if site.banks[0].place == "down" else "self_attn"
        path = f"base_model.model.model.layers.{site.name.split('.')[2]}.{parent}.{site.banks[0].place}_proj"
        pairs.append((vectors, modules[path].ia3_l["default"]))
    with torch.no_grad():
        for vectors, theirs in pairs:
            theirs.copy_(vectors.flatten().view_as(theirs))
    inputs = batch(left=2)
    assert_near("logits", logits(model, **inputs), logits(other, **inputs), 1e-5)
    for m in (model, other):
        m(**inputs, labels=inputs["input_ids"]).loss.backward()
    for vectors, theirs in pairs:
        assert_near("gradient", vectors.grad.flatten(), theirs.grad.flatten(), 1e-4)


def test_equal_vectors_make_the_router_irrelevant():
    model = attached("mov", **{"experts.n": 3})
    sites = model.base_model.sites()
    with torch.no_grad():
        for site in sites:
            vectors = site.banks[0].tensors["vectors"]
            vectors.copy_(vectors[:, :1].expand_as(vectors))
        want = logits(model, **batch())
        for site in {id(s.tensors["weight"]): s for s in sites}.values():
            site.tensors["weight"].mul_(-3.0)
    assert_near("logits", logits(model, **batch()), want, 1e-5)


def test_heads_have_mixtures_of_their_own_by_one_router():
    model = attached("mov")
    sites = {s.name: s for s in model.base_model.sites()}
    first, second = (sites[f"model.layers.0.k{head}"] for head in (0, 1))
    assert set(sites) == {f"model.layers.{i}.{p}" for i in (0, 1) for p in ("k0", "k1", "v0", "v1", "down")}
    assert first.tensors["weight"] is second.tensors["weight"]
    assert first.tensors["weight"].shape == (8, 8), "it reads one head"
    routing = methods.capture_routing(model, batch())
    weights = [routing[s.name].weights for s in (first, second)]
    assert not torch.allclose(*weights)
    for found in routing.values():
        assert_near("sum of weights", found.weights.sum(-1), torch.ones(18), 1e-6)


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "phi3"])
def test_vectors_scale_what_the_linear_gives_before_norms_and_positions(architecture):
    """On keys and values, by head; the other roles of a fused linear stay as they are. Twice the vectors is
    twice the activation."""
    model = attached("mov", base(architecture), **{"experts.n": 3, "experts.targets": ["k", "v"]})
    attention = model.base_model.model.model.layers[0].self_attn
    size = attention.head_dim
    x = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0))

    def given():
        with torch.no_grad():
            if hasattr(attention, "qkv_proj"):
                y, frozen = attention.qkv_proj(x), attention.qkv_proj.base_layer(x)
                assert torch.equal(y[..., : 4 * size], frozen[..., : 4 * size]), "queries"
                return y[..., 4 * size :].split(2 * size, -1), frozen[..., 4 * size :].split(2 * size, -1)
            linears = attention.k_proj, attention.v_proj
            return [m(x) for m in linears], [m.base_layer(x) for m in linears]

    places = {s.name.rpartition(".")[2]: s for s in model.base_model.sites() if ".layers.0." in s.name}
    got, frozen = given()
    for role, y, a in zip("kv", got, frozen, strict=True):
        for head in (0, 1):
            site, own = places[f"{role}{head}"], slice(head * size, (head + 1) * size)
            weights = (a[..., own] @ site.tensors["weight"].T).softmax(-1)
            want = a[..., own] * (weights @ site.banks[0].tensors["vectors"][head])
            assert_near(f"{role}{head}", y[..., own], want, 1e-5)
    with torch.no_grad():
        for place in ("k0", "v0"):
            places[place].banks[0].tensors["vectors"].mul_(2.0)
    for y, twice in zip(got, given()[0], strict=True):
        assert_near("twice", twice, 2 * y, 1e-6)


def test_weight_decay_leaves_vectors_alone():
    """It would pull them to 0, and the activations with them."""
    for layer in attached("mov").base_model.mixture_layers():
        tensors = layer.tensors["default"]
        assert tensors.no_weight_decay == {n for n in tensors._parameters if n.endswith("vectors")}


def test_other_linears_and_sites_are_refused():
    for overrides in ({"experts.targets": ["q"]}, {"experts.targets": ["k", "k"]}, {"site": "block"}):
        with pytest.raises(ConfigError):
            attached("mov", **overrides)
