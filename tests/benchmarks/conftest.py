"""A run's config over a small folder of questions, and models with methods attached, for the tests of
training and evaluation."""

import copy
import json
import random

import pytest
import torch

from moabench import methods
from moabench.benchmarks.config.run import RunConfig
from moabench.benchmarks.config.sections import DataConfig, ModelConfig, TaskConfig, TrainConfig
from moabench.methods import catalog

TEXT = "red fox sleeps under old stone bridge while green river carries many small boats past quiet town"
WORDS = TEXT.split()


def question(rng, number):
    """A row of random words: prompts of 3 to 18 words, choices of 1 to 4, so that batches are ragged."""
    choices = [" ".join(rng.sample(WORDS, rng.randint(1, 4))) + f" {i}" for i in range(rng.choice([3, 4]))]
    text = " ".join(rng.choice(WORDS) for _ in range(rng.randint(3, 18))) + "?"
    return {
        "id": f"q{number}",
        "question": text,
        "choices": choices,
        "label": rng.randrange(len(choices)),
        "skill": "none",
    }


@pytest.fixture(scope="session")
def questions(tmp_path_factory):
    """Folder with <task>/<split>.jsonl for the two ARC tasks."""
    root, rng = tmp_path_factory.mktemp("questions"), random.Random(0)
    for task in ("arc_easy", "arc_challenge"):
        (root / task).mkdir()
        for split, count in {"train": 40, "test": 24}.items():
            lines = [json.dumps(question(rng, i)) for i in range(count)]
            (root / task / f"{split}.jsonl").write_text("\n".join(lines))
    return root


@pytest.fixture
def config(questions):
    """config(**train options) -> RunConfig on those questions."""

    def make(method="none", **train):
        options = {
            "steps": 6,
            "batch_size": 4,
            "log_every": 2,
            "save_every": 3,
            "lr": 1e-2,
            "max_length": 64,
            "eval_batch_size": 8,
        }
        return RunConfig(
            method=catalog.raw(method),
            model=ModelConfig("tiny", kind="builtin"),
            task=TaskConfig.of("arc"),
            data=DataConfig("local", root=str(questions), allow_cut=1.0),
            train=TrainConfig(**(options | train)),
            device="cpu",
        )

    return make


@pytest.fixture
def attached(llama):
    """attached(name, **overrides) -> a copy of the tiny Llama with a method whose trainable parameters are
    moved, so that it differs from its base."""

    def make(name, **overrides):
        torch.manual_seed(0)
        model = methods.attach(copy.deepcopy(llama), catalog.override(catalog.raw(name), overrides))
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
        return model

    return make
