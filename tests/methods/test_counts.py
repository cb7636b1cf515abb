"""Trainable parameters of the shipped methods on the real architectures (no weights: meta device) equal the
published counts.

Numbers are from the method cards: counted in the authors' code, or the paper's tables.

Run: python -m pytest tests/methods/test_counts.py
"""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from moabench import methods
from moabench.methods import catalog

LLAMA_3_8B = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
)
LLAMA_2_7B = LlamaConfig(
    vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
)
QWEN3_8B = Qwen3Config(
    vocab_size=151936,
    hidden_size=4096,
    intermediate_size=12288,
    num_hidden_layers=36,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
)
QWEN3_14B = Qwen3Config(
    vocab_size=151936,
    hidden_size=5120,
    intermediate_size=17408,
    num_hidden_layers=40,
    num_attention_heads=40,
    num_key_value_heads=8,
    head_dim=128,
)
NO_PROMPT = {"experts.prompt": None}
ATTENTION = ["q", "k", "v", "o"]
SEVEN = [*ATTENTION, "gate", "up", "down"]
COUNTS = [
    (LLAMA_3_8B, "lora", {}, 23_068_672),
    (LLAMA_3_8B, "rslora", {}, 23_068_672),
    (LLAMA_3_8B, "molora", {}, 100_139_008),
    (LLAMA_3_8B, "moe_lora_topk", {}, 100_140_288),
    (LLAMA_3_8B, "adamole", {}, 101_123_488),
    (LLAMA_3_8B, "hydralora", {}, 45_088_768),
    (LLAMA_3_8B, "moa_soft", {}, 24_520_288),
    (LLAMA_3_8B, "moa_soft", {"router.net": "linear"}, 18_089_696),
    (LLAMA_3_8B, "moa_soft", NO_PROMPT, 22_158_016),  # the HF path
    (LLAMA_3_8B, "moa_instance", {}, 24_520_288),
    (LLAMA_3_8B, "moa_instance", {"router.net": "linear"}, 18_089_696),
    (LLAMA_3_8B, "moa_sparse", {}, 22_289_120),
    (LLAMA_3_8B, "unipeft", {}, 17_565_280),
    (LLAMA_3_8B, "naive_sum", {}, 17_171_968),
    # component ablations of the naive sum (unipeft.md)
    (LLAMA_3_8B, "naive_sum", {**NO_PROMPT, "experts.parallel_adapter": None, "experts.r": 16}, 23_068_672),
    (
        LLAMA_3_8B,
        "naive_sum",
        {**NO_PROMPT, "experts.lora": None, "experts.r": None, "experts.alpha": None},
        4_325_888,
    ),
    (
        LLAMA_3_8B,
        "naive_sum",
        {"experts.lora": None, "experts.parallel_adapter": None, "experts.r": None, "experts.alpha": None},
        1_311_744,
    ),
    (LLAMA_3_8B, "mixlora", {}, 241_172_480),
    *(
        (LLAMA_2_7B, "mixlora", {"experts.r": r}, n)
        for r, n in ((2, 26_345_472), (4, 51_642_368), (8, 102_236_160), (16, 203_423_744), (32, 405_798_912))
    ),
    (LLAMA_2_7B, "mixlora_dynamic", {}, 203_423_744),
    (LLAMA_2_7B, "lora", {"experts.r": 80, "experts.targets": SEVEN}, 199_884_800),
    (LLAMA_2_7B, "lora", {"experts.r": 32, "experts.targets": ATTENTION}, 33_554_432),
    (LLAMA_2_7B, "lora", {"experts.r": 8, "experts.targets": ["q", "v"]}, 4_194_304),
    (LLAMA_2_7B, "adamole", {"experts.r": 4, "experts.targets": ATTENTION, "router.bias": False}, 38_273_152),
    (
        LLAMA_2_7B,
        "moe_lora_topk",
        {"experts.r": 4, "experts.targets": ATTENTION, "router.bias": False},
        37_748_736,
    ),
    (
        LLAMA_2_7B,
        "hydralora",
        {"experts.r": 4, "experts.n": 4, "experts.targets": ["gate", "up", "down"]},
        18_284_544,
    ),
    (QWEN3_8B, "moa_soft", NO_PROMPT, 24_337_944),
    (QWEN3_8B, "moa_sparse", {}, 24_485_436),
    (QWEN3_14B, "moa_soft", NO_PROMPT, 34_292_080),
    (QWEN3_14B, "moa_sparse", {}, 34_496_920),
]
TOTALS = {id(LLAMA_3_8B): 8_030_261_248, id(LLAMA_2_7B): 6_738_415_616}  # as on the hub


def build(config):
    """A model without weights; PEFT prints nothing about it."""
    with torch.device("meta"):
        model = (Qwen3ForCausalLM if isinstance(config, Qwen3Config) else LlamaForCausalLM)(config)
    model.generation_config = None
    return model


@pytest.mark.parametrize(
    ("config", "name", "overrides", "published"), COUNTS, ids=lambda v: v if isinstance(v, str) else ""
)
def test_published_count(config, name, overrides, published):
    counts = methods.param_count(
        methods.attach(build(config), catalog.override(catalog.raw(name), overrides))
    )
    assert counts["trainable"] == published
    if id(config) in TOTALS:
        assert counts["total"] == TOTALS[id(config)] + published
    if catalog.parse(catalog.raw(name)).tuner == "mixture":
        assert counts["experts"] + counts.get("routers", 0) == published


def test_shares_by_part():
    """Per block of soft MoA on Llama-3.1-8B: LoRA 360,448; adapter 135,184; prompt 40,992; router 229,635
    (moa_soft.md)."""
    counts = methods.param_count(methods.attach(build(LLAMA_3_8B), catalog.raw("moa_soft")))
    per_block = {k: v // 32 for k, v in counts.items() if k not in ("total", "trainable", "experts")}
    assert per_block == {"lora": 360_448, "parallel_adapter": 135_184, "prompt": 40_992, "routers": 229_635}


def test_dora_adds_one_magnitude_an_output():
    """lora.md: + d_out for each linear: q 4096, k and v 1024, o 4096, down 4096 in 32 blocks."""
    with torch.device("meta"):
        counts = [
            methods.param_count(methods.attach(build(LLAMA_3_8B), catalog.raw(n)))["trainable"]
            for n in ("lora", "dora")
        ]
    assert counts[1] - counts[0] == 32 * (3 * 4096 + 2 * 1024)


def test_reference_points():
    assert methods.param_count(methods.attach(build(LLAMA_3_8B), catalog.raw("full"))) == {
        "trainable": 8_030_261_248,
        "total": 8_030_261_248,
    }
    assert methods.param_count(methods.attach(build(LLAMA_3_8B), catalog.raw("none"))) == {
        "trainable": 0,
        "total": 8_030_261_248,
    }
