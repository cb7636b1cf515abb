"""Mixture-of-LoRAs (mixture_of_loras.md): the label in training, the router's choice outside of it.

Run: python -m pytest tests/methods/test_label_classifier.py
"""

from __future__ import annotations

import pytest
import torch
from tiny import PAD, answer_only, assert_near, attached, base, batch, logits, prompt_mask, trainable

from moabench import methods
from moabench.methods.spec import ConfigError

NAME = "mixture_of_loras"
SMALL = {"experts.n": 4, "experts.r": 3, "experts.dropout": 0.0}


def made(**overrides):
    return attached(NAME, **(SMALL | overrides))


@torch.no_grad()
def forced(model, expert: int):
    """Routers that choose `expert` whatever they read."""
    for site in model.base_model.sites():
        site.tensors["bias"].zero_()[expert] = 1e4
    return model


@torch.no_grad()
def single(model, expert: int):
    """A mixture of one, whose tensors are those of that expert."""
    one = made(**{"experts.n": 1})
    mine = dict(model.named_parameters())
    for name, tensor in trainable(one).items():
        if "__lora__" in name:
            axis = 0 if name.endswith("A") else 1
            tensor.copy_(mine[name].unflatten(axis, (4, -1)).select(axis, expert))
    return one


@pytest.mark.parametrize("expert", range(4))
def test_a_chosen_expert_is_that_lora_alone(expert):
    """By the router or by the label, bit for bit whatever the other experts are. (Beside a mixture of one,
    GEMMs sum zeros too, in another order.)"""
    model, inputs = forced(made(), expert), batch(left=2)
    want = logits(single(model, expert), **inputs)
    got = logits(model, **inputs)
    assert_near("by the router", got, want, 1e-5)
    labels = torch.full((2,), expert)
    assert torch.equal(logits(forced(model, (expert + 1) % 4).train(), **inputs, skill_ids=labels), got)
    with torch.no_grad():
        for name, tensor in trainable(model).items():
            if "__lora__" in name:
                axis = 0 if name.endswith("A") else 1
                others = [e for e in range(4) if e != expert]
                tensor.unflatten(axis, (4, -1)).index_fill_(axis, torch.tensor(others), 7.0)
    assert torch.equal(logits(forced(model, expert).eval(), **inputs), got)


def test_the_router_reads_the_last_prompt_token_of_the_normed_input():
    """One choice a layer, the largest of W h + b."""
    model, inputs = made(), batch(left=2)
    seen = []
    for layer in model.base_model.model.model.layers:
        layer.input_layernorm.register_forward_hook(lambda m, a, out: seen.append(out))
    routing = methods.capture_routing(model, {**inputs, **prompt_mask(model, inputs["input_ids"])})
    for site, h in zip(model.base_model.sites(), seen, strict=True):
        want = (h[:, 4] @ site.tensors["weight"].T + site.tensors["bias"]).argmax(-1)
        found = routing[site.name].weights.unflatten(0, (2, -1))
        assert torch.equal(found, torch.nn.functional.one_hot(want, 4)[:, None].expand_as(found).float())
        assert routing[site.name].experts == tuple(f"lora{e}" for e in range(4))


def backward(model, value, **inputs):
    """Gradients of `value(out, recorder)` by parameter, and of the embeddings."""
    ids = inputs.pop("input_ids")
    embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
    with methods.record(model.train()) as recorder:
        out = model(inputs_embeds=embeds, labels=answer_only(ids), skill_ids=torch.tensor([2, 0]), **inputs)
    value(out, recorder).backward()
    return {n: p.grad for n, p in trainable(model).items()}, embeds.grad


def test_the_tasks_loss_teaches_experts_alone():
    grads, embeds = backward(made(), lambda out, recorder: out.loss, **batch(left=2))
    for name, grad in grads.items():
        assert (grad is None or not grad.count_nonzero()) == ("__router__" in name), name
    assert embeds.count_nonzero()
    for name, grad in grads.items():
        if "__lora__" in name:
            axis = 0 if name.endswith("A") else 1
            used = [bool(g.count_nonzero()) for g in grad.unflatten(axis, (4, -1)).unbind(axis)]
            assert used == [True, False, True, False], f"{name}: the labels are 2 and 0"


