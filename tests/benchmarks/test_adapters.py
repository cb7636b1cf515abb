"""A trained adapter is loaded whole, on its base, or not at all: adapter folders that are cut, changed or
hostile.

pytest tests/benchmarks/test_adapters.py
"""

import copy
import json
import shutil

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from moabench import methods
from moabench.benchmarks.bases.adapters import base_sizes, contents, load_adapter
from moabench.methods import catalog
from moabench.methods.spec import ConfigError

KINDS = ("molora", "moa_sparse", "lora", "dora")
FILES = ("adapter_config.json", "adapter_model.safetensors", "base.json")
IDS = torch.arange(8, 24).view(2, 8)


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer):
    """folders[method] -> (a base, an adapter of it that is trained, its logits), of which nothing is
    changed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    found = {}
    for name in KINDS:
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=2, **sizes)
        base = LlamaForCausalLM(config).eval()
        model = methods.attach(copy.deepcopy(base), catalog.raw(name)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
        folder = tmp_path_factory.mktemp(name)
        model.save_pretrained(folder)
        card = {"name": "mine", "fingerprint": "0123456789abcdef", "sizes": base_sizes(base)}
        (folder / "base.json").write_text(json.dumps(card | contents(folder)))
        found[name] = (base, folder, model(input_ids=IDS).logits.detach())
    return found


@pytest.fixture
def adapter(folders, tmp_path):
    """adapter(method) -> (a base of its own, a folder of its own, the right logits). The folder is a
    stranger's: nothing says what it was."""

    def make(name="molora"):
        base, folder, logits = folders[name]
        copied = shutil.copytree(folder, tmp_path / name, dirs_exist_ok=True)
        card = json.loads((copied / "base.json").read_text())
        (copied / "base.json").write_text(json.dumps({k: v for k, v in card.items() if k != "contents"}))
        return copy.deepcopy(base), copied, logits

    return make


def changed(folder, **tensors):
    """The weights with tensors replaced, or removed where the value is None."""
    file = folder / "adapter_model.safetensors"
    kept = {name: t.clone() for name, t in (load_file(file) | tensors).items() if t is not None}
    save_file(kept, file, metadata={"format": "pt"})


def configured(folder, **keys):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


def first(folder):
    """(name, tensor) of one that is no vector."""
    return next((n, t) for n, t in load_file(folder / "adapter_model.safetensors").items() if t.dim() == 2)


def refused(base, folder, said, fingerprint=None):
    """The adapter is refused in one line, and the model is as it was."""
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    with pytest.raises(ConfigError, match=said) as error:
        load_adapter(base, folder, fingerprint)
    assert "\n" not in str(error.value)
    after = base.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)


@pytest.mark.parametrize("name", KINDS)
def test_a_whole_adapter_is_the_model_that_was_trained(adapter, name):
    base, folder, logits = adapter(name)
    loaded = load_adapter(base, folder, "0123456789abcdef")
    assert torch.equal(loaded(input_ids=IDS).logits, logits)
    assert not loaded.training and not any(
        p.requires_grad for n, p in loaded.named_parameters() if "lora" in n
    )


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("half", "lacks .* more"),
        ("none", "holds no tensor"),
        ("one less", "its file lacks base_model"),
        ("one more", r"does not declare, base_model\.model\.extra"),
        ("of the base", r"does not declare, base_model\.model\.model\.norm\.weight"),
        ("shape", "another shape for base_model"),
        ("integers", r"another kind of numbers for .*int64, expected float32"),
        ("8 bits", r"another kind of numbers for .*float8"),
        ("nan", "not finite in base_model"),
        ("infinite", "not finite in base_model"),
        ("double", "not finite in base_model"),
    ],
)
def test_tensors_that_are_not_what_the_config_declares(adapter, name, fault, said):
    base, folder, _ = adapter(name)
    known, (one, tensor) = load_file(folder / "adapter_model.safetensors"), first(folder)
    changes = {
        "half": dict.fromkeys(list(known)[::2]),
        "none": dict.fromkeys(known),
        "one less": {one: None},
        "one more": {"base_model.model.extra": torch.zeros(2)},
        "of the base": {"base_model.model.model.norm.weight": torch.zeros(32)},
        "shape": {one: tensor[:, :-1]},
        "integers": {one: tensor.long()},
        "8 bits": {one: tensor.to(torch.float8_e4m3fn)},
        "nan": {one: tensor.fill_diagonal_(torch.nan)},
        "infinite": {one: tensor.clone().fill_diagonal_(-torch.inf)},
        "double": {one: tensor.clone().fill_(1.0).double() * 1e60},
    }
    changed(folder, **changes[fault])
    refused(base, folder, said)


