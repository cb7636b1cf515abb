"""Trainable parameters of the shipped methods on the real architectures (no weights: meta device) equal the
published counts.

Numbers are from the method cards: counted in the authors' code, or the paper's tables, or by their formulas.

Run: python -m pytest tests/methods/test_counts.py
"""

from __future__ import annotations

import pytest
import references
import references.methods as known
import torch
from tiny import METHODS
from transformers import LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from moabench import methods
from moabench.methods import catalog

COUNTS = [(name, *count) for name in METHODS for count in references.of("methods", name).COUNTS]


def build(config):
    """A model without weights; PEFT prints nothing about it."""
    with torch.device("meta"):
        model = (Qwen3ForCausalLM if isinstance(config, Qwen3Config) else LlamaForCausalLM)(config)
    model.generation_config = None
    return model


@pytest.mark.parametrize(
    ("name", "config", "overrides", "published"), COUNTS, ids=lambda v: v if isinstance(v, str) else ""
)
def test_published_count(name, config, overrides, published):
    model = build(getattr(known, config))
    counts = methods.param_count(methods.attach(model, catalog.override(catalog.raw(name), overrides)))
    assert counts["trainable"] == published
    if config in known.TOTALS:
        assert counts["total"] == known.TOTALS[config] + (0 if METHODS[name].tuner == "full" else published)
    if METHODS[name].tuner == "mixture":
        assert counts["experts"] + counts.get("routers", 0) == published


def test_shares_by_part():
    """Per block of soft MoA on Llama-3.1-8B: LoRA 360,448; adapter 135,184; prompt 40,992; router 229,635
    (moa_soft.md)."""
    counts = methods.param_count(methods.attach(build(known.LLAMA_3_8B), catalog.raw("moa_soft")))
    per_block = {k: v // 32 for k, v in counts.items() if k not in ("total", "trainable", "experts")}
    assert per_block == {"lora": 360_448, "parallel_adapter": 135_184, "prompt": 40_992, "routers": 229_635}
