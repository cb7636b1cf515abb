"""Outputs of every method do not depend on padding, on the batch, on later tokens, on the KV cache or on how
generation is run.

Run: python -m pytest tests/methods/test_invariance.py
"""

from __future__ import annotations

import pytest
import torch
from tiny import (
    ADAPTERS,
    METHODS,
    MIXTURES,
    PAD,
    SPARSE,
    assert_near,
    attached,
    base,
    batch,
    facts,
    given,
    logits,
    needing,
    prompt_mask,
)

from moabench import methods
from moabench.methods.spec import ConfigError

SEQUENCE = [
    name
    for name in MIXTURES
    if any(m.router.granularity == "sequence" and m.router.reads_prompt for m in METHODS[name].mixtures)
]
"""Methods that decide once a sequence, from its prompt."""
POOLING = [name for name in SEQUENCE if name not in needing("ids")]
PROMPT = 5
BOUND = 2e-5


@pytest.fixture(params=ADAPTERS)
def name(request):
    return request.param


def alone(model, ids, prompt=PROMPT):
    """Logits [L, vocab] of one unpadded sequence."""
    return logits(model, input_ids=ids[None], **prompt_mask(model, ids[None], prompt))[0]


@pytest.mark.parametrize(("left", "right"), [(3, 0), (0, 3), (2, 1)])
def test_padding_and_neighbours_change_nothing(name, left, right):
    model = attached(name)
    inputs = batch(left, right)
    length = inputs["input_ids"].shape[1]
    prompts = torch.arange(length) < torch.tensor([[left + 3], [PROMPT]])
    extra = {"prompt_mask": prompts} if prompt_mask(model, inputs["input_ids"]) else {}
    got = logits(model, **inputs, **extra)
    first = alone(model, inputs["input_ids"][0, left : length - right], prompt=3)
    assert_near("padded sequence", got[0, left : length - right], first, BOUND)
    assert_near("its neighbour", got[1], alone(model, inputs["input_ids"][1]), BOUND)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_selection_and_no_load(side):
    """Every sparse router makes the same choice for a token whatever surrounds it, and the mask tells padding
    apart."""
    for name in SPARSE:
        model = attached(name)
        inputs = batch(**{side: 3})
        prompt = inputs["attention_mask"].bool()
        routing = methods.capture_routing(model, {**given(model, inputs), "prompt_mask": prompt})
        real = inputs["attention_mask"][0].bool()
        single = methods.capture_routing(model, given(model, {"input_ids": inputs["input_ids"][:1, real]}))
        for site, found in routing.items():
            assert torch.equal(found.mask, inputs["attention_mask"].bool().flatten())
            assert torch.equal(found.selected[: len(real)][real], single[site].selected), f"{name} {site}"
            assert single[site].mask is None or single[site].mask.all()


def test_later_tokens_change_nothing_before_them(name):
    model = attached(name)
    inputs = batch()
    extra = prompt_mask(model, inputs["input_ids"])
    want = logits(model, **inputs, **extra)
    changed = inputs["input_ids"].clone()
    changed[:, -1] = (changed[:, -1] + 1) % 90 + 3
    got = logits(model, **{**inputs, "input_ids": changed}, **extra)
    assert torch.equal(got[:, :-1], want[:, :-1])
    assert not torch.equal(got[:, -1], want[:, -1])


def test_official_mean_leaks_the_future():
    """The instance router as published reads answer and padding (moa_instance.md): this test documents it."""
    model = attached("moa_instance", **{"router.pool": "official_mean"})
    inputs = batch()
    want = logits(model, **inputs)
    changed = inputs["input_ids"].clone()
    changed[:, -1] = (changed[:, -1] + 1) % 90 + 3
    assert (logits(model, **{**inputs, "input_ids": changed}) - want)[:, 0].abs().max() > 1e-4
    cache = model(**inputs, use_cache=True).past_key_values
    with pytest.raises(ConfigError, match="official_mean"):
        model(input_ids=changed[:, :1], past_key_values=cache, use_cache=True)


