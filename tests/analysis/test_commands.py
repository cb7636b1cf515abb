"""The command that makes a run again composes the same run."""

import shlex

import pytest

from moabench.benchmarks.command.again import _composed, command
from moabench.benchmarks.config.run import RunConfig, run_hash
from moabench.methods import catalog


def config_of(*words):
    return _composed(tuple(words))


@pytest.mark.parametrize(
    "words",
    [
        ["method=moa_sparse", "task=arc"],
        [
            "method=molora",
            "method.router.kind=topk",
            "method.router.k=2",
            "train.lr=1e-3",
            "seed=3",
            "task=[arc_easy,gsm8k]",
        ],
        [
            "method=lora",
            "method.experts.targets=[q,v]",
            "data.eval_limit=7",
            "protocol=generate",
            "train=smoke",
            "train.epochs=2",
        ],
        [
            "method=mixlora",
            "model=random_tiny",
            "model.random.hidden=32",
            "mix.parts.arc_easy.cap=10",
            "data.world.hops=2",
        ],
        ["method=lora", "model.path=some/folder", "threads=1"],
        ["method=lora", "data=local", "data.root=some folder/here", "forgetting=none"],
    ],
)
def test_the_same_run(words):
    config = config_of(*words)
    made = command(config)
    again = _composed(tuple(shlex.split(made)[2:]))
    assert again == config | {"method": again["method"], "threads": None}
    assert {k: v for k, v in again["method"].items() if k != "about"} == {
        k: v for k, v in config["method"].items() if k != "about"
    }


def test_seeds_make_a_sweep():
    assert command(
        config_of("method=lora"), seeds=[1, 0]
    ) == "python run.py -m method=lora task=arc train=quick seed=0,1".replace(" train=quick", "")


def test_a_method_of_a_notebook_has_no_command():
    config = config_of("method=lora")
    config = config | {"method": config["method"] | {"name": "my_own", "tuner": "nothing_known"}}
    assert command(config) is None


def test_run_hash_agrees():
    """What the command leaves out does not change the run's hash."""
    config = config_of("method=lora", "seed=2")
    again = config_of(*shlex.split(command(config))[2:])
    assert run_hash(build(config)) == run_hash(build(again))


def build(config):
    return RunConfig.from_composed({**config, "task": config["task"]["name"]})


def test_a_budget_that_was_met_layer_by_layer():
    """Sizes that differ by layer are one value of the command line, and the command composes the same run."""
    layers = {
        "1+4": {
            "experts": {"r": 5, "alpha": 10.0},
            "also": {"attention": {"experts": {"r": 5, "alpha": 10.0}}},
        }
    }
    plain = config_of("method=mixlora", "budget.size=lora_r37")
    config = plain | {
        "method": catalog.override(plain["method"], {"experts": {"r": 4, "alpha": 8.0}, "layers": layers})
    }
    again = config_of(*shlex.split(command(config))[2:])
    assert run_hash(build(again)) == run_hash(build(config)) != run_hash(build(plain))
