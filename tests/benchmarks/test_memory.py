"""What `moabench memory` says against measured peaks: of the CPU allocator's own record (torch's profiler),
and on a GPU of CUDA's.

Run: python -m pytest tests/benchmarks/test_memory.py
"""

import re

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from moabench import methods
from moabench.benchmarks.command import memory
from moabench.benchmarks.training import step
from moabench.benchmarks.training.memory import checkpoint, estimate
from moabench.methods import catalog
from moabench.methods.spec import ConfigError

SMALL = LlamaConfig(
    vocab_size=1000,
    hidden_size=128,
    intermediate_size=344,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
)
BATCH, LENGTH = 4, 96


def model(name: str, device: str, checkpointing: bool = False) -> torch.nn.Module:
    with torch.device(device):
        base = LlamaForCausalLM(SMALL)
    if checkpointing and device != "meta":
        checkpoint(base)
    return methods.attach(base, catalog.raw(name)).to(device).train()


def measured(net: torch.nn.Module) -> int:
    """Peak of what a step allocates, gradients included: the allocator's record of every block that came and
    went."""
    ids = torch.zeros(BATCH, LENGTH, dtype=torch.long)
    step.full(net, ids).backward()
    net.zero_grad(set_to_none=True)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        step.full(net, ids).backward()
    events = sorted(
        (e.start_ns(), e.nbytes()) for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"
    )
    now = most = 0
    for _, size in events:
        now += size
        most = max(most, now)
    return most


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["lora", "molora", "mixlora", "moa_soft", "full"])
def test_the_estimate_of_a_step_is_what_a_step_takes(name, checkpointing):
    found = estimate(model(name, "meta"), BATCH, LENGTH, checkpointing)
    assert found.step == pytest.approx(measured(model(name, "cpu", checkpointing)), rel=0.1)


def test_weights_and_optimiser_are_counted_to_the_byte():
    net = model("molora", "cpu")
    ids = torch.zeros(1, 8, dtype=torch.long)
    optimiser = torch.optim.AdamW(p for p in net.parameters() if p.requires_grad)
    step.full(net, ids).backward()
    optimiser.step()
    found = estimate(model("molora", "meta"), 1, 8)
    moments = [t for state in optimiser.state.values() for t in (state["exp_avg"], state["exp_avg_sq"])]
    assert found.optimiser == sum(t.numel() * t.element_size() for t in moments)
    assert found.trained == sum(p.numel() * p.element_size() for p in net.parameters() if p.requires_grad)
    assert found.frozen == sum(p.numel() * p.element_size() for p in net.parameters() if not p.requires_grad)
    assert found.total == found.frozen + found.trained + found.optimiser + found.step


def test_sharding_divides_what_is_frozen_and_gathers_two_layers():
    whole, half = (estimate(model("moa_soft", "meta"), 1, 8, processes=n) for n in (1, 2))
    assert half.frozen == whole.frozen / 2 and half.step == whole.step
    base = model("none", "cpu")
    layer = sum(p.numel() * p.element_size() for p in base.model.layers[0].parameters())
    outside = sum(p.numel() * p.element_size() for p in base.parameters()) - SMALL.num_hidden_layers * layer
    assert half.gathered == (outside + 2 * layer) / 2


PARAMETERS = {
    "llama3.2_1b": 1_235_814_400,
    "llama3.2_3b": 3_212_749_824,
    "llama3.1_8b": 8_030_261_248,
    "qwen3_14b": 14_768_307_200,
}


@pytest.mark.parametrize("name", memory.SIZES)
def test_the_models_of_the_table_have_their_published_sizes(name):
    assert sum(p.numel() for p in memory.bare(name).parameters()) == PARAMETERS[name]


def test_the_command_says_what_a_config_needs(capsys):
    assert memory.main(["method=moa_soft", "train.max_length=64", "train.batch_size=2"]) == 0
    told = capsys.readouterr().out
    assert "moa_soft on tiny (float32), a step of 2 x 64 tokens" in told and "together" in told
    for wrong, message in (
        ("moa_sof", "Did you mean 'moa_soft'?"),
        ("none", "expected a method that trains"),
    ):
        with pytest.raises(ConfigError, match=re.escape(message)):
            memory.main([f"method={wrong}"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["lora", "moa_soft"])
def test_the_estimate_is_what_a_gpu_takes(name):
    net, ids = model(name, "cpu").to("cuda"), torch.zeros(BATCH, LENGTH, dtype=torch.long, device="cuda")
    step.full(net, ids).backward()
    net.zero_grad(set_to_none=True)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step.full(net, ids).backward()
    found = estimate(model(name, "meta"), BATCH, LENGTH).step
    assert found == pytest.approx(torch.cuda.max_memory_allocated() - before, rel=0.25)
