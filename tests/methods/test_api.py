"""What notebooks use: load, record, capture_routing, sites, param_count; and that the hot path asks the
device for nothing.

Run: python -m pytest tests/methods/test_api.py
"""

from __future__ import annotations

import threading

import peft
import pytest
import torch
import transformers as tf
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from tiny import (
    METHODS,
    MIXTURES,
    ROUTED,
    SIZES,
    answer_only,
    assert_near,
    attached,
    base,
    batch,
    given,
    logits,
    losses,
    needing,
    of_routers,
    prompt_mask,
    trainable,
)
from torch.utils._python_dispatch import TorchDispatchMode

from moabench import methods
from moabench.methods import catalog
from moabench.methods.spec import ConfigError

FREE = [n for n in MIXTURES if not any(m.router.reads_skills(True) for m in METHODS[n].mixtures)]
"""Methods that read no skill: a given one is checked by value on a CPU, which asks it."""


class ForbidSyncs(TorchDispatchMode):
    """Raises at operations whose result has to reach the host before the next one can start."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        if any(
            part in name for part in ("nonzero", "_local_scalar_dense", "masked_select", "unique", "bincount")
        ):
            raise AssertionError(f"{name}: a host synchronisation on the hot path")
        if name.startswith(("aten.index.", "aten.index_put")):
            indices = [i for i in args[1] if i is not None]
            assert not any(i.dtype in (torch.bool, torch.uint8) for i in indices), (
                f"{name} with a boolean index"
            )
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("name", [n for n in FREE if n not in needing("ids")])
def test_no_host_synchronisation_in_a_training_step(name, recorded):
    """From the decoder layers' input to the gradients of every adapter, auxiliary losses included."""
    model = attached(name).train()
    plain = base().train()
    inputs = {"input_ids": batch()["input_ids"]}
    hidden = model.get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_()
    with ForbidSyncs():  # the base itself passes, so what fails is ours
        plain(inputs_embeds=hidden).logits.sum().backward()
    with ForbidSyncs():
        if recorded:
            with methods.record(model) as recorder:
                out = model(inputs_embeds=hidden).logits.sum()
            (out + sum(recorder.losses.values())).backward()
            assert bool(recorder.routing) == (name in ROUTED)
        else:
            model(inputs_embeds=hidden).logits.sum().backward()
    assert any(p.grad is not None for p in trainable(model).values())


def test_the_guard_sees_synchronisations():
    x = torch.randn(4)
    for operation in (
        lambda: x[x > 0],
        lambda: x.sum().item(),
        lambda: (x > 0).nonzero(),
        lambda: x.index_put((x > 0,), x[:1]),
    ):
        with pytest.raises(AssertionError), ForbidSyncs():
            operation()


@pytest.mark.parametrize("name", ROUTED)
def test_routing_of_every_site(name):
    model = attached(name)
    inputs = batch(left=2)
    routing = methods.capture_routing(model, given(model, inputs))
    sites = {s.name: s for s in model.base_model.sites() if s.router is not None}
    assert routing.keys() == sites.keys()
    tokens = inputs["input_ids"].numel()
    for site, found in routing.items():
        experts = len(sites[site].experts)
        assert found.experts == sites[site].experts and len(set(found.experts)) == experts
        for field in ("weights", "selected", "probs", "logits"):
            shown = getattr(found, field)
            assert shown is None or shown.shape == (tokens, experts), f"{site}.{field}"
            assert shown is not None or field not in ("weights", "selected", *sites[site].router.gives)
        assert found.weights.dtype == torch.float32 and not found.weights.requires_grad
        assert torch.equal(found.mask, inputs["attention_mask"].flatten().bool())
        assert found.granularity == sites[site].router.granularity
        assert found.soft == of_routers(name, "SOFT")[0]


def test_names_of_sites():
    linear = [s.name for s in attached("molora").base_model.sites()]
    assert linear == [f"model.layers.{i}.{p}" for i in (0, 1) for p in ("q", "k", "v", "o", "down")]
    assert [s.name for s in attached("moa_soft").base_model.sites()] == [
        "model.layers.0.block",
        "model.layers.1.block",
    ]
    mix = [s.name for s in attached("mixlora").base_model.sites()]
    assert mix[:5] == ["model.layers.0.ffn", *(f"model.layers.0.attention.{p}" for p in "qkvo")]