@pytest.mark.parametrize("name", POOLING)
@pytest.mark.parametrize("pool", ["prompt_mean", "last_prompt"])
def test_one_gate_a_sequence(name, pool):
    model = attached(name, **{"router.pool": pool})
    inputs = batch(left=2)
    routing = methods.capture_routing(model, {**inputs, **prompt_mask(model, inputs["input_ids"])})
    assert routing and all(r.granularity == "sequence" for r in routing.values())
    for found in routing.values():
        per_sequence = found.weights.unflatten(0, (2, -1))
        assert torch.equal(per_sequence, per_sequence[:, :1].expand_as(per_sequence))
        logits_ = found.logits.unflatten(0, (2, -1))
        assert not torch.allclose(logits_[0, 0], logits_[1, 0]), "sequences are independent"


def test_sequence_of_one_token_equals_the_token_router():
    instance, soft = (attached(n, **{"input": "raw"}) for n in ("moa_instance", "moa_soft"))
    ids = torch.tensor([[11], [40]])
    assert_near("logits", logits(instance, input_ids=ids), logits(soft, input_ids=ids), 1e-6)


def test_labels_mark_the_prompt():
    """In training the prompt is where labels are -100; it gives the same gates as the mask that evaluation
    passes."""
    model = attached("moa_instance")
    inputs = batch(left=2)
    masked = logits(model, **inputs, **prompt_mask(model, inputs["input_ids"]))
    labels = inputs["input_ids"].clone()
    labels[:, :PROMPT] = -100
    assert torch.equal(logits(model, **inputs, labels=labels), masked)


@pytest.mark.parametrize("chunks", [(PROMPT, 1, 1, 1, 1), (PROMPT, 4), (PROMPT, 3, 1)])
def test_cached_logits_equal_full_logits(name, chunks):
    model = attached(name)
    inputs = batch(left=2)
    full = logits(model, **inputs, **prompt_mask(model, inputs["input_ids"]))
    real, start, cache = inputs["attention_mask"].bool(), 0, None
    for size in chunks:
        now = slice(start, start + size)
        skills = facts(model, inputs) if cache is None else {}  # they are kept with the cache
        with torch.no_grad():
            out = model(
                **skills,
                input_ids=inputs["input_ids"][:, now],
                position_ids=inputs["position_ids"][:, now],
                attention_mask=inputs["attention_mask"][:, : now.stop],
                past_key_values=cache,
                use_cache=True,
            )
        cache = out.past_key_values
        assert_near(
            f"tokens {now.start}..{now.stop}", out.logits[real[:, now]], full[:, now][real[:, now]], BOUND
        )
        start = now.stop


def generate(model, inputs, **options):
    """Token ids [B, L] of 6 new tokens; `eos` is switched off so that lengths agree."""
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": PAD, **options}
    inputs = {k: v for k, v in given(model, inputs).items() if k != "position_ids"}
    return model.generate(**inputs, **options)


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_with_and_without_cache(name, beams):
    model = attached(name)
    inputs = batch(left=2, length=6)
    cached = generate(model, inputs, num_beams=beams)
    assert cached.shape == (2, 12)
    assert torch.equal(cached, generate(model, inputs, num_beams=beams, use_cache=False))


def test_generation_of_a_batch_equals_generation_alone(name):
    model = attached(name)
    inputs = batch(left=2, length=6)
    together = generate(model, inputs)
    single = generate(
        model, {"input_ids": inputs["input_ids"][:1, 2:], "attention_mask": inputs["attention_mask"][:1, 2:]}
    )
    assert torch.equal(together[0, 2:], single[0])