@pytest.mark.parametrize("kept", [torch.bfloat16, torch.float16, torch.float64])
def test_floats_of_other_sizes_are_read(adapter, kept):
    base, folder, logits = adapter()
    changed(folder, **{n: t.to(kept) for n, t in load_file(folder / "adapter_model.safetensors").items()})
    assert torch.allclose(load_adapter(base, folder)(input_ids=IDS).logits, logits, atol=0.05)


def test_a_scale_is_no_size(adapter):
    """It may be larger than any dimension of the tensors."""
    base, folder, _ = adapter()
    spec = json.loads((folder / "adapter_config.json").read_text())["spec"]
    configured(folder, spec=catalog.override(spec, {"experts": {"alpha": 10**6}}))
    load_adapter(base, folder)


def test_plain_peft_takes_no_half_adapter_either(adapter):
    """As every user loads one, who knows nothing of run folders."""
    from peft import PeftModel

    for tensor, said in ((None, "lacks"), (torch.zeros(32), "does not declare")):
        base, folder, _ = adapter()
        changed(
            folder, **{first(folder)[0] if tensor is None else "base_model.model.model.norm.weight": tensor}
        )
        with pytest.raises(ConfigError, match=said):
            PeftModel.from_pretrained(base, folder)


def test_pickled_weights_are_not_opened(adapter):
    base, folder, _ = adapter()
    tensors = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    torch.save(tensors, folder / "adapter_model.bin")
    refused(base, folder, "no adapter_model.safetensors in it")


def test_the_base_of_another_fingerprint(adapter):
    base, folder, _ = adapter()
    refused(base, folder, "with the fingerprint 0123456789abcdef, but this base has fedc", "fedc")
    load_adapter(base, folder)  # not known: not compared


def test_a_second_adapter_is_refused(adapter):
    base, folder, _ = adapter()
    refused(load_adapter(base, folder), folder, "expected a base without an adapter")


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"peft_type": "IA3"}, "peft_type='IA3'; expected MIXTURE or LORA"),
        ({"peft_type": ["LORA"]}, "peft_type="),
        ({"peft_type": None}, "peft_type=None"),
        ({"peft_type": "MIXTURE", "spec": None}, "spec=None"),
        (
            {"peft_type": "MIXTURE", "spec": {"name": "x", "experts": {"kind": "os.system"}}},
            "no such experts",
        ),
        ({"peft_type": "LORA", "spec": {}, "base": {}, "r": 10**12}, r"(adapter_config.r=|target_modules)"),
        ({"peft_type": "LORA", "target_modules": "(a+)+$"}, "target_modules="),
        ({"peft_type": "LORA", "target_modules": ["q_proj"], "r": 1, "bias": "all"}, "bias='all'"),
        (
            {"peft_type": "LORA", "target_modules": ["q_proj"], "r": 1, "rank_pattern": {"(a+)+": 2}},
            "names no layers",
        ),
        (
            {"peft_type": "LORA", "target_modules": ["q_proj"], "megatron_config": {"a": 1}, "r": 1},
            "megatron_config",
        ),
        (
            {"peft_type": "LORA", "target_modules": ["q_proj"], "megatron_core": "evil", "r": 1},
            "megatron_core",
        ),
    ],
    ids=str,
)
def test_a_config_that_is_not_ours(adapter, name, keys, said):
    base, folder, _ = adapter(name)
    configured(folder, **keys)
    if keys["peft_type"] == "LORA":  # the others are of a mixture
        for key in ("spec", "base"):
            data = json.loads((folder / "adapter_config.json").read_text())
            data.pop(key, None)
            (folder / "adapter_config.json").write_text(json.dumps(data))
    refused(base, folder, said)


