"""A base is its files: which of them make its fingerprint, what is wrong with weights, whose code runs.

pytest tests/benchmarks/test_bases.py
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moabench.benchmarks.bases import fingerprint
from moabench.benchmarks.bases.fingerprint import model_fingerprint
from moabench.benchmarks.bases.folder import check_folder
from moabench.benchmarks.bases.loading import load_model, skeleton
from moabench.benchmarks.command import cli
from moabench.benchmarks.command.runs import config as config_of
from moabench.benchmarks.config import choices
from moabench.benchmarks.config.overrides import composed
from moabench.benchmarks.config.run import RunConfig, run_hash
from moabench.benchmarks.config.sections import ModelConfig
from moabench.benchmarks.machine.files import RunError, write_yaml
from moabench.benchmarks.world import MODEL
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


def edited(folder, **changes):
    """The weights of a folder with tensors replaced, or removed where the value is None."""
    file = folder / "model.safetensors"
    tensors = load_file(file) | {name.replace("__", "."): value for name, value in changes.items()}
    tensors = {name: value.clone() for name, value in tensors.items() if value is not None}
    save_file(tensors, file, metadata={"format": "pt"})


# ---- fingerprints


def test_the_shipped_bases_keep_their_names(tmp_path):
    """The runs of earlier versions are found: config, tokenizer and weights, one after another."""
    import hashlib

    content = hashlib.sha256()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        content.update(name.encode() + (MODEL / name).read_bytes())
    found = model_fingerprint(ModelConfig("tiny", kind="builtin"), tmp_path)
    assert found.digest == content.hexdigest()[:16]


@pytest.mark.parametrize(
    "name",
    [
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
        "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
        "model-00002-of-00002.safetensors", "additional_chat_templates/tool.jinja", "qwen.tiktoken",
        "pytorch_model.bin",
    ],
)  # fmt: skip
def test_every_file_that_is_read_is_hashed(saved, tmp_path, name):
    before = model_fingerprint(pretrained(saved), tmp_path)
    (saved / name).parent.mkdir(exist_ok=True)
    with (saved / name).open("ab") as file:
        file.write(b" ")
    assert model_fingerprint(pretrained(saved), tmp_path).digest != before.digest
    with pytest.raises(RunError, match=Path(name).name):
        before.check()


@pytest.fixture
def large(saved, monkeypatch):
    """Weights that count as large, as old as need be: their hash is kept."""
    monkeypatch.setattr(fingerprint, "LARGE", 2**12)
    monkeypatch.setattr(fingerprint, "SETTLED", -1)
    monkeypatch.setattr(fingerprint, "BLOCK", 16)  # most of the file is in no sampled block
    return saved


def test_large_weights_are_hashed_once(large, tmp_path, monkeypatch):
    import hashlib

    read = []
    digest = hashlib.file_digest
    monkeypatch.setattr(
        fingerprint.hashlib, "file_digest", lambda file, kind: read.append(file.name) or digest(file, kind)
    )
    first = model_fingerprint(pretrained(large), tmp_path).digest
    assert str(large / "model.safetensors") in read
    read.clear()
    assert model_fingerprint(pretrained(large), tmp_path).digest == first
    assert str(large / "model.safetensors") not in read
    for kept in (tmp_path / ".cache").glob("file-*.json"):
        kept.write_text('{"sample": "')  # cut
    assert model_fingerprint(pretrained(large), tmp_path).digest == first
    assert str(large / "model.safetensors") in read


@pytest.mark.parametrize("part", ["model__layers__0__self_attn__q_proj__weight", "model__norm__weight"])
@pytest.mark.parametrize("times", ["new", "put back"])
def test_no_change_of_large_weights_is_missed(large, tmp_path, part, times):
    """Of any tensor, at equal size, in place or as a new file, whatever the file says of its age."""
    file = large / "model.safetensors"
    old, state = model_fingerprint(pretrained(large), tmp_path), file.stat()
    name = part.replace("__", ".").replace("q.proj", "q_proj").replace("self.attn", "self_attn")
    tensors = load_file(file)
    at = file.read_bytes().index(tensors[name].numpy().tobytes())
    with file.open("r+b") as opened:
        opened.seek(at + tensors[name].numel() * 2)
        opened.write(b"\x01")
    if times == "put back":
        os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert file.stat().st_size == state.st_size
    assert model_fingerprint(pretrained(large), tmp_path).digest != old.digest
    with pytest.raises(RunError, match=r"model\.safetensors was changed"):
        old.check()


def test_a_fresh_file_is_hashed_again(large, tmp_path, monkeypatch):
    """A second write in the same tick of the clock would leave no trace."""
    monkeypatch.setattr(fingerprint, "SETTLED", 10**18 * 10)
    model_fingerprint(pretrained(large), tmp_path)
    assert not list(tmp_path.glob(".cache/*"))


def test_a_cache_that_cannot_be_written_costs_time_only(large, tmp_path):
    (tmp_path / ".cache").write_text("a file")
    assert model_fingerprint(pretrained(large), tmp_path).digest


def test_files_that_only_were_touched_are_the_same(saved, tmp_path):
    before = model_fingerprint(pretrained(saved), tmp_path)
    for file in saved.iterdir():
        os.utime(file, (1, 1))
    (saved / "README.md").write_text("not read by anything")
    before.check()


@pytest.mark.parametrize("when", ["loading", "evaluating the base", "evaluating"])
def test_weights_that_change_during_a_run_end_it(saved, tmp_path, monkeypatch, when):
    """In place: then a loaded model changes too, since it is the file mapped into memory."""
    from moabench.benchmarks.run import run as experiment
    from moabench.benchmarks.run.folder import find, state_of
    from moabench.benchmarks.run.stages import base, record

    module, name = {
        "loading": (base, "load_model"),
        "evaluating the base": (base, "measured"),
        "evaluating": (record, "run"),  # what comes after it
    }[when]
    original = getattr(module, name)

    def written(*args):
        with (saved / "model.safetensors").open("r+b") as file:
            file.seek(-8, 2)
            file.write(b"\1")
        return original(*args)

    monkeypatch.setattr(module, name, written)
    runs = tmp_path / "runs"
    options = ["method=none", f"model.path={saved}", "task=arc_easy", "forgetting=none", "data.eval_limit=2"]
    cfg = composed([*options, f"runs_dir={runs}", "logger=none", "quiet=true"])
    with pytest.raises(RunError, match=r"model\.safetensors was changed while the run used it"):
        experiment.run(cfg)
    (folder,) = find(runs)
    assert state_of(folder) == "failed" and not (folder / "metrics.json").exists()
    assert when == "evaluating" or not list(runs.glob(".base/*"))  # what the next run would believe


def test_a_mistake_in_the_data_leaves_nothing(large, tmp_path):
    """Weights are hashed last, and only then is anything kept."""
    from moabench.benchmarks.run.prepared import Prepared

    options = [f"model.path={large}", "data=local", f"data.root={tmp_path}", f"runs_dir={tmp_path / 'runs'}"]
    with pytest.raises(ConfigError):
        Prepared(composed(options))
    assert not (tmp_path / "runs").exists()


# ---- weights


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model.layers.1.mlp.up_proj.weight": None}, r"lack model\.layers\.1\.mlp\.up_proj\.weight\."),
        ({"model.embed_tokens.weight": None}, r"lack model\.embed_tokens\.weight"),
        ({"lm_head.weight": None}, r"lack lm_head\.weight"),
        ({"extra.bias": torch.zeros(2)}, r"no place for, extra\.bias"),
        (
            {"model.layers.0.self_attn.q_proj.weight": torch.zeros(32, 16)},
            r"another shape for model\.layers\.0\.self_attn\.q_proj\.weight \(\(32, 16\), expected",
        ),
        ({"model.norm.weight": torch.full((32,), torch.nan)}, r"not finite in model\.norm\.weight"),
        ({"model.norm.weight": torch.full((32,), -torch.inf)}, r"not finite in model\.norm\.weight"),
    ],
)
def test_weights_that_are_not_those_of_the_config(saved, changes, said, capfd):
    edited(saved, **changes)
    with pytest.raises(ConfigError, match=said) as error:
        load_model(pretrained(saved), 0, "cpu")
    assert str(saved) in str(error.value) and "\n" not in str(error.value)
    assert "LOAD REPORT" not in capfd.readouterr().err


@pytest.mark.parametrize("kind", ["prefix", "half of the tensors", "one layer less"])
def test_a_base_is_never_drawn_at_random(saved, kind):
    tensors = load_file(saved / "model.safetensors")
    if kind == "prefix":
        tensors = {f"transformer.{name}": value for name, value in tensors.items()}
    elif kind == "half of the tensors":
        tensors = dict(list(tensors.items())[::2])
    else:
        tensors = {name: value for name, value in tensors.items() if "layers.1." not in name}
    save_file(tensors, saved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"its weights lack .* and \d+ more"):
        load_model(pretrained(saved), 0, "cpu")


def test_numbers_beyond_the_asked_type_are_named(saved):
    edited(saved, **{"model.norm.weight": torch.full((32,), 1e6)})
    load_model(pretrained(saved), 0, "cpu")
    with pytest.raises(ConfigError, match=r"model\.dtype=float16\) in model\.norm\.weight"):
        load_model(pretrained(saved, dtype="float16"), 0, "cpu")


def test_a_nan_is_found_before_it_is_packed(saved):
    pytest.importorskip("bitsandbytes")
    weight = load_file(saved / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    weight[0, 0] = torch.nan
    edited(saved, **{"model.layers.0.mlp.up_proj.weight": weight})
    with pytest.raises(ConfigError, match=r"not finite in model\.layers\.0\.mlp\.up_proj"):
        load_model(pretrained(saved, quantize=4), 0, "cpu")


def test_tied_weights_and_shards_are_complete(llama, tokenizer, tmp_path):
    from transformers import LlamaForCausalLM

    llama.config.tie_word_embeddings = True
    LlamaForCausalLM(llama.config).save_pretrained(tmp_path, max_shard_size="20KB")
    tokenizer.save_pretrained(tmp_path)
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 1
    load_model(pretrained(tmp_path), 0, "cpu")
    shards[0].rename(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match=f"names '{shards[0].name}', which is no file"):
        check_folder(pretrained(tmp_path))


def test_an_index_names_files_of_its_folder_only(saved):
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "../other/model.safetensors"}}
    (saved / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match=r"\.\./other"):  # it would be read and not be hashed
        check_folder(pretrained(saved))


# ---- adapters in the base


def test_a_base_with_an_adapter_is_refused(saved, llama):
    import peft

    peft.get_peft_model(llama, peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(saved)
    with pytest.raises(ConfigError, match="holds a PEFT adapter"):
        check_folder(pretrained(saved))
    (saved / "config.json").unlink()
    with pytest.raises(ConfigError, match="holds a PEFT adapter"):
        check_folder(pretrained(saved))


def test_an_adapter_that_transformers_puts_into_the_base_is_refused(saved, llama, monkeypatch):
    """As from a hub id, whose files are seen only by transformers."""
    import peft

    peft.get_peft_model(llama, peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(saved)
    monkeypatch.setattr("moabench.benchmarks.bases.loading.check_folder", lambda cfg: None)
    with pytest.raises(ConfigError, match=r"holds a PEFT adapter|could not be loaded: .*peft"):
        load_model(pretrained(saved), 0, "cpu")


# ---- code of the model's own

CODE = """
import pathlib
pathlib.Path({marker!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class C(LlamaConfig):
    model_type = "{kind}"
class M(LlamaForCausalLM):
    config_class = C
class T(PreTrainedTokenizerFast):
    pass
def generate(model, *args, **kwargs):
    pathlib.Path({marker!r}).touch()
"""
GRID = "hydra: {sweeper: {params: {++model.trust_remote_code: true}}}"
MAPS = {
    "architecture": ({"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}, "never_heard_of"),
    "known": ({"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}, "llama"),
    "model": ({"AutoModelForCausalLM": "own.M"}, "clip_vision_model"),
}


@pytest.fixture
def own(saved, tmp_path):
    """own(kind) -> (folder with harmless Python files, the file that they make when they run)."""

    def make(kind, worded=False):
        marker = tmp_path / "it_ran"
        code = CODE.format(marker=str(marker), kind=MAPS[kind][1])
        (saved / "own.py").write_text(code)
        (saved / "custom_generate").mkdir()
        (saved / "custom_generate" / "generate.py").write_text(code)
        config = json.loads((saved / "config.json").read_text())
        config |= {"auto_map": MAPS[kind][0], "model_type": MAPS[kind][1]}
        (saved / "config.json").write_text(json.dumps(config))
        if worded:
            words = json.loads((saved / "tokenizer_config.json").read_text())
            words |= {"auto_map": {"AutoTokenizer": [None, "own.T"]}, "tokenizer_class": "T"}
            (saved / "tokenizer_config.json").write_text(json.dumps(words))
        return saved, marker

    return make


@pytest.fixture
def unasked(monkeypatch, tmp_path):
    """A terminal on which every question would be answered with yes, and a cache of modules of its own."""
    monkeypatch.setattr("builtins.input", lambda *text: pytest.fail("asked on the terminal"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))


@pytest.mark.parametrize("worded", [False, True])
@pytest.mark.parametrize("kind", ["architecture", "model"])
def test_a_strangers_code_does_not_run(own, unasked, kind, worded):
    folder, marker = own(kind, worded)
    for load in (lambda cfg: load_model(cfg, 0, "cpu"), skeleton):
        with pytest.raises(ConfigError, match=r"trust_remote_code=true on the command line|no .* here"):
            load(pretrained(folder))
        assert not marker.exists()


@pytest.mark.parametrize("worded", [False, True])
def test_a_known_architecture_is_loaded_by_its_own_class(own, unasked, worded):
    """Published models of an architecture that has since come into transformers still name their files."""
    folder, marker = own("known", worded)
    try:
        model, _ = load_model(pretrained(folder), 0, "cpu")
    except ConfigError as error:
        assert worded and "trust_remote_code" in str(error)  # its class is nowhere else
    else:
        assert type(model).__module__.startswith("transformers.") and type(model.generate.__self__) is type(
            model
        )
    assert not marker.exists()


def test_code_that_is_trusted_runs_and_is_hashed(own, unasked, tmp_path):
    folder, marker = own("architecture")
    trusted = pretrained(folder, trust_remote_code=True)
    before = model_fingerprint(trusted, tmp_path).digest
    model, _ = load_model(trusted, 0, "cpu")
    assert type(model).__name__ == "M" and marker.exists()
    with (folder / "own.py").open("a") as file:
        file.write("# changed\n")
    assert model_fingerprint(trusted, tmp_path).digest != before


def test_trust_is_recorded_and_hashed_and_its_default_is_neither_news():
    typed = ("model.path=/some/where", "model.trust_remote_code=true")
    trusted, plain = composed(typed), composed(typed[:1])
    assert trusted.to_dict()["model"]["trust_remote_code"] is True
    assert run_hash(trusted) != run_hash(plain)
    old = plain.to_dict()
    assert old["model"].pop("trust_remote_code") is False
    from moabench.benchmarks.config.hashing import plain as data

    assert data(plain.model, hashed=True) == old["model"]


def test_trust_is_typed_or_is_not_there(tmp_path, capsys):
    with pytest.raises(ConfigError, match=r"trust_remote_code=true: expected false with kind=builtin"):
        composed(["model.trust_remote_code=true"])
    data = composed(["model.path=/some/where", "model.trust_remote_code=true"]).to_dict()
    with pytest.raises(ConfigError, match="expected it on the command line"):
        RunConfig.from_composed({**data, "task": data["task"]["eval"]})  # as of the file of a run or a study
    variants = {"a": {"model.trust_remote_code": True}}
    study = {"name": "x", "variant": "a", "variants": variants}
    with pytest.raises(ConfigError, match="expected it on the command line"):
        RunConfig.from_composed(
            {**data, "task": data["task"]["eval"], "experiment": study}, ["experiment.variant=a"]
        )
    write_yaml(tmp_path / "config.yaml", data)
    with pytest.raises(ConfigError, match="expected it on the command line"):
        config_of(tmp_path)  # moabench runs retry, rerun


@pytest.mark.parametrize("where", ["model: {trust_remote_code: true}", GRID])
def test_a_study_cannot_trust(where, tmp_path, monkeypatch, capsys):
    """Neither in its keys nor in its grid, whose keys are given to a job like those that are typed."""
    conf = shutil.copytree(choices.CONF, tmp_path / "conf")
    (conf / "experiment" / "theirs.yaml").write_text(f"# @package _global_\n{where}\n")
    for module in (cli, choices):
        monkeypatch.setattr(module, "CONF", conf)
    code = cli.main(
        ["-m", "+experiment=theirs", f"runs_dir={tmp_path}", "model.path=/some/where", "logger=none"]
    )
    assert code == 2 and "expected it on the command line" in capsys.readouterr().err


def test_the_question_is_not_asked_of_a_whole_run(own, tmp_path):
    """As in `yes | python run.py model.path=DIR`."""
    folder, marker = own("architecture")
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; from moabench.benchmarks.command.cli import main; sys.exit(main())",
            *(f"model.path={folder}", f"runs_dir={tmp_path / 'runs'}", "logger=none"),
        ],
        input="yes\n" * 50,
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 2 and done.stderr.startswith("error: model=saved") and not marker.exists()
    assert len(done.stderr.splitlines()) == 1