def test_the_labels_loss_teaches_routers_alone():
    """Neither experts nor what is below a router learn from it."""
    grads, embeds = backward(
        made(), lambda out, recorder: recorder.losses["label_cross_entropy"], **batch(left=2)
    )
    for name, grad in grads.items():
        assert (grad is not None and grad.count_nonzero() > 0) == ("__router__" in name), name
    assert embeds is None or not embeds.count_nonzero()


def test_the_labels_loss_by_torch():
    """Mean over sequences and routers of the cross-entropy; none in evaluation, where there is no label."""
    model, inputs, labels = made().train(), batch(left=2), torch.tensor([2, 0])
    with torch.no_grad(), methods.record(model) as recorder:
        model(**inputs, skill_ids=labels)
    each = [
        torch.nn.functional.cross_entropy(r.logits.unflatten(0, (2, -1))[:, 0], labels)
        for r in recorder.routing.values()
    ]
    assert_near("loss", recorder.losses["label_cross_entropy"], sum(each) / len(each), 1e-6)
    with torch.no_grad(), methods.record(model.eval()) as recorder:
        model(**inputs)
    assert not recorder.losses


def mixed():
    """A model that routes the two sequences of `batch()` to different experts in every layer, by its own
    choice."""
    model, inputs = made(), batch()
    inputs |= prompt_mask(model, inputs["input_ids"])
    sites = model.base_model.sites()
    with torch.no_grad():
        for site in sites:
            bias = site.tensors["bias"].zero_()
            scores = methods.capture_routing(model, inputs)[site.name].logits.unflatten(0, (2, -1))[:, 0]
            apart = scores[0] - scores[1]
            bias.fill_(-1e3)
            for e in (apart.argmax(), apart.argmin()):  # equal on average, so that each is chosen once
                bias[e] = -scores[:, e].mean()
    found = methods.capture_routing(model, inputs)
    return model, inputs, {name: r.weights.unflatten(0, (2, -1)) for name, r in found.items()}


def test_sequences_of_a_batch_are_routed_apart():
    model, inputs, weights = mixed()
    assert all(not torch.equal(w[0, 0], w[1, 0]) for w in weights.values())
    together = logits(model, **inputs)
    for row in (0, 1):
        alone = logits(model, **{key: value[row : row + 1] for key, value in inputs.items()})
        assert_near(f"sequence {row}", together[row], alone[0], 2e-5)


def test_a_decision_is_kept_with_the_cache():
    """Every decoding step has the experts of the prompt."""
    model, inputs, _ = mixed()
    with methods.record(model) as recorder:
        model.generate(
            input_ids=inputs["input_ids"],
            max_new_tokens=4,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=PAD,
        )
    for routing in recorder.routing.values():
        prefill = routing.weights[:18].unflatten(0, (2, 9))[:, 0]
        for later in routing.weights[18:].unflatten(0, (-1, 2)):
            assert torch.equal(later, prefill)
    assert len(recorder.routing) == 2


def test_a_new_expert_leaves_those_before_it_as_they_are():
    model, more, inputs = forced(made(), 1), made(**{"experts.n": 5}), batch(left=2)
    mine = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in trainable(more).items():
            axis = 1 if name.endswith("B") else 0
            tensor.narrow(axis, 0, mine[name].shape[axis]).copy_(mine[name])
            if name.endswith("bias"):
                tensor[4] = 0.0
    assert_near("logits", logits(more, **inputs), logits(model, **inputs), 1e-6)


def test_labels_are_needed_in_training_and_only_there():
    model = made()
    with torch.no_grad():
        model(**batch())
    with pytest.raises(ConfigError, match="taught by them"):
        model.train()(**batch())
    for label in (4, -1):
        with pytest.raises(ConfigError, match=rf"skill_ids\[1\]={label}: expected 0 to 3"):
            model(**batch(), skill_ids=torch.tensor([0, label]))


def test_an_untrained_mixture_is_the_base_for_every_label():
    model = attached(NAME, trained=False, **SMALL).train()
    assert torch.equal(logits(model, **batch(), skill_ids=torch.tensor([3, 1])), logits(base(), **batch()))