@pytest.mark.parametrize(
    "change",
    [
        {"experts": {"n": 10**9}},
        {"experts": {"r": 10**9}},
        {"experts": {"r": [8, 10**9]}},
        {"layers": {"0-99999999999": {"experts": {"r": 4}}}},
        {"layers": {"0": {"experts": {"n": 10**9}}}},
        {"also": {"more": {"site": "ffn", "experts": {"kind": "parallel_adapter", "bottleneck": 10**9}}}},
    ],
    ids=str,
)
def test_sizes_are_refused_from_their_numbers(adapter, change):
    """Before anything is made of them: the names alone of so many experts would fill the memory."""
    base, folder, _ = adapter()
    spec = json.loads((folder / "adapter_config.json").read_text())["spec"]
    configured(folder, spec=catalog.override(spec, change))
    refused(base, folder, r"has \d+, beyond")


def test_a_number_of_thousands_of_digits(adapter):
    base, folder, _ = adapter()
    file = folder / "adapter_config.json"
    file.write_text(file.read_text().replace("{", '{"x": ' + "9" * 5000 + ",", 1))
    refused(base, folder, "cannot be read")


@pytest.mark.parametrize(
    "text", ["", "[]", "3", "null", "[" * 100_000, '{"a":' * 100_000, "{", "\x00", "1" * 6000]
)
@pytest.mark.parametrize("file", ["adapter_config.json", "base.json"])
def test_a_file_that_is_no_mapping(adapter, file, text):
    base, folder, _ = adapter()
    (folder / file).write_text(text)
    if (file, text) == ("base.json", "null"):
        return
    refused(base, folder, rf"{file}( in it|: cannot be read)")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_folder_cut_anywhere(folders, tmp_path_factory, data):
    """Any file ends early, loses a piece or has a byte changed: one error, or the model that was trained
    where only a name or a space went."""
    name, file = data.draw(st.sampled_from(KINDS)), data.draw(st.sampled_from(FILES))
    base, source, logits = folders[name]
    folder = shutil.copytree(source, tmp_path_factory.mktemp("cut") / "adapter")
    content = (folder / file).read_bytes()
    # the header of the tensors as often as all the rest
    at = data.draw(st.one_of(st.integers(0, len(content) - 1), st.integers(0, min(2000, len(content) - 1))))
    how = data.draw(st.sampled_from(("cut", "lost", "changed")))
    if how == "cut":
        content = content[:at]
    elif how == "lost":
        content = content[:at] + content[at + data.draw(st.integers(1, 40)) :]
    else:
        content = content[:at] + bytes([data.draw(st.integers(0, 255))]) + content[at + 1 :]
    (folder / file).write_bytes(content)
    model = copy.deepcopy(base)
    try:
        loaded = load_adapter(model, folder, "0123456789abcdef")
    except ConfigError as error:
        assert "\n" not in str(error) and str(folder) in str(error)
        return
    assert torch.equal(loaded(input_ids=IDS).logits, logits)


def test_transformers_own_calls_are_one_sentence(adapter):
    base, folder, _ = adapter()
    names = set(base.state_dict())
    with pytest.raises(ConfigError, match=r"peft\.PeftModel\.from_pretrained"):
        base.load_adapter(str(folder))
    assert set(base.state_dict()) == names  # nothing was put into it
