"""Sequence decisions beside a KV cache: whatever empties, splits or replaces the cache, the text is judged by
its own prompt or the call is refused.

Run: python -m pytest tests/methods/test_caches.py
"""

from __future__ import annotations

import pytest
import torch
from tiny import PAD, assert_near, attached, base, batch, logits, prompt_mask

from moabench.methods.spec import ConfigError

POOLED = ["moa_instance", "unipeft"]
GREEDY = dict(max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=PAD)


def prompts(left=0):
    inputs = batch(left=left)
    return {k: inputs[k] for k in ("input_ids", "attention_mask")}


@pytest.mark.parametrize("name", POOLED)
def test_a_static_cache_generates_what_a_dynamic_one_does(name):
    model = attached(name)
    for left in (0, 3):
        expected = model.generate(**prompts(left), **GREEDY)
        found = model.generate(**prompts(left), **GREEDY, cache_implementation="static")
        assert torch.equal(found, expected)


@pytest.mark.parametrize("name", POOLED)
def test_a_prompt_in_chunks_is_refused(name):
    model = attached(name)
    with pytest.raises(ConfigError, match="prefill_chunk_size=4: expected none"):
        model.generate(**prompts(), **GREEDY, prefill_chunk_size=4)
    token = attached("moa_sparse")
    assert torch.equal(
        token.generate(**prompts(), **GREEDY, prefill_chunk_size=4), token.generate(**prompts(), **GREEDY)
    )


@pytest.mark.parametrize("name", POOLED)
def test_a_cache_that_is_reset_belongs_to_the_next_text(name):
    model, first, second = attached(name), batch(seed=3), batch(seed=4)
    with torch.no_grad():
        cache = model(**first, use_cache=True).past_key_values
        cache.reset()
        again = model(**second, past_key_values=cache, use_cache=True).logits
        step = {"input_ids": torch.tensor([[5], [6]]), "position_ids": torch.full((2, 1), 9)}
        mask = torch.ones(2, 10, dtype=torch.long)
        decoded = model(**step, attention_mask=mask, past_key_values=cache).logits
        fresh = model(**second, use_cache=True).past_key_values
        expected = model(**step, attention_mask=mask, past_key_values=fresh).logits
    assert_near("prefill", again, logits(model, **second), 1e-5)
    assert_near("decoded", decoded, expected, 1e-5)


@pytest.mark.parametrize("name", POOLED)
def test_labels_that_do_not_say_where_the_prompt_ends_are_refused(name):
    model, inputs = attached(name), batch()
    with pytest.raises(
        ConfigError, match="labels: a sequence has no -100; expected -100 at the prompt's tokens"
    ):
        model(**inputs, labels=inputs["input_ids"])
    model(**inputs, labels=inputs["input_ids"], **prompt_mask(model, inputs["input_ids"]))
    attached("molora", base())(**inputs, labels=inputs["input_ids"])
