"""conf/experiment: every committed study composes, each of its runs is valid and is no other's, and a variant
is what one would type.

Run: python -m pytest tests/benchmarks/test_experiments.py
"""

import functools

import pytest
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from test_cli import moabench
from test_config import composed

from moabench.benchmarks.command import cli
from moabench.benchmarks.config.choices import CONF, groups
from moabench.benchmarks.config.run import RunConfig, run_hash
from moabench.benchmarks.config.study import ExperimentConfig
from moabench.benchmarks.machine.files import read_json
from moabench.benchmarks.run.folder import find
from moabench.methods.spec import ConfigError

EXPERIMENTS = groups()["experiment"]


@functools.cache
def jobs(name: str, *more: str, seeds: bool = True) -> list[RunConfig]:
    """The runs of an experiment, as its sweep makes them; without `seeds` only those of the first."""
    cli.register_resolvers()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("config", [f"+experiment={name}"], return_hydra_config=True)
        parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
        params = config.hydra.sweeper.params
        grid = parser.parse_overrides(
            [f"{k}={v if seeds or k != 'seed' else str(v).partition(',')[0]}" for k, v in params.items()]
        )
        (batch,) = BasicSweeper.split_arguments(grid, None)
        found = []
        for job in batch:
            overrides = [f"+experiment={name}", *job, *more]
            found.append(
                RunConfig.from_composed(
                    OmegaConf.to_container(compose("config", overrides), resolve=True), overrides
                )
            )
        return found


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_run_of_a_study_is_valid_and_no_other_is_the_same(name):
    runs = jobs(name, seeds=False)
    assert len(runs) > 1
    assert len({run_hash(cfg) for cfg in runs}) == len(runs)
    assert {cfg.experiment.name for cfg in runs} == {name} and all(cfg.experiment.about for cfg in runs)


def test_the_studies_that_were_promised():
    assert {
        "smoke",
        "equal_budget",
        "moa_ablation",
        "moa_threshold",
        "experts_topk",
        "load_balance",
        "ranks",
    } <= set(EXPERIMENTS)
    assert {cfg.parsed_method.name for cfg in jobs("smoke", seeds=False)} == set(groups()["method"])
    eight = ["none", "lora", "molora", "moe_lora_topk", "adamole", "mixlora", "moa_soft", "moa_sparse"]
    assert [(cfg.parsed_method.name, cfg.seed) for cfg in jobs("equal_budget")] == [
        (m, seed) for m in eight for seed in (0, 1, 2)
    ]


@pytest.mark.parametrize(
    ("variant", "typed"),
    [
        ("no_prompt", ["~method.experts.prompt"]),
        ("linear_router", ["method.router.net=linear"]),
        ("instance", ["method=moa_instance"]),
        (
            "inner_experts",
            [f"++method.experts.{bank}.n=2" for bank in ("lora", "prompt", "parallel_adapter")],
        ),
    ],
)
def test_a_variant_is_the_run_that_one_would_type(variant, typed):
    method = [] if typed[0].startswith("method=") else ["method=moa_soft"]
    by_hand = composed(*method, *typed, "task=commonsense", "train.steps=300", "data.eval_limit=300")
    (of_study,) = [cfg for cfg in jobs("moa_ablation", seeds=False) if cfg.experiment.variant == variant]
    assert run_hash(of_study) == run_hash(by_hand)


def test_a_variants_own_rate_wins_over_the_recipe_of_its_method():
    data = composed("method=adamole", "train=paper").to_dict()
    data["train"]["recipes"] = {"adamole": {"lr": 1e-4, "warmup": 200}}
    data |= {"task": "arc", "experiment": {"variant": "fast", "variants": {"fast": {"train.lr": 5e-3}}}}
    train = RunConfig.from_composed(data).train
    assert (train.lr, train.warmup) == (5e-3, 200)


def test_the_command_line_wins_over_the_study():
    assert {cfg.train.steps for cfg in jobs("equal_budget", "train.steps=7", seeds=False)} == {7}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"variant": "tow", "variants": {"one": {}, "two": {}}}, "Did you mean 'two'?"),
        ({"variants": {"one": {}}}, "expected a variant of the experiment"),
        ({"variant": "one"}, "expected a variant of the experiment"),
    ],
)
def test_a_variant_that_is_not_there(given, message):
    with pytest.raises(ConfigError) as caught:
        ExperimentConfig(**given)
    assert message in str(caught.value)


def test_smoke_runs_every_method(tmp_path):
    done = moabench("+experiment=smoke", "model=random_tiny", "quiet=true", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folders = find(tmp_path / "runs")
    assert len(folders) == len(groups()["method"])
    assert {read_json(folder / "status.json")["state"] for folder in folders} == {"finished"}


def test_a_study_is_known_by_its_name_without_the_plus(tmp_path):
    done = moabench("experiment=smok", cwd=tmp_path)
    assert done.returncode == 2 and "Did you mean 'smoke'?" in done.stderr
    done = moabench(
        "experiment=moa_ablation", "experiment.variant=no_prompt", "seed=0", "--cfg", "job", cwd=tmp_path
    )
    assert done.returncode == 0 and "variant: no_prompt" in done.stdout
