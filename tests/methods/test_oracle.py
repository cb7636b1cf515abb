"""Routers that read facts of the batch: the oracle (true skill) and the random one (token ids).

Run: python -m pytest tests/methods/test_oracle.py
"""

from __future__ import annotations

import pytest
import torch
from tiny import (
    ARCHITECTURES,
    PAD,
    answer_only,
    assert_near,
    attached,
    base,
    batch,
    logits,
    prompt_mask,
    train,
    trainable,
)

from moabench import methods
from moabench.methods import catalog
from moabench.methods.routers.random import scramble, uniform
from moabench.methods.spec import ConfigError

SKILLS = torch.tensor([3, 6])
RANDOM = [("molora_random", "sequence"), ("molora_random", "token")]
BOUND = 2e-5


def given(name, inputs):
    """`inputs` with the prompt mask, and the skills where the method routes by them."""
    extra = {"prompt_mask": (torch.arange(inputs["input_ids"].shape[1]) < 5).expand_as(inputs["input_ids"])}
    return {**inputs, **extra} | ({"skill_ids": SKILLS} if name == "molora_oracle" else {})


def made(name, granularity=None, **overrides):
    return attached(name, **({"router.granularity": granularity} if granularity else {}), **overrides)


CASES = [("molora_oracle", None), *RANDOM]


@pytest.mark.parametrize(
    "change",
    [{}, {"experts.targets": ["q", "gate", "down"]}, {"site": "block"}],
    ids=["linear", "other", "block"],
)
def test_oracle_is_one_hot_on_the_skill(change):
    model = made("molora_oracle", **change)
    inputs = batch(left=2)
    routing = methods.capture_routing(model, {**inputs, "skill_ids": SKILLS})
    assert len(routing) == (2 if change.get("site") else 2 * len(change.get("experts.targets", "qkvod")))
    for found in routing.values():
        experts = found.weights.shape[-1]
        want = torch.nn.functional.one_hot(SKILLS % experts, experts).repeat_interleave(
            inputs["input_ids"].shape[1], 0
        )
        assert torch.equal(found.weights, want.float()) and torch.equal(found.chosen, want.bool())
        assert found.granularity == "sequence" and torch.equal(
            found.mask, inputs["attention_mask"].bool().flatten()
        )


def test_more_skills_than_experts_share_them():
    model = made("molora_oracle", **{"experts.n": 4})
    one, other = (logits(model, **batch(), skill_ids=torch.tensor(ids)) for ids in ([1, 3], [5, 11]))
    assert torch.equal(one, other)
    assert not torch.allclose(one, logits(model, **batch(), skill_ids=torch.tensor([2, 3])))


def test_oracle_equals_the_expert_alone():
    """With skill k the model is the LoRA whose tensors are those of expert k."""
    model = made("molora_oracle", **{"experts.n": 4, "experts.r": 3})
    single = attached("molora_oracle", **{"experts.n": 1, "experts.r": 3})
    mine, theirs = trainable(model), trainable(single)
    for k in range(4):
        with torch.no_grad():
            for name, tensor in theirs.items():
                rows = (
                    mine[name].unflatten(0, (4, -1))[k]
                    if name.endswith("_A")
                    else mine[name].unflatten(1, (4, -1))[:, k]
                )
                tensor.copy_(rows)
        inputs = batch(left=2)
        want = logits(single, **inputs, skill_ids=torch.tensor([0, 0]))
        assert_near(f"expert {k}", logits(model, **inputs, skill_ids=torch.tensor([k, k])), want, BOUND)


@pytest.mark.parametrize("name", ["molora_oracle", "molora_random"])
def test_no_router_parameters_and_the_experts_of_molora(name):
    counts = methods.param_count(made(name))
    assert "routers" not in counts
    assert counts["trainable"] == counts["experts"] == methods.param_count(attached("molora"))["experts"]


@pytest.mark.parametrize(("name", "granularity"), CASES)
def test_starts_at_the_base_and_a_step_changes_its_experts_alone(name, granularity):
    model = attached(name, trained=False, **({"router.granularity": granularity} if granularity else {}))
    inputs = given(name, batch())
    assert torch.equal(logits(model, **inputs), logits(base(), **batch()))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    train(model, steps=1, inputs=inputs)
    assert not torch.equal(logits(model, **inputs), logits(base(), **batch()))
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed and changed <= set(trainable(model))


def grads(model, inputs, checkpointing=False):
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    model.zero_grad()
    model(**inputs, labels=answer_only(inputs["input_ids"])).loss.backward()
    return {n: p.grad.clone() for n, p in trainable(model).items()}


