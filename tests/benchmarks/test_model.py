"""Loading the base model: what comes back, and one clear error for each way a model cannot be had.

pytest tests/benchmarks/test_model.py
"""

import importlib.util
import json
import subprocess
import sys

import pytest
import torch
from test_config import composed

from moabench.benchmarks.bases.folder import check_folder
from moabench.benchmarks.bases.loading import load_model
from moabench.benchmarks.config.sections import ModelConfig, RandomModel
from moabench.methods.spec import ConfigError


@pytest.fixture
def saved(llama, tokenizer, tmp_path):
    """A folder as save_pretrained writes it."""
    folder = tmp_path / "saved"
    llama.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def pretrained(path, **kwargs):
    return ModelConfig("mine", path=str(path), **kwargs)


def test_a_saved_model_comes_back_ready_to_evaluate(saved, llama, tokenizer):
    model, found = load_model(pretrained(saved), 0, "cpu")
    assert not model.training
    assert all(p.requires_grad for p in model.parameters())  # nothing is frozen here
    ids = tokenizer("The red fox", return_tensors="pt")["input_ids"]
    assert torch.equal(model(ids).logits, llama(ids).logits)
    assert found("The red fox")["input_ids"] == ids[0].tolist()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_dtype_and_attention_reach_the_model(saved, dtype, attention):
    model, _ = load_model(pretrained(saved, dtype=dtype, attention=attention), 0, "cpu")
    assert model.dtype == getattr(torch, dtype)
    assert model.config._attn_implementation == attention


def test_a_tokenizer_without_a_pad_token_gets_one(saved):
    config = json.loads((saved / "tokenizer_config.json").read_text())
    del config["pad_token"]
    (saved / "tokenizer_config.json").write_text(json.dumps(config))
    _, tokenizer = load_model(pretrained(saved), 0, "cpu")
    assert tokenizer.pad_token_id is not None


def test_the_shipped_model_loads():
    model, tokenizer = load_model(ModelConfig("tiny", kind="builtin"), 0, "cpu")
    assert 4e6 < sum(p.numel() for p in model.parameters()) < 7e6
    assert len(tokenizer) == model.config.vocab_size


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "olmo2"])
def test_a_random_model_has_its_sizes_and_its_seed(architecture):
    config = ModelConfig(
        "random_tiny", kind="random", random=RandomModel(architecture=architecture, hidden=32, layers=3)
    )
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, tokenizer = load_model(config, 1, "cpu")
    assert torch.equal(torch.rand(3), expected)  # other random draws are not disturbed
    again, _ = load_model(config, 1, "cpu")
    other, _ = load_model(config, 2, "cpu")
    weights = [model.state_dict()["model.layers.2.mlp.up_proj.weight"] for model in (first, again, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert first.config.hidden_size == 32 and first.config.vocab_size == len(tokenizer)


@pytest.mark.parametrize(
    ("missing", "named"),
    [
        ("config.json", "no config.json"),
        ("model.safetensors", "no weights"),
        ("tokenizer.json", "no tokenizer"),
    ],
)
def test_an_incomplete_folder_is_named(saved, missing, named):
    for file in [missing, "tokenizer_config.json"] if missing == "tokenizer.json" else [missing]:
        (saved / file).unlink()
    with pytest.raises(ConfigError, match=named) as error:
        check_folder(pretrained(saved))
    assert str(saved) in str(error.value)


def test_broken_weights_are_one_error(saved):
    (saved / "model.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(ConfigError, match=r"model=mine.*could not be loaded"):
        load_model(pretrained(saved), 0, "cpu")


@pytest.mark.parametrize("path", ["./nowhere", "/nowhere/at/all", "a/b/c"])
def test_a_folder_that_is_not_there_is_named(path):
    with pytest.raises(ConfigError, match="no folder"):
        load_model(pretrained(path), 0, "cpu")


def test_a_hub_name_out_of_reach_is_one_line(monkeypatch):
    import transformers

    def offline(*args, **kwargs):
        raise OSError("We couldn't connect to 'https://huggingface.co'.\nLong story.")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", offline)
    with pytest.raises(ConfigError) as error:
        load_model(pretrained("nobody/nothing"), 0, "cpu")
    assert "nobody/nothing" in str(error.value) and "couldn't connect" in str(error.value)
    assert "\n" not in str(error.value)


def test_quantisation_needs_its_package(saved, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None)
    with pytest.raises(ConfigError, match=r"model.quantize=4: needs the package bitsandbytes"):
        load_model(pretrained(saved, quantize=4), 0, "cpu")


def test_what_cannot_be_quantised():
    with pytest.raises(ConfigError, match="expected null with kind=random"):
        composed("model=random_tiny", "+model.quantize=4")
    with pytest.raises(ConfigError, match="expected null with method=full"):
        composed("method=full", "+model.quantize=4")


def test_an_unknown_architecture_gets_the_nearest():
    with pytest.raises(ConfigError, match=r"architecture='lama'.*Did you mean 'llama'"):
        load_model(
            ModelConfig("random_tiny", kind="random", random=RandomModel(architecture="lama")), 0, "cpu"
        )


def test_importing_for_a_check_needs_no_torch():
    code = (
        "import sys, moabench.benchmarks.bases.loading, moabench.benchmarks.tasks.rows, "
        "moabench.benchmarks.tasks; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
