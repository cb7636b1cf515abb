"""Numbers have ends, names stay in their folder, and what cannot fit into the machine is refused with its
estimate before it takes memory.

Run: python -m pytest tests/benchmarks/test_ranges.py
"""

import dataclasses
import math
import typing

import pytest
import torch

from moabench.benchmarks.config.budget import BudgetConfig
from moabench.benchmarks.config.choices import groups
from moabench.benchmarks.config.mix import PartConfig
from moabench.benchmarks.config.overrides import composed as _composed
from moabench.benchmarks.config.overrides import prepare
from moabench.benchmarks.config.run import RunConfig
from moabench.benchmarks.config.sections import Rate
from moabench.benchmarks.machine import globals as process
from moabench.benchmarks.machine import memory
from moabench.benchmarks.run import fits
from moabench.benchmarks.run.folder import RunFolder
from moabench.benchmarks.run.prepared import Prepared
from moabench.benchmarks.run.run import run
from moabench.benchmarks.world.facts import Axes
from moabench.methods import catalog
from moabench.methods.spec import ConfigError, Part, build

SMALL = ["model=random_tiny", "train=smoke", "task=arc_easy", "data.eval_limit=8", "data.train_limit=32"]
SMALL += ["forgetting=none", "logger=none", "quiet=true", "device=cpu"]
JUDGED_BY_THEMSELVES = (Axes, BudgetConfig)
"""Sections whose numbers are compared in their own `__post_init__`."""


def composed(*words: str) -> RunConfig:
    return _composed(words)


def endless(cls: type, path: str) -> list[str]:
    """Numbers of a config, at every depth, to which something above every range can be given."""
    found = []
    for name, hint in typing.get_type_hints(cls, include_extras=True).items():
        if typing.get_origin(hint) is not typing.ClassVar and name in {
            f.name for f in dataclasses.fields(cls)
        }:
            found += _endless(hint, f"{path}.{name}")
    return found


def _endless(hint, path: str) -> list[str]:
    if hint == Rate:  # a far end: a rate that is too large is found by its loss
        return []
    if typing.get_origin(hint) is typing.Annotated:
        bound = hint.__metadata__[0]
        return [path] if typing.get_args(hint)[0] in (int, float) and bound.holds(10**18) else []
    if dataclasses.is_dataclass(hint):
        return [] if hint in JUDGED_BY_THEMSELVES else endless(hint, path)
    if hint in (int, float):
        return [path]
    literal = typing.get_origin(hint) is typing.Literal
    return [] if literal else [key for part in typing.get_args(hint) for key in _endless(part, path)]


def test_every_number_has_an_end():
    parts = [part for family in Part.__subclasses__() for part in family.kinds().values()]
    assert len(parts) > 15
    assert [key for cls in (RunConfig, PartConfig, *parts) for key in endless(cls, cls.__name__)] == []


@pytest.mark.parametrize(
    "word",
    [
        "seed=4294967296", "data.seed=-1", "threads=100000", "train.epochs=1e30", "train.batch_size=10000000",
        "+mix.parts={gsm8k: {weight: 1e9}}", "method.layers={0-99999999999:{experts:{r:2}}}",
        "budget.size=9999999B", "budget.size=lora_r99999999",
        "model.quantize=99999999999", "data.world.hops=999999999999",
    ],
)  # fmt: skip
def test_what_lies_beyond_is_one_error(word, tmp_path):
    with pytest.raises(ConfigError, match="expected"):
        Prepared(composed(word, f"runs_dir={tmp_path}"))


@pytest.mark.parametrize("word", ["seed=" + "9" * 6000, "x=" + "[" * 5000, "train.lr=" + "[1," * 3000])
def test_what_no_parser_bears_is_one_short_error(word):
    with pytest.raises(ConfigError, match="cannot read") as error:
        prepare([word])
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("key", ["0-99999999999", "²", "1-", "-1", "3-1", "0-1-2"])
def test_layers_that_are_no_numbers(key):
    with pytest.raises(ConfigError, match="names no layers"):
        catalog.parse(catalog.raw("molora") | {"layers": {key: {"experts": {"r": 2}}}})


# ---- names


@pytest.mark.parametrize("name", ["../../x", "/somewhere/x", ".hidden", "x" * 101, "é" * 60, "a\x1b[31m", ""])
@pytest.mark.parametrize("key", ["model.name", "method.name"])
def test_a_name_that_enters_a_file_name_is_no_path(key, name):
    section, _, last = key.partition(".")
    data = composed().to_dict()
    data[section][last] = name
    with pytest.raises(ConfigError, match="stand in a file name"):
        build(RunConfig, data).parsed_method  # noqa: B018


def test_a_model_by_a_long_or_hidden_path_has_a_name():
    for path in ("/models/.hidden", "/models/" + "y" * 300, "/models/" + "é" * 90, "/", "org/näme"):
        name = RunConfig.from_composed(
            composed().to_dict() | {"model": {"name": "tiny", "path": path}}, [f"model.path={path}"]
        ).model.name
        assert name and len(name.encode()) <= 100


