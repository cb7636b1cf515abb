"""Bases whose cache is more than keys and values (convolutions, Mamba, gated delta nets): scores and texts
against plain calls without a cache, one sequence at a time.

pytest tests/benchmarks/test_hybrids.py
"""

import random

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.cache_utils import DynamicCache

from moabench.benchmarks.data.batches import Example
from moabench.benchmarks.evaluation import scoring
from moabench.benchmarks.evaluation.generation import generate

SIZES = dict(
    vocab_size=320, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2,
    initializer_range=0.2,
)  # fmt: skip
MAMBA = dict(
    num_hidden_layers=2, mamba_n_heads=8, mamba_d_head=8, mamba_n_groups=1, mamba_d_state=8,
    mamba_chunk_size=16,
)  # fmt: skip
HYBRIDS = {
    "lfm2": dict(
        num_hidden_layers=3, layer_types=["conv", "full_attention", "conv"], block_ff_dim=48,
        block_auto_adjust_ff_dim=False,
    ),
    "bamba": MAMBA | dict(attn_layer_indices=[1]),
    "falcon_h1": MAMBA | dict(head_dim=8, mamba_d_ssm=64),
    "qwen3_next": dict(
        num_hidden_layers=2, layer_types=["linear_attention", "full_attention"], head_dim=8,
        linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16,
    ),
}  # fmt: skip


@pytest.fixture(params=HYBRIDS)
def hybrid(request):
    torch.manual_seed(0)
    config = AutoConfig.for_model(request.param, **SIZES, **HYBRIDS[request.param])
    return AutoModelForCausalLM.from_config(config).eval()


def random_ids(rng, length):
    return [rng.randrange(3, 300) for _ in range(length)]


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()


def test_scores(hybrid):
    """Long prompts with several answers, which other models share."""
    rng, examples = random.Random(0), []
    for length in (5, 30, 45):
        prompt = random_ids(rng, length)
        examples += [Example(prompt + random_ids(rng, n), length) for n in (1, 3, 4, 2)]
    want = []
    for e in examples:
        scores = logits(hybrid, e.ids).log_softmax(-1)
        want.append(sum(scores[i - 1, e.ids[i]].item() for i in range(e.start, len(e.ids))))
    for size in (1, 64):
        got = [score for score, _ in scoring.log_likelihoods(hybrid, examples, 2, size)]
        torch.testing.assert_close(torch.tensor(got), torch.tensor(want), atol=1e-5, rtol=1e-6)


class Numbers:
    """A tokenizer whose text is the ids."""

    eos_token_id, pad_token_id = 1, 2

    def decode(self, ids, **_):
        return " ".join(map(str, ids))


def greedy(model, ids, length, ends=()):
    found = []
    while len(found) < length:
        token = logits(model, [*ids, *found])[-1].argmax().item()
        if token in ends:
            break
        found.append(token)
    return found


def test_texts(hybrid):
    """Sequences end at different times, and stay in the batch."""
    rng = random.Random(1)
    prompts = [Example(random_ids(rng, n), n) for n in (1, 2, 5, 9, 14)]
    free = [greedy(hybrid, p.ids, 8) for p in prompts]
    ends = [free[0][2], free[1][5]]
    hybrid.generation_config.eos_token_id = ends
    want = [Numbers().decode(greedy(hybrid, p.ids, 8, {*ends, 1})) for p in prompts]
    assert len({len(text.split()) for text in want}) > 1
    for size in (1, 64):
        assert generate(hybrid, Numbers(), prompts, 8, batch_size=size) == want


def test_only_plain_caches_split(llama):
    """Anything that is not known to be keys and values is read whole: subclasses too."""

    class Other(DynamicCache):
        pass

    cache = llama(input_ids=torch.tensor([[5, 6]]), use_cache=True).past_key_values
    assert scoring.splits(cache)
    cache.layers[1] = type("Compressed", (type(cache.layers[1]),), {})()
    assert not scoring.splits(cache)
    assert not scoring.splits(Other(config=llama.config)) and not scoring.splits(None)