def rows_of_experts(name, grad, experts=8):
    """[experts, ...]: the part of a gradient of A [E r, d] or B [b, E r] that belongs to each expert."""
    return (
        grad.unflatten(0, (experts, -1))
        if name.endswith("_A")
        else grad.unflatten(1, (experts, -1)).transpose(0, 1)
    )


@pytest.mark.parametrize(("name", "granularity"), [("molora_oracle", None), ("molora_random", "sequence")])
def test_gradients_reach_the_routed_experts_alone(name, granularity):
    model = made(name, granularity)
    inputs = given(name, batch())
    chosen = {int(i) for found in methods.capture_routing(model, inputs).values() for i in found.ids[:, 0]}
    assert len(chosen) == 2, "two sequences, two experts"
    for tensor, grad in grads(model, inputs).items():
        for expert, part in enumerate(rows_of_experts(tensor, grad)):
            assert bool(part.count_nonzero()) == (expert in chosen), f"{tensor}: expert {expert}"


@pytest.mark.parametrize(("name", "granularity"), CASES)
def test_gradient_checkpointing_changes_nothing(name, granularity):
    inputs = given(name, batch(left=2))
    plain, checkpointed = (grads(made(name, granularity), inputs, on) for on in (False, True))
    for tensor in plain:
        assert_near(tensor, checkpointed[tensor], plain[tensor], 1e-6)


@pytest.mark.parametrize(("left", "right"), [(3, 0), (0, 3), (2, 1)])
@pytest.mark.parametrize(("name", "granularity"), CASES)
def test_padding_and_neighbours_change_nothing(name, granularity, left, right):
    model = made(name, granularity)
    inputs = batch(left, right)
    length = inputs["input_ids"].shape[1]
    prompts = torch.arange(length) < torch.tensor([[left + 3], [5]])
    skills = {"skill_ids": SKILLS} if name == "molora_oracle" else {}
    got = logits(model, **inputs, prompt_mask=prompts, **skills)
    for row, (span, prompt) in enumerate([(slice(left, length - right), 3), (slice(0, length), 5)]):
        ids = inputs["input_ids"][row : row + 1, span]
        alone = logits(
            model,
            input_ids=ids,
            **prompt_mask(model, ids, prompt),
            **{k: v[row : row + 1] for k, v in skills.items()},
        )
        assert_near(f"sequence {row}", got[row, span], alone[0], BOUND)


@pytest.mark.parametrize("chunks", [(5, 1, 1, 1, 1), (5, 4), (5, 3, 1)])
@pytest.mark.parametrize("every", [True, False], ids=["ids each step", "ids at the prefill"])
@pytest.mark.parametrize(("name", "granularity"), CASES)
def test_cached_logits_equal_full_logits(name, granularity, every, chunks):
    model = made(name, granularity)
    inputs = batch(left=2)
    full = logits(model, **given(name, inputs))
    real, start, cache = inputs["attention_mask"].bool(), 0, None
    for size in chunks:
        now = slice(start, start + size)
        skills = {"skill_ids": SKILLS} if name == "molora_oracle" and (every or cache is None) else {}
        with torch.no_grad():
            out = model(
                input_ids=inputs["input_ids"][:, now],
                position_ids=inputs["position_ids"][:, now],
                attention_mask=inputs["attention_mask"][:, : now.stop],
                past_key_values=cache,
                use_cache=True,
                **skills,
            )
        cache = out.past_key_values
        assert_near(f"tokens {now}", out.logits[real[:, now]], full[:, now][real[:, now]], BOUND)
        start = now.stop


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}], ids=str
)
@pytest.mark.parametrize(("name", "granularity"), CASES)
def test_generation_with_and_without_cache_and_alone(name, granularity, options):
    model = made(name, granularity)
    inputs = batch(left=2, length=6)
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": PAD, **options}
    skills = {"skill_ids": SKILLS} if name == "molora_oracle" else {}
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    cached = model.generate(input_ids=ids, attention_mask=mask, **skills, **settings)
    assert torch.equal(
        cached, model.generate(input_ids=ids, attention_mask=mask, use_cache=False, **skills, **settings)
    )
    copies = options.get("num_return_sequences", 1)
    first = {k: v[:1] for k, v in skills.items()}
    alone = model.generate(input_ids=ids[:1, 2:], attention_mask=mask[:1, 2:], **first, **settings)
    assert torch.equal(cached[:copies, 2:], alone)


