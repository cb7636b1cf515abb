"""What each expert does, against equations from its tensors, against the whole place, and against a model
whose expert was taken out.

pytest tests/methods/test_effects.py
"""

import pytest
import tiny
import torch
import torch.nn.functional as F

from moabench import methods
from moabench.methods.effects import can_run, has_low_rank, low_rank_pairs, weighted

OF_LINEARS = [
    name
    for name in tiny.ROUTED
    if (mixture := tiny.METHODS[name].mixtures[0]).site == "linear"
    and all(bank.low_rank for bank in mixture.banks.values())
]


def nothing(routing):
    return weighted(routing, torch.zeros_like(routing.weights))


def watched(model, names=None, **more):
    names = (
        {site.name for site in model.base_model.sites() if site.router is not None}
        if names is None
        else names
    )
    inputs = tiny.given(model, tiny.batch(right=2)) | more
    with torch.no_grad(), methods.record(model) as recorder, methods.watch(model, names) as found:
        model(**inputs, use_cache=False)
    return found, recorder.routing


@pytest.mark.parametrize("name", OF_LINEARS)
def test_low_rank_outputs_are_those_of_the_place_run_with_one_expert(name):
    found, routing = watched(tiny.attached(name))
    for site, w in list(found.items())[:6]:
        assert has_low_rank(w.site) and can_run(w.site)
        p, b = w.low_rank()
        explicit = p @ b.T
        tiny.assert_near(site, explicit, w.outputs(), 1e-4)
        for e, (a_e, b_e) in enumerate(low_rank_pairs(w.site)):
            assert a_e.shape[0] == b_e.shape[1] == w.site.banks[0].part.ranks[e]
            tiny.assert_near(f"{site}, pair {e}", w.read.flatten(0, 1) @ a_e.T @ b_e.T, explicit[e], 1e-4)
        mixed = torch.einsum("te,etd->td", routing[site].weights, explicit)
        whole = (w.run(lambda r: r) - w.site.module.base_layer(*w.args)).flatten(0, -2)
        tiny.assert_near(site, mixed, whole, 1e-4)


def test_low_rank_outputs_by_the_equation():
    found, _ = watched(tiny.attached("molora", experts={"r": 3, "alpha": 6.0}))
    w = found["model.layers.1.down"]
    bank = w.site.banks[0]
    p, b = w.low_rank()
    for e in range(8):
        rows = slice(3 * e, 3 * e + 3)
        tiny.assert_near(
            f"expert {e}", p[e] @ b.T, 2.0 * w.read.flatten(0, 1) @ bank.A[rows].T @ bank.B[:, rows].T, 1e-4
        )


@pytest.mark.parametrize("name", ["mixlora", "mixlora_dynamic"])
def test_feed_forward_experts_by_the_equation_selected_or_not(name):
    model = tiny.attached(name)
    found, routing = watched(model)
    w = found["model.layers.0.ffn"]
    assert not routing["model.layers.0.ffn"].chosen.all()
    t, ffn, part = w.site.banks[0].tensors, w.site.module.base_layer, w.site.banks[0].part
    x, outputs = w.read.flatten(0, 1), w.outputs()
    for e in range(part.n):
        rows = slice(part.r * e, part.r * (e + 1))
        update = {c: part.scale * t[f"{c}_B"][:, rows] @ t[f"{c}_A"][rows] for c in ("gate", "up", "down")}
        inner = F.silu(F.linear(x, ffn.gate_proj.weight + update["gate"])) * F.linear(
            x, ffn.up_proj.weight + update["up"]
        )
        tiny.assert_near(
            f"expert {e}", outputs[e], F.linear(inner, ffn.down_proj.weight + update["down"]) - ffn(x), 1e-3
        )


@pytest.mark.parametrize("name", ["moa_soft", "moa_sparse", "moa_instance"])
def test_an_expert_left_out_is_one_whose_output_tensors_are_zero(name):
    model = tiny.attached(name)
    name = "model.layers.0.block"
    found, _ = watched(model, [name])
    removed, w = found[name].removed(), found[name]
    whole = w.run(lambda r: r)
    for e, expert in enumerate(w.site.experts):
        bank = next(view for view in w.site.banks if expert in (view.place, view.name))
        ends = [tensor for key, tensor in bank.tensors.items() if key in ("B", "gamma", "up", "up_bias")]
        kept = [tensor.detach().clone() for tensor in ends]
        for tensor in ends:
            tensor.data.zero_()
        again, _ = watched(model, [name])
        without = again[name].run(lambda r: r)
        for tensor, value in zip(ends, kept, strict=True):
            tensor.data.copy_(value)
        tiny.assert_near(expert, removed[e], (whole - without).flatten(0, 1), 1e-3)


def test_a_block_with_one_expert_alone_is_the_frozen_layer_plus_its_effect():
    """The experts' outputs of a soft block, against a base layer to which one LoRA pair was added by hand."""
    model = tiny.attached("moa_soft")
    found, _ = watched(model, ["model.layers.1.block"])
    w = found["model.layers.1.block"]
    outputs = w.outputs()
    e = w.site.experts.index("down")
    bank = next(view for view in w.site.banks if view.place == "down")
    inputs = {}
    plain = tiny.base().model.layers[1]  # the same weights without any wrapper
    plain.mlp.down_proj.register_forward_pre_hook(lambda module, args: inputs.update(x=args[0]))
    frozen = plain(*w.args, **{key: value for key, value in w.kwargs.items() if key != "mixture_context"})
    tiny.assert_near("frozen", w.run(nothing), frozen, 1e-5)
    tiny.assert_near(
        "down", outputs[e], (bank.scale[0] * inputs["x"] @ bank.A.T @ bank.B.T).flatten(0, 1), 1e-3
    )


def test_watching_changes_nothing_and_leaves_nothing():
    model, inputs = tiny.attached("moa_soft"), tiny.batch()
    before = tiny.logits(model, **inputs)
    found, _ = watched(model)
    found["model.layers.0.block"].outputs()
    assert torch.equal(tiny.logits(model, **inputs), before)
    assert all(layer.live is None for layer in model.base_model.mixture_layers())
    assert not any(
        hook
        for m in model.modules()
        for hook in m._forward_pre_hooks.values()
        if "effects" in getattr(hook, "__module__", "")
    )
    again, _ = watched(model)
    torch.testing.assert_close(
        again["model.layers.0.block"].outputs(), found["model.layers.0.block"].outputs()
    )


def test_the_recorder_sees_what_the_router_decided():
    """A change reaches the experts, not the record, and only at its own site."""
    model = tiny.attached("molora")
    found, routing = watched(model)
    w = found["model.layers.0.q"]
    changed = w.run(nothing)
    torch.testing.assert_close(changed, w.site.module.base_layer(*w.args), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        found["model.layers.0.k"].run(lambda r: r), w.site.layer.layer.places["k"].parent.k_proj(*w.args)
    )
    assert routing["model.layers.0.q"].weights.sum(-1).allclose(torch.ones(18))


@pytest.mark.parametrize("architecture", ["phi3", "gemma2", "olmo2"])
def test_other_architectures(architecture):
    """Fused projections, layers with further norms, norms after the block."""
    for name in ("molora", "moa_soft", "mixlora"):
        model = tiny.attached(name, tiny.base(architecture))
        found, routing = watched(model)
        assert found.keys() == routing.keys()
        for w in found.values():
            if has_low_rank(w.site):
                p, b = w.low_rank()
                assert (p @ b.T).isfinite().all() and p.shape[1] == 18
            else:
                assert w.outputs().isfinite().all() and w.removed().norm() > 0
