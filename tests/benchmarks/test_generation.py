"""Generation against a loop over one sequence that reads the whole text again for each token; independence of
the batch; ends.

pytest tests/benchmarks/test_generation.py
"""

import random

import pytest
import torch

from moabench import methods
from moabench.benchmarks.data import batches
from moabench.benchmarks.data.batches import Example
from moabench.benchmarks.evaluation import generation, scoring
from moabench.benchmarks.evaluation.generation import generate
from moabench.methods import catalog
from moabench.methods.spec import ConfigError

NAMES = [
    name for name in catalog.names() if catalog.parse(catalog.raw(name)).tuner in ("mixture", "peft", "none")
]


def prompts_of(tokenizer, count=10):
    """Ragged prompts of words, each with a skill."""
    rng = random.Random(1)
    words = [
        "red",
        "fox",
        "sleeps",
        "under",
        "old",
        "stone",
        "bridge",
        "while",
        "green",
        "river",
        "carries",
        "many",
        "boats",
    ]
    texts = [" ".join(rng.choice(words) for _ in range(rng.randint(1, 14))) for _ in range(count)]
    return [Example(e.ids, e.start, i % 3) for i, e in enumerate(batches.encode_prompts(tokenizer, texts))]


@torch.no_grad()
def slowly(model, prompt, length, ends):
    """Token ids: one sequence, no cache, the prompt marked."""
    ids, found = torch.tensor([prompt.ids]), []
    while len(found) < length:
        facts = {
            "prompt_mask": torch.arange(ids.shape[1])[None] < len(prompt.ids),
            "skill_ids": torch.tensor([prompt.skill]),
        }
        facts = {key: value for key, value in facts.items() if getattr(model, f"accepts_{key}", False)}
        token = model(input_ids=ids, use_cache=False, **facts).logits[0, -1].argmax().item()
        if token in ends:
            break
        found.append(token)
        ids = torch.cat([ids, torch.tensor([[token]])], 1)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_texts_equal_a_slow_loop_and_do_not_depend_on_the_batch(name, attached, tokenizer):
    """Every shipped method; two end tokens are frequent ones, so that sequences leave the batch at different
    times."""
    model, prompts = attached(name).eval(), prompts_of(tokenizer)
    free = [slowly(model, p, 10, ()) for p in prompts]
    ends = [free[0][3], free[1][6]]
    model.generation_config.eos_token_id = ends
    want = [slowly(model, p, 10, {*ends, tokenizer.eos_token_id}) for p in prompts]
    assert len({len(ids) for ids in want}) > 1, "they end at different lengths"
    want = [tokenizer.decode(ids, skip_special_tokens=True) for ids in want]
    for size in (1, 3, 64):
        assert generate(model, tokenizer, prompts, 10, batch_size=size) == want, f"batch of {size}"


def gpt2(tokenizer):
    torch.manual_seed(0)
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3
    )
    return GPT2LMHeadModel(config).eval()


def gemma2(tokenizer):
    """A window of 4 tokens in every second layer: shorter than prompts."""
    torch.manual_seed(0)
    from transformers import Gemma2Config, Gemma2ForCausalLM

    sizes = dict(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )
    return Gemma2ForCausalLM(
        Gemma2Config(vocab_size=len(tokenizer), sliding_window=4, initializer_range=0.3, **sizes)
    ).eval()


@pytest.mark.parametrize("build", [gpt2, gemma2])
def test_plain_models_with_learned_positions_or_windows(build, tokenizer):
    """Generation and shared prompts."""
    model, prompts = build(tokenizer), prompts_of(tokenizer)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    want = [
        tokenizer.decode(slowly(model, p, 9, {tokenizer.eos_token_id}), skip_special_tokens=True)
        for p in prompts
    ]
    for size in (1, 64):
        assert generate(model, tokenizer, prompts, 9, batch_size=size) == want
    answers = [Example([*p.ids, 5 + k, 60, 9 * k, 70], len(p.ids)) for p in prompts for k in range(4)]
    shared = scoring.log_likelihoods(model, answers, 2, 64)
    for example, (value, _) in zip(answers, shared, strict=True):
        with torch.no_grad():
            scores = model(input_ids=torch.tensor([example.ids]), use_cache=False).logits[0].log_softmax(-1)
        alone = sum(scores[i - 1, example.ids[i]].item() for i in range(example.start, len(example.ids)))
        assert value == pytest.approx(alone, abs=1e-5, rel=1e-6)


def test_equals_transformers_own_generation(llama, tokenizer):
    prompts = prompts_of(tokenizer)
    for prompt, text in zip(prompts, generate(llama, tokenizer, prompts, 8), strict=True):
        ids = torch.tensor([prompt.ids])
        own = llama.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)[
            0, ids.shape[1] :
        ]
        assert text == tokenizer.decode(own, skip_special_tokens=True)


def test_a_stop_string_ends_the_text_before_it(llama, tokenizer):
    prompts = prompts_of(tokenizer)
    free = generate(llama, tokenizer, prompts, 12)
    stop = free[0][3:6]
    for size in (1, 64):
        assert generate(llama, tokenizer, prompts, 12, stop=(stop, ""), batch_size=size) == [
            text.split(stop)[0] for text in free
        ]


@pytest.mark.parametrize("length", [1, 3, 4, 5, 9])
def test_at_most_so_many_tokens_and_no_more_passes_than_needed(length, llama, tokenizer):
    llama.generation_config.eos_token_id = None
    seen = []
    hook = llama.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    prompt = prompts_of(tokenizer)[0]
    text = generate(llama, tokenizer, [prompt], length)
    hook.remove()
    assert text == [
        tokenizer.decode(slowly(llama, prompt, length, {tokenizer.eos_token_id}), skip_special_tokens=True)
    ]
    assert seen[0] == (1, len(prompt.ids)) and set(seen[1:]) <= {(1, 1)} and len(seen) <= length


def test_finished_sequences_leave_the_batch(llama, tokenizer):
    """The first token ends one sequence of two: after CHECK passes, one is left."""
    prompts = prompts_of(tokenizer)[:6]
    free = [slowly(llama, p, 12, ()) for p in prompts]
    first = next(i for i, ids in enumerate(free) if free[0][0] != ids[0])
    llama.generation_config.eos_token_id = free[0][0]
    seen = []
    hook = llama.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(kwargs["input_ids"].shape[0]), with_kwargs=True
    )
    texts = generate(llama, tokenizer, [prompts[0], prompts[first]], 12)
    hook.remove()
    assert texts[0] == "" and seen[: generation.CHECK] == [2] * generation.CHECK
    assert all(rows < 2 for rows in seen[generation.CHECK :])


def test_nothing_to_generate(llama, tokenizer):
    assert generate(llama, tokenizer, [], 5) == []


def test_a_router_that_reads_ahead_is_refused(llama, tokenizer):
    data = catalog.override(catalog.raw("moa_instance"), {"router.pool": "official_mean"})
    with pytest.raises(ConfigError, match="official_mean"):
        generate(methods.attach(llama, data).eval(), tokenizer, prompts_of(tokenizer), 5)