def test_banks_show_their_tensors():
    """A, B, owner and scale give the update of a linear: y = W x + sum_j B[:, j] (w_owner(j) scale_owner(j)
    (A x)_j)."""
    model = attached("molora", **{"experts.n": 3, "experts.r": [1, 4, 2], "experts.alpha": 3})
    site = model.base_model.sites()[0]
    bank = site.banks[0]
    assert bank.owner.tolist() == [0, 1, 1, 1, 1, 2, 2] and bank.scale.tolist() == [3.0, 0.75, 1.5]
    layer = model.base_model.model.model.layers[0]
    x = torch.randn(1, 1, 32)
    with torch.no_grad():
        w = (x[0, 0] @ site.tensors["weight"].t()).softmax(-1)
        want = layer.self_attn.q_proj.base_layer(x)[0, 0] + bank.B @ (
            w[bank.owner] * bank.scale[bank.owner] * (bank.A @ x[0, 0])
        )
        assert torch.allclose(layer.self_attn.q_proj(x)[0, 0], want, atol=1e-5)
    owned = {
        id(t)
        for s in model.base_model.sites()
        for t in (*s.tensors.values(), *(t for b in s.banks for t in b.tensors.values()))
    }
    assert owned == {id(p) for p in trainable(model).values()}, (
        "sites() shows every trained tensor and nothing else"
    )


@pytest.mark.parametrize("name", MIXTURES)
def test_sites_show_every_trained_tensor(name):
    model = attached(name)
    shown = {
        id(t): t
        for s in model.base_model.sites()
        for t in (*s.tensors.values(), *(t for b in s.banks for t in b.tensors.values()))
    }
    assert shown.keys() >= {id(p) for p in trainable(model).values()}
    frozen = [t for t in shown.values() if not t.requires_grad]
    buffers = [b for n, b in model.named_buffers() if "mixture" in n]
    assert sorted(map(id, frozen)) == sorted(map(id, buffers)), "all else that is shown is trained"


def test_record_joins_passes_nests_and_stays_silent_outside():
    model, inputs = attached("adamole"), batch(left=2)
    logits(model, **inputs)
    with methods.record(model) as outer:
        logits(model, **inputs)
        with methods.record(model) as inner:
            logits(model, **batch())
            logits(model, **inputs)
        logits(model, **batch())
    rows = inputs["input_ids"].numel()
    for recorder, count in ((outer, 2), (inner, 2)):
        assert {r.weights.shape[0] for r in recorder.routing.values()} == {count * rows}
    masks = [r.mask for r in inner.routing.values()]
    assert all(
        m[:rows].all() and torch.equal(m[rows:], inputs["attention_mask"].flatten().bool()) for m in masks
    )


def test_record_closes_after_an_error_and_changes_nothing():
    model, inputs = attached("moa_sparse"), batch(left=2)
    want = logits(model, **inputs)
    with pytest.raises(RuntimeError, match="stop"), methods.record(model):
        raise RuntimeError("stop")
    with methods.record(model) as recorder:
        assert torch.equal(logits(model, **inputs), want)
    assert len(recorder.entries) == 2
    broken = {**inputs, "position_ids": inputs["position_ids"][:, :3]}
    with pytest.raises(RuntimeError):  # raised in the middle of a layer
        logits(model, **broken)
    assert torch.equal(logits(model, **inputs), want), "a failed pass left something behind"


def test_models_without_a_mixture_record_nothing():
    for name in ("lora", "full", "none"):
        model = methods.attach(base(), catalog.raw(name))
        with methods.record(model) as recorder:
            model(**batch())
        assert recorder.routing == {} and recorder.losses == {}
        assert not getattr(model, "accepts_prompt_mask", False)
    assert getattr(attached("moa_soft"), "accepts_prompt_mask", False) is True


def test_capture_routing_keeps_the_mode():
    model = attached("mixlora").train()
    model.base_model.model.lm_head.eval()
    methods.capture_routing(model, batch())
    assert model.training and not model.base_model.model.lm_head.training


def test_a_mask_of_another_form_is_refused_while_recording():
    model, inputs = attached("adamole"), batch()
    mask = torch.ones(2, 1, 9, 9, dtype=torch.bool).tril()
    logits(model, input_ids=inputs["input_ids"], attention_mask=mask)
    with pytest.raises(ConfigError, match="attention_mask"), methods.record(model):
        logits(model, input_ids=inputs["input_ids"], attention_mask=mask)


def test_get_peft_model_and_attach_are_the_same():
    torch.manual_seed(1)
    first = peft.get_peft_model(base(), methods.load("moa_sparse", router={"gamma_max": 0.7}))
    torch.manual_seed(1)
    second = methods.attach(base(), catalog.override(catalog.raw("moa_sparse"), {"router.gamma_max": 0.7}))
    assert torch.equal(logits(first.eval(), **batch()), logits(second.eval(), **batch()))
    assert first.peft_config["default"].spec["router"]["gamma_max"] == 0.7


