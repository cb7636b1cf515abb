"""The matrix over every method in conf/method: what holds for all of them at attachment, after training, when
saved, switched and removed.

Run: python -m pytest tests/methods/test_methods.py
"""

from __future__ import annotations

import copy
import warnings

import pytest
import references
import torch
from peft import PeftModel
from tiny import (
    ADAPTERS,
    METHODS,
    MIXTURES,
    assert_near,
    attached,
    base,
    batch,
    logits,
    of_routers,
    prompt_mask,
    train,
    trainable,
)

from moabench import methods
from moabench.methods import catalog
from moabench.methods.spec import ConfigError

NAMES = catalog.names()
SIZE_KEYS = [(name, override) for name in NAMES for override in references.of("methods", name).GROWS]


def count(name, **overrides):
    return methods.param_count(attached(name, trained=False, **overrides))["trainable"]


@pytest.mark.parametrize("name", [n for n in NAMES if n != "none"])
def test_one_step_changes_outputs_and_only_trainable_tensors(name):
    model = attached(name, trained=False)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    inputs = {**batch(), **prompt_mask(model, batch()["input_ids"])}
    start = logits(model, **inputs)
    train(model, steps=1)
    assert not torch.equal(logits(model, **inputs), start)
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed and changed <= set(trainable(model)), "a frozen tensor changed"
    assert all(p.isfinite().all() for p in model.parameters())


def test_none_trains_nothing_and_full_trains_everything():
    assert not trainable(attached("none", trained=False))
    assert len(trainable(attached("full", trained=False))) == len(list(base().parameters()))


@pytest.mark.parametrize("name", NAMES)
def test_two_evaluation_passes_are_identical(name):
    """Dropout is off in evaluation, whatever its rate; in training it acts."""
    overrides = {}
    for mixture in METHODS[name].mixtures if name in ADAPTERS else ():
        for bank, part in mixture.banks.items():
            if hasattr(part, "dropout") and mixture.name == "main":
                alone = "kind" in METHODS[name].data["experts"]
                overrides["experts.dropout" if alone else f"experts.{bank}.dropout"] = 0.4
    model = attached(name, trained=name in ADAPTERS, **overrides)
    inputs = batch(left=2)
    assert torch.equal(logits(model, **inputs), logits(model, **inputs))
    if overrides:
        model.train()
        assert not torch.equal(logits(model, **inputs), logits(model, **inputs)), (
            "dropout changes nothing in training"
        )


@pytest.mark.parametrize("name", ADAPTERS)
def test_disabled_equals_the_base_and_records_nothing(name):
    inputs = batch(left=2)
    model = attached(name)
    on = logits(model, **inputs)
    with model.disable_adapter(), methods.record(model) as recorder:
        assert torch.equal(logits(model, **inputs), logits(base(), **inputs))
    assert not recorder.routing and not recorder.losses
    assert torch.equal(logits(model, **inputs), on)


@pytest.mark.parametrize("name", ADAPTERS)
def test_saved_and_loaded_by_plain_peft(name, tmp_path):
    model = train(attached(name))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path).eval()
    inputs = batch(left=2)
    assert torch.equal(logits(loaded, **inputs), logits(model, **inputs))
    saved = {n: p for n, p in loaded.named_parameters() if n in trainable(model)}
    for n, p in trainable(model).items():
        assert torch.equal(saved[n], p), n
    again = PeftModel.from_pretrained(base(), tmp_path, is_trainable=True)
    assert set(trainable(again)) == set(trainable(model))


@pytest.mark.parametrize("sizes", [{"hidden_size": 48}, {"num_hidden_layers": 3}, {"num_hidden_layers": 1}])
def test_adapter_of_another_base_is_refused(sizes, tmp_path):
    attached("moa_sparse").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="another base"):
        PeftModel.from_pretrained(base(**sizes), tmp_path)


