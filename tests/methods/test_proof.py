"""Experts that share a frozen part are refused where that part is not what they take it for; where they are
not, the model starts at its base.

Run: python -m pytest tests/methods/test_proof.py
"""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as tf
from tiny import SIZES, assert_near, attached, base, batch, logits

from moabench.methods.spec import ConfigError

GEMMA3N = dict(
    head_dim=16,
    hidden_size_per_layer_input=8,
    vocab_size_per_layer_input=97,
    laurel_rank=4,
    num_kv_shared_layers=0,
    layer_types=["full_attention"] * 2,
    activation_sparsity_pattern=[0.9, 0.0],
)
MODELS = {
    "cohere": (tf.CohereForCausalLM, tf.CohereConfig, {}),
    "cohere with normed keys": (tf.CohereForCausalLM, tf.CohereConfig, {"use_qk_norm": True}),
    "hunyuan": (tf.HunYuanDenseV1ForCausalLM, tf.HunYuanDenseV1Config, {"head_dim": 8}),
    "gemma3": (tf.Gemma3ForCausalLM, tf.Gemma3TextConfig, {"head_dim": 16}),
    "gemma3n": (tf.Gemma3nForCausalLM, tf.Gemma3nTextConfig, GEMMA3N),
    "stablelm": (tf.StableLmForCausalLM, tf.StableLmConfig, {}),
    "granite": (tf.GraniteForCausalLM, tf.GraniteConfig, {}),
}
REFUSED = {
    ("gemma3n", "mixlora"): "Gemma3nTextMLP of 'model.layers.0': it is no down",
    ("gemma3n", "moa_soft"): "transforms its values",
    ("cohere with normed keys", "moa_soft"): "transforms its keys",
    ("hunyuan", "moa_soft"): "transforms its keys",
}


@pytest.fixture(scope="module", params=sorted(MODELS))
def named(request):
    model, config, more = MODELS[request.param]
    torch.manual_seed(0)
    return request.param, model(config(**{**SIZES, **more})).eval()


@pytest.mark.parametrize("method", ["mixlora", "moa_soft"])
def test_it_starts_at_its_base_or_is_refused(named, method):
    name, plain = named
    if message := REFUSED.get((name, method)):
        before = plain.config._attn_implementation
        with pytest.raises(ConfigError, match=message):
            attached(method, copy.deepcopy(plain))
        assert plain.config._attn_implementation == before
        return
    inputs = batch()
    assert_near(
        "logits",
        logits(attached(method, copy.deepcopy(plain), trained=False), **inputs),
        logits(plain, **inputs),
        2e-5,
    )


def test_any_block_with_a_step_more_is_refused():
    """The kind, not the model: a block that clips, or scales, what its activation gives."""
    for step in (lambda t: t.clamp(-0.1, 0.1), lambda t: 0.5 * t):
        model = base()
        block = model.model.layers[1].mlp

        def forward(x, block=block, step=step):
            return block.down_proj(step(block.act_fn(block.gate_proj(x))) * block.up_proj(x))

        block.forward = forward
        with pytest.raises(ConfigError, match=r"LlamaMLP of 'model\.layers\.1'"):
            attached("mixlora", model)
        attached("moa_soft", model)


def test_proving_draws_nothing_and_leaves_nothing():
    model = base()
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    from moabench.methods.tuner import proof
    from moabench.methods.tuner.architecture import DecoderLayer

    layer = DecoderLayer("model.layers.0", model.model.layers[0], model.config)
    proof.feed_forward(layer)
    assert torch.equal(torch.rand(1), expected)


def test_left_padding_without_position_ids_is_a_mere_shift():
    """Prompts inside attention have no positions: the queries must have those of the real tokens."""
    model, inputs = attached("moa_soft"), batch(left=3)
    real = inputs["attention_mask"].bool()
    given = logits(model, **inputs)
    without = {k: v for k, v in inputs.items() if k != "position_ids"}
    assert_near("logits", logits(model, **without)[real], given[real], 1e-6)


def test_another_attention_after_attaching_keeps_the_prompts():
    model, inputs = attached("moa_soft"), batch()
    before = logits(model, **inputs)
    model.get_base_model().set_attn_implementation("eager")
    assert_near("logits", logits(model, **inputs), before, 1e-5)