def test_whatever_text_a_key_holds_nothing_is_written_outside_of_runs_dir(tmp_path):
    """Every key of text at once, as far as it is taken; the task's name stands in config.yaml alone."""
    bad, inside = "../../../x", tmp_path / "a" / "b" / "runs"
    data = composed(*SMALL, "method=lora", "probe.times=1", f"runs_dir={inside}").to_dict()
    data["task"]["name"] = data["mix"]["name"] = data["experiment"]["about"] = bad
    data["logger"] |= {"project": bad, "group": bad}
    run(build(RunConfig, data))
    for folder, only in ((tmp_path, "a"), (tmp_path / "a", "b"), (tmp_path / "a" / "b", "runs")):
        assert [path.name for path in folder.iterdir()] == [only]


@pytest.mark.parametrize("name", ["é" * 200, "..", "a/b\n", "\ud800"])
def test_a_run_folder_has_a_name_that_a_file_system_takes(name, tmp_path):
    folder = RunFolder(tmp_path, name, "f" * 64)
    assert folder.path.parent == tmp_path and len(folder.name.encode()) < 120


def test_an_empty_runs_dir_is_no_folder():
    with pytest.raises(ConfigError, match="runs_dir=''"):
        composed("runs_dir=''")


# ---- memory


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["method=molora", "method.experts.n=10000"], "constants of the experts"),
        (["method=molora", "method.experts.n=1000000", "method.experts.r=1000000"], "constants"),
        (["method=molora", "method.experts.r=100000"], "trained weights"),
        (["method=lora", "method.experts.r=1000000"], "trained weights"),
        (["method=none", "model.random.hidden=1000000", "model.random.layers=900"], "frozen weights"),
        (["method=lora", "train.batch_size=50000"], "a step of 50,000 x"),
        (["method=lora", "train.accumulation=1000000", "train.steps=1000000"], "the order of"),
    ],
)  # fmt: skip
def test_what_cannot_fit_is_refused_with_its_estimate(words, named, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "total", lambda device: 2**30)
    prepared = Prepared(composed(*SMALL, *words, f"runs_dir={tmp_path}"))
    with pytest.raises(ConfigError, match=named) as error:
        fits.check(prepared, "cpu")
    assert "GiB of cpu's 1.0 GiB" in str(error.value)


@pytest.mark.parametrize("method", groups()["method"])
def test_the_memory_of_every_method_is_known(method, tmp_path, monkeypatch, capsys):
    """A step that cannot be estimated would be let through."""
    asked = []
    monkeypatch.setattr(memory, "total", lambda device: asked.append(device) or 2**40)
    prepared = Prepared(composed(*SMALL, f"method={method}", f"runs_dir={tmp_path}"))
    fits.check(prepared, "cpu")
    assert len(asked) == 1 + 2 * prepared.trains and "not known" not in capsys.readouterr().err


def test_a_run_that_cannot_fit_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "total", lambda device: 1000)
    with pytest.raises(ConfigError, match="out of memory before the run began"):
        run(composed(*SMALL, "method=lora", f"runs_dir={tmp_path}"))
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == []


def test_the_step_is_that_of_the_longest_row(tmp_path, monkeypatch):
    """Not of `train.max_length`, which most rows do not reach: what fits is not refused."""
    asked = []
    monkeypatch.setattr(fits, "peak_of", lambda model, batch, length, _: asked.append((batch, length)) or 0)
    prepared = Prepared(composed(*SMALL, "method=lora", "train.batch_size=4", f"runs_dir={tmp_path}"))
    fits.check(prepared, "cpu")
    lengths = [len(e.ids) for e in fits.encode_rows(_tokenizer(prepared), prepared.mixed[0], prepared.cfg)[0]]
    assert asked == [(4, max(lengths))] and max(lengths) < prepared.cfg.train.max_length


def _tokenizer(prepared):
    return fits.loading.load_tokenizer(prepared.cfg.model)


def test_a_base_that_no_method_fits_is_one_error(tmp_path):
    for method in ("lora", "molora"):
        words = ["model.random.architecture=bert", f"method={method}", f"runs_dir={tmp_path}"]
        with pytest.raises(ConfigError):
            fits.check(Prepared(composed(*SMALL, *words)), "cpu")


def test_the_memory_is_that_of_the_container_where_it_is_less(tmp_path, monkeypatch):
    whole = memory.total("cpu")
    (tmp_path / "memory.max").write_text("12345\n")
    monkeypatch.setattr(memory, "CGROUP", (tmp_path / "none", tmp_path / "memory.max"))
    assert memory.total("cpu") == 12345 < whole
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.total("cpu") >= whole and math.isfinite(whole)


# ---- threads of the environment


@pytest.mark.parametrize(("text", "threads"), [("2,1", 2), (" 3 ", 3), ("", None)])
def test_threads_of_the_environment(text, threads, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", text)
    assert process.threads_of(None) == (threads or process._cores()) and process.threads_of(1) == 1


@pytest.mark.parametrize("text", ["many", "0", "-1", "99999999", "1.5"])
def test_threads_that_cannot_be_are_named(text, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", text)
    before = torch.get_num_threads()
    with pytest.raises(ConfigError, match="OMP_NUM_THREADS="):
        process.set_globals(0, None, "cpu", "torch", "float32")
    assert torch.get_num_threads() == before