def test_a_repeated_cache_keeps_each_sequence_with_its_expert():
    model = made("molora_oracle")
    inputs, token = batch(length=6), torch.tensor([[7], [50]])

    def step(change=None, rows=(0, 1), **extra):
        with torch.no_grad():
            cache = model(**inputs, skill_ids=SKILLS, use_cache=True).past_key_values
            if change:
                getattr(cache, change[0])(change[1])
            return model(input_ids=token[list(rows)], past_key_values=cache, use_cache=True, **extra).logits

    want = step()
    assert_near("given again", step(skill_ids=SKILLS), want, BOUND)
    assert_near("reordered", step(("reorder_cache", torch.tensor([1, 0])), rows=(1, 0)), want.flip(0), BOUND)
    assert_near("selected", step(("batch_select_indices", torch.tensor([1])), rows=(1,)), want[1:], BOUND)


def test_oracle_refuses_what_it_cannot_route():
    model = made("molora_oracle")
    for ids, message in [
        (None, "skill_ids=None"),
        (torch.tensor([0, -1]), r"skill_ids\[1\]=-1"),
        (torch.tensor([1]), r"expected \(2,\) int64"),
        (torch.tensor([1.0, 2.0]), "int64"),
    ]:
        with pytest.raises(ConfigError, match=message):
            logits(model, **batch(), skill_ids=ids)
        model.train()
        with pytest.raises(ConfigError, match=message):
            model(**batch(), skill_ids=ids)
        model.eval()
    with model.disable_adapter():
        assert torch.equal(logits(model, **batch()), logits(base(), **batch())), "the base needs no skill"
    with pytest.raises(ConfigError, match="granularity"):
        catalog.parse(catalog.override(catalog.raw("molora_oracle"), {"router.granularity": "token"}))


def test_models_say_whether_they_take_skills_and_others_ignore_them():
    molora = attached("molora")
    assert molora.accepts_skill_ids and not getattr(attached("lora"), "accepts_skill_ids", False)
    assert torch.equal(logits(molora, **batch(), skill_ids=torch.tensor([-1, -1])), logits(molora, **batch()))


def test_random_routing_is_even_and_differs_by_seed_and_text():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 97, (4000, 1, 6), generator=generator)
    for seed in (1, 2):
        model_free = uniform(scramble(scramble(ids, seed).sum(-1), seed), 8)
        counts = torch.bincount(model_free.flatten(), minlength=8)
        assert (counts - 500).abs().max() < 4 * (500 * 7 / 8) ** 0.5, counts
    one, other = (uniform(scramble(torch.arange(4000), seed), 8) for seed in (1, 2))
    assert 0.08 < (one == other).float().mean() < 0.17, "another seed is another draw"
    pairs = torch.bincount(
        uniform(scramble(torch.arange(8000), 1), 8).view(-1, 2) @ torch.tensor([8, 1]), minlength=64
    )
    assert (pairs - 62.5).abs().max() < 40, "neighbouring ids are drawn independently"


def test_random_routing_follows_the_prompt_in_training_and_evaluation():
    model = made("molora_random")
    ids = torch.randint(3, 97, (32, 9), generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": ids, "prompt_mask": (torch.arange(9) < 5).expand(32, 9)}
    drawn = next(iter(methods.capture_routing(model, inputs).values())).ids.view(32, 9)
    assert (drawn == drawn[:, :1]).all() and len(drawn[:, 0].unique()) >= 6
    other = {**inputs, "input_ids": torch.cat([ids[:, :5], ids[:, 5:].flip(0)], 1)}
    assert torch.equal(next(iter(methods.capture_routing(model, other).values())).ids.view(32, 9), drawn), (
        "the answer has no say"
    )
    model.train()
    with methods.record(model) as recorder:
        model(**inputs)
    assert torch.equal(next(iter(recorder.routing.values())).ids.view(32, 9), drawn)
    model.eval()
    tokens = next(iter(methods.capture_routing(made("molora_random", "token"), inputs).values())).ids.view(
        32, 9
    )
    assert all(len(row.unique()) > 2 for row in tokens)


def test_random_needs_token_ids():
    model = made("molora_random")
    embeds = model.get_input_embeddings()(batch()["input_ids"])
    with pytest.raises(ConfigError, match="input_ids=None"):
        model(inputs_embeds=embeds)


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_every_architecture(architecture):
    for name in ("molora_oracle", "molora_random"):
        model = attached(name, base(architecture))
        inputs = batch(left=2)
        first = logits(model, **given(name, inputs))
        assert (
            torch.equal(first, logits(model, **given(name, inputs)))
            and first[inputs["attention_mask"].bool()].isfinite().all()
        )


def test_save_and_load(tmp_path):
    import peft

    model = train(made("molora_oracle"), steps=1, inputs={**batch(), "skill_ids": SKILLS})
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(base(), tmp_path).eval()
    inputs = {**batch(), "skill_ids": SKILLS}
    assert torch.equal(logits(model, **inputs), logits(again, **inputs))
