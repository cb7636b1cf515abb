"""conf/ and its typed form: every shipped choice composes and validates, bad values are refused, the hash
means what it says."""

import subprocess
import sys

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from moabench.benchmarks import tasks
from moabench.benchmarks.config import choices
from moabench.benchmarks.config.choices import CONF, groups
from moabench.benchmarks.config.run import RunConfig, run_hash
from moabench.benchmarks.config.sections import TaskConfig
from moabench.methods.spec import ConfigError

NEEDS = {("data", "local"): ["data.root=somewhere"]} | {
    ("mix", name): ["mix.file=somewhere"]
    for name in ("commonsense_15k", "commonsense_170k", "math_10k", "math_14k")
}
"""What a choice cannot do without."""


def composed(*overrides: str) -> RunConfig:
    """The config that these overrides give, as on the command line."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        data = OmegaConf.to_container(compose("config", list(overrides)), resolve=True)
    return RunConfig.from_composed(data, overrides)


CHOICES = [(group, choice) for group, choices in groups().items() for choice in choices]


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_every_choice_composes_and_validates(group, choice):
    cfg = composed(f"{'+' * (group == 'experiment')}{group}={choice}", *NEEDS.get((group, choice), []))
    assert len(run_hash(cfg)) == 64
    if group in ("method", "model", "mix"):
        part = getattr(cfg, group)
        assert (part["name"] if group == "method" else part.name) == choice, (
            "the name inside a file is the file's"
        )


def test_every_group_has_choices():
    assert {"method", "model", "data", "mix", "train", "logger"} <= groups().keys()


def test_defaults_are_the_documented_ones():
    cfg = composed()
    assert (cfg.method["name"], cfg.task.name, cfg.model.name, cfg.data.source) == (
        "moa_sparse",
        "arc",
        "tiny",
        "builtin",
    )
    assert (cfg.logger.kind, cfg.logger.mode, cfg.runs_dir, cfg.seed) == ("wandb", "offline", "runs", 0)


@pytest.mark.parametrize("name", [*tasks.names(), *tasks.suites()])
def test_every_task_and_suite_can_be_chosen(name):
    assert composed(f"task={name}").task == TaskConfig(name, tasks.suites().get(name, (name,)))


def test_a_list_of_tasks_is_one_run():
    assert composed("task=[arc,gsm8k,arc_easy]").task == TaskConfig(
        "arc+gsm8k+arc_easy", ("arc_easy", "arc_challenge", "gsm8k")
    )


@pytest.mark.parametrize("method", groups()["method"])
def test_paper_recipes_are_valid(method):
    cfg = composed(f"method={method}", "train=paper")
    assert cfg.train.epochs is not None and cfg.train.steps is None


def test_paper_recipe_gives_way_to_the_user():
    assert composed("method=adamole", "train=paper").train.lr == 1e-4
    assert composed("method=moa_soft", "train=paper").train.lr == 7.5e-4
    assert composed("method=adamole", "train=paper", "train.lr=3e-3").train.lr == 3e-3


# What the sources have (conf/train/paper.yaml names file and line of each).
PUBLISHED = {
    "moa_soft": {"max_length": 200, "lr": 7.5e-4, "weight_decay": 0.02, "beta2": 0.95, "max_grad_norm": 0},
    "molora": {"max_length": 200, "batch_size": 4, "accumulation": 8, "loss": "response"},
    "mixlora": {
        "weight_decay": 0.01,
        "max_grad_norm": 0,
        "loss": "whole",
        "schedule": "constant",
        "warmup": 0,
    },
    "mixlora_dynamic": {"weight_decay": 0.01, "max_grad_norm": 0, "loss": "whole", "lr": 2e-4},
    "adamole": {"loss": "whole", "lr": 1e-4, "warmup": 200, "max_length": 256, "max_grad_norm": 1},
    "hydralora": {"loss": "response", "max_length": 1024, "batch_size": 1, "accumulation": 8, "epochs": 1},
    "dora": {"loss": "whole", "warmup": 100, "schedule": "linear", "lr": 2e-4, "batch_size": 16, "epochs": 3},
}


@pytest.mark.parametrize("method", PUBLISHED)
def test_recipes_are_those_of_their_sources(method):
    train = composed(f"method={method}", "train=paper").train
    assert {key: getattr(train, key) for key in PUBLISHED[method]} == PUBLISHED[method]


# What stands between a shipped method and its source, as one would type it.
AS_PUBLISHED = {
    "moa_soft": ["model=llama3.1_8b_instruct", "method.input=raw", "method.router.net=linear"],
    "moa_sparse": ["model=llama3.1_8b_instruct", "method.input=raw"],
    "lora": ["++model.path=a/folder/Meta-Llama-3.1-8B-Instruct"],
    "mixlora": ["model=llama2_7b", "++method.losses.switch_balance.batch=micro"],
    "adamole": [
        "model=llama2_7b",
        "method.experts.targets=[q,k,v,o]",
        "method.experts.r=4",
        "method.experts.alpha=16",
        "method.experts.dropout=0.05",
        "method.router.bias=false",
        "method.losses.switch_balance.values=shifted",
        "++method.losses.switch_balance.batch=micro",
    ],
    "hydralora": [
        "model=llama2_7b",
        "method.experts.targets=[gate,up,down]",
        "method.experts.n=4",
        "method.experts.r=4",
        "method.experts.alpha=32",
        "method.experts.dropout=0.05",
    ],
}


@pytest.mark.parametrize("method", AS_PUBLISHED)
def test_a_recipe_says_what_a_run_has_otherwise(method):
    """Each option of the published setting that is missing is named, nothing else, and none when all are
    there."""
    choice, typed = f"method={method}", AS_PUBLISHED[method]
    assert composed(choice, "train=paper", *typed).departures == []
    found = composed(choice, "train=paper").departures
    assert found[0].startswith("model=tiny (")
    assert [text.partition("=")[0] for text in found[1:]] == sorted(
        text.lstrip("+").partition("=")[0] for text in typed[1:]
    )


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        (["method=mixlora", "method.experts.n=4"], "method.experts.n=4 (8)"),
        (["method=adamole"], "method.experts.targets=[q,k,v,o,down] ([q,k,v,o])"),
        (["method=unipeft"], "method.gates=family ({lora: lora, prompt: prompt, parallel_adapter: prompt})"),
        (["method=mov"], "method=mov (no recipe of its own)"),
        (["method=lora", "train.lr=1e-3"], "train.lr=0.001 (set by hand)"),
    ],
)
def test_what_differs_is_named_with_what_is_published(typed, says):
    assert says in composed("train=paper", *typed).departures


def test_what_does_not_differ_is_not_named():
    base = ["method=moe_lora_topk", "train=paper", "model=llama3.1_8b_instruct"]
    spelled = [
        "++method.experts.gate_grad=plain",
        "train.log_every=3",
    ]  # a default, and what changes no result
    assert composed(*base, *spelled).departures == []
    assert composed("method=none", "train=paper").departures == []
    assert composed("method=mixlora").departures == []  # train=quick is nobody's recipe


def test_a_departure_on_purpose():
    meant, told = (composed("method=moa_soft", "train=paper", *more) for more in (["recipe=null"], []))
    assert meant.recipe is None and meant.departures == [] and told.departures
    assert run_hash(meant) == run_hash(told)


def test_recipes_name_existing_methods():
    import yaml

    recipes = yaml.safe_load((CONF / "train" / "paper.yaml").read_text())["recipes"]
    assert set(recipes) <= set(groups()["method"])


def test_a_length_on_the_command_line_replaces_the_other_unit():
    train = composed("train=paper", "train.steps=5").train
    assert (train.steps, train.epochs) == (5, None)
    train = composed("train.epochs=0.5").train
    assert (train.steps, train.epochs) == (None, 0.5)


def test_a_model_by_its_path():
    model = composed("++model.path=some/where").model
    assert (model.kind, model.name, model.source) == ("pretrained", "where", "some/where")


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["train.lr=-1"], "train.lr=-1: expected a number > 0"),
        (["train.lr=fast"], "train.lr='fast': expected a number"),
        (["train.batch_size=0"], "train.batch_size=0: expected a whole number >= 1"),
        (["train.batch_size=2.5"], "train.batch_size=2.5"),
        (["train.schedule=cosin"], "Did you mean 'cosine'?"),
        (["train.steps=3", "train.epochs=1"], "expected exactly one of the two"),
        (["task=arc_esy"], "Did you mean 'arc_easy'?"),
        (["task=[arc,gms8k]"], "Did you mean 'gsm8k'?"),
        (["task=[]"], "expected a task, a suite"),
        (["protocol=lable"], "Did you mean 'label'?"),
        (["leakage=dorp"], "Did you mean 'drop'?"),
        (["train.loss=all"], "expected one of response, whole"),
        (["data.world.hops=0"], "hops=0"),
        (["data.world.conflict=1.5"], "conflict=1.5"),
        (["data=local", "data.root=x", "++data.world.hops=1"], "only data=builtin has these dials"),
        (["data=hub", "++data.revisions={bolq: abc}"], "Did you mean 'boolq'?"),
        (["mix=own", "++mix.parts.gms8k.cap=3"], "Did you mean 'gsm8k'?"),
        (["++mix.parts.gsm8k.weight=-1"], "parts.gsm8k.weight=-1"),
        (["data.source=local"], "data=local expects a folder"),
        (["data=builtin", "++data.root=x"], "only data=local reads a folder"),
        (["device=gpu"], "device='gpu': expected auto, cpu"),
        (["seed=-1"], "seed=-1"),
        (["seed=1.5"], "seed=1.5"),
        (["++model.quantize=3"], "model.quantize=3"),
        (["model=random_tiny", "model.random.heads=3"], "hidden divisible by heads"),
        (
            ["model=random_tiny", "model.kind=pretrained"],
            "expected a hub id or folder with kind=pretrained only",
        ),
        (["++train.stpes=3"], "Did you mean 'train.steps'?"),
    ],
)
def test_bad_values_are_refused(overrides, says):
    with pytest.raises(ConfigError) as caught:
        composed(*overrides)
    assert says in str(caught.value).replace("'steps'", "'train.steps'")


@pytest.mark.parametrize(
    "override",
    [
        "runs_dir=elsewhere",
        "logger=none",
        "quiet=true",
        "traceback=true",
        "++threads=1",
        "train.log_every=3",
        "train.save_every=7",
    ],
)
def test_hash_ignores_what_cannot_change_the_result(override):
    assert run_hash(composed(override)) == run_hash(composed())


@pytest.mark.parametrize(
    "override",
    [
        "seed=1",
        "method=moa_soft",
        "method.router.gamma_max=0.4",
        "train.lr=1e-3",
        "task=addsub",
        "task=[arc,addsub]",
        "protocol=label",
        "leakage=mark",
        "forgetting=none",
        "train.loss=whole",
        "data.world.conflict=0.5",
        "mix=math_mix",
        "data.eval_limit=9",
        "device=cpu",
        "model.dtype=bfloat16",
    ],
)
def test_hash_tells_results_apart(override):
    assert run_hash(composed(override)) != run_hash(composed())


def test_hash_takes_inputs_and_spelled_out_defaults():
    assert run_hash(composed(), {"model": "a"}) != run_hash(composed(), {"model": "b"})
    assert run_hash(composed("++model.revision=null")) == run_hash(composed())


def test_how_a_balance_loss_counts_is_in_the_hash_where_it_matters():
    """Not where each step is one pass, nor with coefficient 0: there it changes nothing."""

    def hashes(*given, inputs=None):
        return {
            run_hash(composed(*given, f"++method.losses.switch_balance.batch={batch}"), inputs)
            for batch in ("global", "micro")
        }

    assert hashes("method=adamole") == {run_hash(composed("method=adamole"))}
    assert len(hashes("method=adamole", "train.accumulation=2")) == 2
    assert len(hashes("method=adamole", inputs={"processes": 2})) == 2
    assert len(hashes("method=moe_lora_topk", "train.accumulation=2")) == 1


def test_two_kinds_with_equal_options_differ_in_hash():
    kinds = {
        run_hash(composed("method=molora", f"++method.router={{kind: {kind}}}"))
        for kind in ("softmax", "sigmoid", "none")
    }
    assert len(kinds) == 3


def test_config_survives_its_own_file(tmp_path):
    """What config.yaml holds builds the same run again."""
    from moabench.benchmarks.machine import files

    cfg = composed("method=mixlora", "train=paper")
    files.write_yaml(tmp_path / "config.yaml", cfg.to_dict())
    data = OmegaConf.to_container(OmegaConf.load(tmp_path / "config.yaml"))
    assert run_hash(RunConfig.from_composed(data)) == run_hash(cfg)


LIGHT = (
    "methods", "methods.spec", "methods.catalog", "methods.sizes", "benchmarks.command.cli",
    "benchmarks.command.runs", "benchmarks.config.run", "benchmarks.config.overrides",
    "benchmarks.machine.files", "benchmarks.machine.environment", "benchmarks.machine.globals",
    "benchmarks.run.run", "benchmarks.run.folder", "benchmarks.run.summary", "benchmarks.run.loggers",
    "benchmarks.run.prepared", "benchmarks.bases.loading", "benchmarks.tasks.rows", "benchmarks.data.mixes",
    "benchmarks.fairness.leakage", "benchmarks.fairness.budget", "benchmarks.world",
)  # fmt: skip
HEAVY = ("torch", "transformers", "peft", "lm_eval", "wandb", "pandas", "datasets", "accelerate")


def test_light_modules_import_nothing_heavy():
    """A config error and --help answer at once only if this holds."""
    code = f"""
import importlib, sys
for name in {LIGHT}:
    importlib.import_module("moabench." + name)
    found = [heavy for heavy in {HEAVY} if heavy in sys.modules]
    assert not found, (name, found)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_groups_come_from_folders(tmp_path, monkeypatch):
    (tmp_path / "mix").mkdir()
    (tmp_path / "mix" / "new.yaml").write_text("name: new\n")
    monkeypatch.setattr(choices, "CONF", tmp_path)
    assert choices.groups() == {"mix": ["new"]}