def test_beams_and_returned_sequences_of_the_instance_router():
    """Cached gates follow their sequence when beams are reordered and prompts repeated (moa_instance.md,
    gotcha 3)."""
    model = attached("moa_instance")
    inputs = batch(left=2, length=6)
    beams = generate(model, inputs, num_beams=3, num_return_sequences=2)
    assert beams.shape == (4, 12)
    for row in range(2):
        ids = inputs["input_ids"][row : row + 1, 2 * (row == 0) :]
        one = generate(
            model,
            {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
            num_beams=3,
            num_return_sequences=2,
        )
        assert torch.equal(beams[2 * row : 2 * row + 2, -6:], one[:, -6:])
    torch.manual_seed(0)
    sampled = generate(model, inputs, do_sample=True, num_return_sequences=3)
    assert sampled.shape == (6, 12)


@pytest.mark.parametrize("name", SEQUENCE)
def test_gates_follow_the_cache_when_it_is_rearranged(name):
    """A cache that is reordered, repeated or selected from keeps each sequence with its own gate."""
    model = attached(name)
    inputs = batch(length=6)
    token = torch.tensor([[7], [50]])

    def step(change=None, rows=(0, 1)):
        with torch.no_grad():
            cache = model(**given(model, inputs), use_cache=True).past_key_values
            if change:
                getattr(cache, change[0])(change[1])
            return model(input_ids=token[list(rows)], past_key_values=cache, use_cache=True).logits

    want = step()
    swapped = step(("reorder_cache", torch.tensor([1, 0])), rows=(1, 0))
    assert_near("reordered", swapped, want.flip(0), BOUND)
    assert_near(
        "repeated",
        step(("batch_repeat_interleave", 2), rows=(0, 0, 1, 1)),
        want.repeat_interleave(2, 0),
        BOUND,
    )
    assert_near("selected", step(("batch_select_indices", torch.tensor([1])), rows=(1,)), want[1:], BOUND)


def test_decoding_gate_is_the_prefill_gate():
    model = attached("moa_instance")
    inputs = batch(length=6)
    with methods.record(model) as recorder:
        generate(model, inputs)
    site = recorder.routing["model.layers.0.block"]
    gates = site.weights
    prefill = gates[:12].unflatten(0, (2, 6))
    for step in gates[12:].unflatten(0, (-1, 2)):
        assert torch.equal(step, prefill[:, 0])


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_implementations_agree(name, implementation):
    inputs = batch(left=2)
    real = inputs["attention_mask"].bool()
    plain = base()
    plain.set_attn_implementation(implementation)
    other = base()
    other.set_attn_implementation("sdpa" if implementation == "eager" else "eager")
    assert_near(
        "logits",
        logits(attached(name, plain), **inputs)[real],
        logits(attached(name, other), **inputs)[real],
        BOUND,
    )


@pytest.mark.parametrize("name", MIXTURES)
def test_positional_and_embedded_inputs(name):
    """Arguments by position and `inputs_embeds` reach the context as keywords do."""
    model = attached(name)
    inputs = batch(left=2)
    want = logits(model, **inputs)
    extra = facts(model, inputs)
    ids, mask, positions = (inputs[key] for key in ("input_ids", "attention_mask", "position_ids"))
    with torch.no_grad():
        assert torch.equal(model(ids, mask, position_ids=positions, **extra).logits, want)
        assert torch.equal(model.base_model(ids, mask, positions, **extra).logits, want)
        if name not in needing("ids"):
            rest = {"attention_mask": mask, "position_ids": positions, **extra}
            assert torch.equal(model(inputs_embeds=model.get_input_embeddings()(ids), **rest).logits, want)


def test_a_mask_that_hides_padding_is_refused_where_it_matters():
    """A 4-D mask says which pairs attend, not which tokens are real: a router that pools, or a recorder,
    would count padding."""
    ids = torch.ones(1, 4, dtype=torch.long)
    mask = torch.zeros(1, 1, 4, 4)
    with pytest.raises(ConfigError, match="attention_mask"):
        attached("moa_instance")(input_ids=ids, attention_mask=mask)
    model = attached("molora")
    model(input_ids=ids, attention_mask=mask)
    with pytest.raises(ConfigError, match="attention_mask"), methods.record(model):
        model(input_ids=ids, attention_mask=mask)


@pytest.mark.parametrize("name", MIXTURES)
def test_nothing_kept_for_decoding_outlives_an_optimiser_step(name):
    """Fused optimisers change a tensor and leave its version as it was, so that a kept copy does not look
    old."""
    model, inputs = attached(name), batch()
    before = logits(model, **inputs)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, fused=True)
    model(**given(model, inputs)).logits.square().mean().backward()
    optimiser.step()
    after, fresh = logits(model, **inputs), attached(name)
    fresh.load_state_dict(model.state_dict())
    assert not torch.allclose(after, before)
    assert_near("logits after the step", after, logits(fresh, **inputs), 1e-6)