def test_labels_and_loss_are_the_models_own():
    model, inputs = attached("moa_soft"), batch(left=2)
    labels = answer_only(inputs["input_ids"])
    out = model(**inputs, labels=labels)
    shifted, targets = out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    assert torch.allclose(out.loss, torch.nn.functional.cross_entropy(shifted, targets, ignore_index=-100))


def test_two_threads_record_their_own_models():
    models = [attached("adamole") for _ in range(2)]
    results: dict[int, int] = {}

    def work(i):
        torch.set_num_threads(1)
        with methods.record(models[i]) as recorder:
            for _ in range(i + 1):
                logits(models[i], **batch())
        results[i] = {r.weights.shape[0] for r in recorder.routing.values()}.pop()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {0: 18, 1: 36}


def stable_lm():
    """An architecture whose layers hand no further keyword arguments to their attention."""
    torch.manual_seed(0)
    return tf.StableLmForCausalLM(tf.StableLmConfig(**SIZES)).eval()


def test_layers_that_drop_keyword_arguments_know_their_pass():
    model, inputs = (
        attached("moe_lora_topk", stable_lm(), **{"losses.switch_balance.coef": 0.3}),
        batch(left=2),
    )
    labels = answer_only(inputs["input_ids"])
    assert len(methods.capture_routing(model, inputs)) == len(model.base_model.sites())
    _, extra = losses(model, inputs, labels)
    assert extra["switch_balance"] > 0
    model.train()
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        task, extra = losses(model, inputs, labels)
        (task + sum(extra.values())).backward()
        found.append({n: p.grad.clone() for n, p in trainable(model).items()})
    for name, gradient in found[0].items():
        assert_near(name, found[1][name], gradient, 1e-6)


def test_gates_of_such_layers_are_kept_with_the_cache():
    model, inputs, split = attached("moa_instance", stable_lm()), batch(), 5
    whole = logits(model, **inputs, **prompt_mask(model, inputs["input_ids"]))
    first = {k: v[:, :split] for k, v in inputs.items()}
    with torch.no_grad():
        cache = model(**first, use_cache=True).past_key_values
        rest = {
            "input_ids": inputs["input_ids"][:, split:],
            "position_ids": inputs["position_ids"][:, split:],
        }
        found = model(**rest, attention_mask=inputs["attention_mask"], past_key_values=cache).logits
    assert_near("decoded", found, whole[:, split:], 2e-5)


def test_a_model_with_an_adapter_of_peft_is_refused():
    """The mixture would run the frozen modules under it."""
    for config in (
        LoraConfig(target_modules=["q_proj"]),
        LoraConfig(target_modules=["down_proj"], use_dora=True),
        IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    ):
        adapted = get_peft_model(base(), config).base_model.model
        with pytest.raises(ConfigError, match="has an adapter of PEFT already"):
            get_peft_model(adapted, methods.load("molora"))


def test_two_active_adapters_are_refused():
    model = attached("molora")
    model.add_adapter("second", methods.load("molora"))
    with pytest.raises(ConfigError, match="expected one adapter; mixtures are not combined"):
        model.base_model.set_adapter(["default", "second"])
    model.set_adapter("second")
    assert model.active_adapters == ["second"]


def test_loading_without_memory_for_the_base_gives_the_same(tmp_path):
    model, inputs = attached("moa_sparse"), batch(left=2)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path, low_cpu_mem_usage=True).eval()
    assert_near("logits", logits(loaded, **inputs), logits(model, **inputs), 3e-6)


@pytest.mark.parametrize("name", ["molora", "mixlora", "moa_soft"])
def test_training_after_a_pass_in_inference_mode(name):
    model, inputs = attached(name), batch(left=2)
    with torch.inference_mode():
        model(**inputs)
        model.generate(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=2
        )
    task, extra = losses(model.train(), inputs, answer_only(inputs["input_ids"]))
    (task + sum(extra.values())).backward()
    assert all(p.grad is not None for n, p in trainable(model).items() if "B" in n)


@pytest.mark.parametrize("name", ["molora", "mixlora", "moa_soft", "moa_instance"])
def test_a_model_built_in_inference_mode_generates(name):
    with torch.inference_mode():
        model = attached(name)
    inputs = {k: v for k, v in batch().items() if k != "position_ids"}
    with torch.no_grad():
        found = model.generate(**inputs, max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0)
    expected = attached(name).generate(
        **inputs, max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert torch.equal(found, expected)