@pytest.mark.parametrize(
    ("first", "second"),
    [("moa_soft", "molora"), ("mixlora", "moa_sparse"), ("adamole", "adamole"), ("unipeft", "hydralora")],
)
def test_two_adapters(first, second):
    inputs = batch(left=2)
    alone = [logits(train(attached(n)), **inputs) for n in (first, second)]
    model = train(attached(first))
    donor = train(attached(second))
    model.add_adapter("other", methods.load(second))
    values = {n.replace(".default.", ".other."): p for n, p in donor.named_parameters()}
    with torch.no_grad():
        for n, p in model.named_parameters():
            if ".other." in n:
                p.copy_(values[n])
    assert torch.equal(logits(model, **inputs), alone[0])
    model.set_adapter("other")
    assert torch.equal(logits(model, **inputs), alone[1])
    assert all(".other." in n for n in trainable(model))
    assert methods.param_count(model)["trainable"] == methods.param_count(donor)["trainable"]
    model.set_adapter("default")
    assert torch.equal(logits(model, **inputs), alone[0])


@pytest.mark.parametrize("active", ["default", "other"])
def test_deleting_an_adapter_removes_its_tensors_and_activates_what_is_left(active):
    model, inputs = attached("moa_soft"), batch(left=2)
    want = logits(model, **inputs)
    model.add_adapter("other", methods.load("molora"))
    model.set_adapter(active)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT says which adapter it activates
        model.delete_adapter("other")
    assert not [n for n, _ in model.named_parameters() if ".other." in n]
    assert torch.equal(logits(model, **inputs), want)
    assert model.base_model.active_adapters == ["default"] and set(model.peft_config) == {"default"}


@pytest.mark.parametrize("name", MIXTURES)
def test_unload_gives_the_base_back(name):
    plain, inputs = base(), batch(left=2)
    names = [n for n, _ in plain.named_modules()]
    implementation, want = plain.config._attn_implementation, logits(plain, **inputs)
    model = attached(name, plain)
    logits(model, **inputs)
    restored = model.unload()
    assert restored is plain and [n for n, _ in restored.named_modules()] == names
    assert restored.config._attn_implementation == implementation
    assert not restored._forward_pre_hooks and not restored._forward_hooks
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in restored.modules())
    assert torch.equal(logits(restored, **inputs), want)
    assert torch.equal(
        logits(attached(name, restored, trained=False), **inputs),
        logits(attached(name, trained=False), **inputs),
    )


@pytest.mark.parametrize("name", MIXTURES)
def test_merging_is_refused(name):
    model = attached(name)
    for merge in (model.merge_and_unload, model.base_model.merge_adapter):
        with pytest.raises(ConfigError, match="cannot be merged"):
            merge()


@pytest.mark.parametrize("name", ADAPTERS)
def test_deepcopy_is_independent_and_equal(name):
    inputs = batch(left=2)
    model = attached(name)
    want = logits(model, **inputs)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin, **inputs), want)
    train(twin, steps=1)
    assert not torch.equal(logits(twin, **inputs), want)
    assert torch.equal(logits(model, **inputs), want)
    with methods.record(twin) as recorder:
        logits(model, **inputs)
    assert not recorder.entries, "the copy's recorder heard the original"


@pytest.mark.parametrize("name", MIXTURES)
def test_state_dict_round_trip(name):
    model, other = attached(name), attached(name, trained=False)
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other, **batch()), logits(model, **batch()))


@pytest.mark.parametrize(
    ("name", "override"), SIZE_KEYS, ids=lambda v: v if isinstance(v, str) else next(iter(v))
)
def test_every_size_key_changes_the_parameter_count(name, override):
    assert count(name, **override) != count(name)


@pytest.mark.parametrize("name", MIXTURES)
def test_bf16_base_with_fp32_adapters(name):
    """Outputs are finite and as near to fp32 as bf16 allows; the trained tensors stay fp32."""
    inputs = batch(left=2)
    real = inputs["attention_mask"].bool()
    plain = base()
    model = attached(name, copy.deepcopy(plain).to(torch.bfloat16))
    assert {p.dtype for p in trainable(model).values()} == {torch.float32}
    extra = prompt_mask(model, inputs["input_ids"])
    got = logits(model, **inputs, **extra)[real]
    assert got.dtype == torch.bfloat16 and got.isfinite().all()
    if not any(of_routers(name, "JUMPS")):  # selections may differ in another precision
        assert_near("logits", got, logits(attached(name, plain), **inputs, **extra)[real], 0.1)
    train(model, steps=1)
    assert all(p.isfinite().all() for p in trainable(model).values())
