"""Evaluation against its invariants (batch size, repetition, what it leaves untouched), against a loop over
choices without a cache, against lm-eval's own requests and metrics, and counts by hand.

pytest tests/benchmarks/test_evaluation.py
"""

import dataclasses
import random

import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from moabench.benchmarks import tasks
from moabench.benchmarks.config.sections import DataConfig
from moabench.benchmarks.data import batches
from moabench.benchmarks.evaluation import forgetting, scoring
from moabench.benchmarks.evaluation.evaluate import FormTask, MaskedLM, evaluate, load_tasks
from moabench.benchmarks.machine import files
from moabench.benchmarks.tasks.rows import Reader, load_rows
from moabench.methods import capture_routing, catalog
from moabench.methods.spec import ConfigError

METHODS = ["none", "lora", "moe_lora_topk", "moa_sparse", "mixlora", "moa_instance"]
"""One of each kind: no adapter, no router, token routers at linears, blocks and FFNs, a router that pools
over the sequence."""
ADAPTERS = [name for name in catalog.names() if catalog.parse(catalog.raw(name)).tuner in ("mixture", "peft")]
SKILLS = ("none", "other")


def requests(config):
    """Every log-likelihood request of the evaluation: ragged prompts and answers, some of one token."""
    found = []
    for task in load_tasks(("arc_easy", "arc_challenge"), Reader(config.data)).values():
        task.build_all_requests(rank=0, world_size=1)
        found += task.instances
    return found


def alone(model, example):
    """Log-likelihood of one example's answer by one plain call: no batch, no padding, no cache."""
    ids = torch.tensor([example.ids])
    facts = {
        "prompt_mask": torch.arange(ids.shape[1] - 1)[None] < example.start,
        "skill_ids": torch.tensor([example.skill]),
    }
    facts = {key: value for key, value in facts.items() if getattr(model, f"accepts_{key}", False)}
    with torch.no_grad():
        scores = model(input_ids=ids[:, :-1], use_cache=False, **facts).logits[0].log_softmax(-1)
    return sum(scores[i - 1, example.ids[i]].item() for i in range(example.start, len(example.ids)))


def questions_of(rng, count=8):
    """Examples of `count` questions: long and short prompts, 2 to 5 answers of 1 to 9 tokens, an answer that
    comes twice."""
    found = []
    for number in range(count):
        prompt = [rng.randrange(3, 300) for _ in range(rng.choice([1, 2, 5, 12, 30, 45]))]
        answers = [
            [rng.randrange(3, 300) for _ in range(rng.choice([1, 1, 2, 4, 9]))]
            for _ in range(rng.randint(2, 5))
        ]
        found += [
            batches.Example(prompt + answer, len(prompt), number % 2) for answer in [*answers, answers[0]]
        ]
    return found


@pytest.mark.parametrize("name", ["none", *ADAPTERS])
def test_shared_prompts_change_no_log_likelihood(name, attached, monkeypatch):
    """Every method, batches of 1 and 64, prompts shared always, by the rule, or never; against one plain call
    an answer."""
    model, examples = attached(name).eval(), questions_of(random.Random(3))
    want = torch.tensor([alone(model, e) for e in examples])
    rule = scoring.Question.shares
    ways = {"always": lambda q: len(q.rows) > 1, "rule": rule, "never": lambda q: False}
    assert 0 < sum(rule(q) for q in grouped(examples)) < len(grouped(examples)), (
        "the rule takes both ways here"
    )
    for way, shares in ways.items():
        monkeypatch.setattr(scoring.Question, "shares", shares)
        for size in (1, 64):
            got = torch.tensor([ll for ll, _ in scoring.log_likelihoods(model, examples, 2, size)])
            torch.testing.assert_close(
                got, want, atol=1e-5, rtol=1e-6, msg=lambda m, way=way, size=size: f"{way}, batch {size}: {m}"
            )


def grouped(examples):
    questions = {}
    for i, e in enumerate(examples):
        question = questions.setdefault(tuple(e.ids[: e.start]), scoring.Question(e.ids[: e.start], e.skill))
        question.rows.setdefault(tuple(e.ids[e.start : -1]), []).append(i)
    return list(questions.values())


def test_a_router_that_reads_ahead_reads_whole_texts(llama, monkeypatch):
    """official_mean pools over the answer too: a cache of the prompt cannot serve it."""
    from moabench import methods

    torch.manual_seed(0)
    model = methods.attach(
        llama, catalog.override(catalog.raw("moa_instance"), {"router.pool": "official_mean"})
    ).eval()
    assert scoring.reads_ahead(model)
    monkeypatch.setattr(scoring.Question, "shares", lambda q: True)
    examples = questions_of(random.Random(3), count=3)
    got = [ll for ll, _ in scoring.log_likelihoods(model, examples, 2, 1)]
    torch.testing.assert_close(
        torch.tensor(got), torch.tensor([alone(model, e) for e in examples]), atol=1e-5, rtol=1e-6
    )


def test_sharing_reads_each_prompt_once(llama, monkeypatch):
    """Tokens that the model is given: the prompt once, and each answer but its last token."""
    monkeypatch.setattr(scoring.Question, "shares", lambda q: True)
    seen = []
    hook = llama.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    prompt = list(range(3, 43))
    scoring.log_likelihoods(
        llama, [batches.Example(prompt + answer, 40) for answer in ([50, 51, 52], [60, 61, 62], [70])], 2, 8
    )
    hook.remove()
    assert seen == [(1, 1), (1, 40), (2, 2)], "a look at the cache, the prompt, the answers"


@pytest.mark.parametrize(
    ("prompt", "answers", "shares"),
    [(40, [3, 3, 3, 3], True), (3, [9, 9], False), (20, [60, 2], False), (40, [0], False)],
)
def test_the_rule_compares_tokens(prompt, answers, shares):
    """answers: how many tokens of each are read, all but its last. One row of no token answers every choice
    of one token."""
    rows = {tuple([i] * length): [i] for i, length in enumerate(answers)}
    assert scoring.Question(list(range(prompt)), -1, rows).shares() == shares


@pytest.mark.parametrize("name", METHODS)
def test_log_likelihoods_do_not_depend_on_the_batch(name, attached, tokenizer, config):
    """lm-eval's own call, without a mask, moves a sequence-pooled router by 0.1 between these."""
    model = attached(name).eval()
    asked = requests(config())
    one, many = (
        [ll for ll, _ in MaskedLM(model, tokenizer, size, False).loglikelihood(asked)] for size in (1, 64)
    )
    torch.testing.assert_close(torch.tensor(one), torch.tensor(many), atol=3e-5, rtol=0)


def test_a_router_that_pools_over_the_sequence_pools_over_the_prompt_alone(attached, tokenizer):
    """Against one plain call of the model that is told where the prompt ends."""
    model = attached("moa_instance").eval()
    ids, start = torch.tensor([[5, 60, 7, 80, 9, 100, 11]]), 3
    answers = [
        ids[0, start:].tolist(),
        ids[0, start : start + 2].tolist(),
        [42],
    ]  # ragged: padding in the batch
    found = MaskedLM(model, tokenizer, 8, False)._loglikelihood_tokens(
        [(("", ""), ids[0, :start].tolist(), a) for a in answers]
    )
    prompt = torch.arange(6)[None] < start
    inputs = {
        "input_ids": ids[:, :-1],
        "attention_mask": torch.ones(1, 6, dtype=torch.long),
        "prompt_mask": prompt,
    }
    with torch.no_grad():
        scores = model(**inputs).logits[0].log_softmax(-1)
    for (value, _), answer in zip(found, answers, strict=True):
        assert value == pytest.approx(
            sum(scores[start - 1 + i, t].item() for i, t in enumerate(answer)), abs=3e-5
        )


def test_log_likelihoods_and_greedy_flags_equal_lm_evals_on_a_model_without_routers(llama, tokenizer, config):
    asked = requests(config())
    asked += [
        Instance("loglikelihood", {}, ("The red fox ", "sleeps"), 0),
        Instance("loglikelihood", {}, ("", "red fox"), 0),
    ]
    ours = MaskedLM(llama, tokenizer, 8, False).loglikelihood(asked)
    theirs = HFLM(pretrained=llama, tokenizer=tokenizer, batch_size=8, backend="causal").loglikelihood(
        asked, disable_tqdm=True
    )
    close = {
        "atol": 3e-5,
        "rtol": 1e-6,
    }  # lm-eval sums an answer's tokens in fp32, and some answers are at -130
    torch.testing.assert_close(
        torch.tensor([a for a, _ in ours]), torch.tensor([a for a, _ in theirs]), **close
    )
    assert [g for _, g in ours] == [g for _, g in theirs]


def test_a_greedy_continuation_is_recognised(llama, tokenizer):
    prompt = tokenizer("The red fox", return_tensors="pt")["input_ids"]
    greedy = llama.generate(
        prompt, max_new_tokens=3, do_sample=False, attention_mask=torch.ones_like(prompt)
    )[0, prompt.shape[1] :]
    lm = MaskedLM(llama, tokenizer, 2, False)
    other = greedy.clone()
    other[1] += 1
    asked = [(("", ""), prompt[0].tolist(), part.tolist()) for part in (greedy, other)]
    assert [flag for _, flag in lm._loglikelihood_tokens(asked)] == [True, False]


def test_a_prompt_longer_than_the_model_reads_loses_its_beginning_and_is_counted(llama, tokenizer):
    lm = MaskedLM(llama, tokenizer, 2, False)
    long = [5 + i % 200 for i in range(lm.max_length + 9)]
    results = lm._loglikelihood_tokens(
        [(("", ""), prompt, [20, 21]) for prompt in (long, long[-lm.max_length + 1 :], long[:9])]
    )
    assert results[0] == pytest.approx(results[1], abs=3e-5)
    assert lm.cut == 1


def asked_of(protocol, row):
    """The requests of one row of arc_easy."""
    task = FormTask(tasks.get("arc_easy").form(protocol), [row], 40)
    task.set_config("num_fewshot", 0)
    task.build_all_requests(rank=0, world_size=1)
    return task.instances


PLAIN = {"id": "p", "task": "arc_easy", "question": "Why so?", "choices": ["red", "blue"], "label": 0}
WIDE = {**PLAIN, "id": "w", "choices": ["red " * 99, "blue " * 99]}
LOST = {  # nothing of the question is left: what comes after it in the prompt, or the answer, fills all
    "loglikelihood": {**PLAIN, "id": "l", "choices": ["red " * 99, "blue " * 99]},
    "generate": WIDE,
    "label": WIDE,
}


@pytest.mark.parametrize("protocol", LOST)
def test_a_question_of_which_nothing_is_left_is_refused(protocol, llama, tokenizer):
    lm = MaskedLM(llama, tokenizer, 2, False)
    ask = lm.generate_until if protocol == "generate" else lm.loglikelihood
    with pytest.raises(
        ConfigError, match=r"task arc_easy, row \w: nothing of the question is left in the 256"
    ):
        ask([*asked_of(protocol, PLAIN), *asked_of(protocol, LOST[protocol])])


def test_answers_that_take_all_positions_leave_no_prompt(llama, tokenizer):
    """As gsm8k with 64 positions: room for the answer alone."""
    llama.config.max_position_embeddings = 32
    with pytest.raises(ConfigError, match="nothing of the question is left in the 32"):
        MaskedLM(llama, tokenizer, 2, False).generate_until(asked_of("generate", PLAIN))


@pytest.mark.parametrize("protocol", ["loglikelihood", "generate"])
def test_more_cut_prompts_of_a_task_than_allowed_are_an_error(protocol, llama, tokenizer):
    """A long context goes, its question stays: allowed up to the share, counted within each task."""
    llama.config.max_position_embeddings = 600  # the instruction alone takes more than 256
    long = {**PLAIN, "id": "c", "context": "The red fox sleeps. " * 120}
    asked = [request for row in (PLAIN, PLAIN, PLAIN, long) for request in asked_of(protocol, row)]
    others = [request for _ in range(6) for request in asked_of(protocol, {**PLAIN, "task": "other"})]
    for share in (0.25, 0.24):
        lm = MaskedLM(llama, tokenizer, 16, False, allow_cut=share)
        ask = lm.generate_until if protocol == "generate" else lm.loglikelihood
        if share == 0.25:
            assert len(ask(asked)) == len(asked) == lm.asked and lm.cut == len(asked) // 4
        else:
            with pytest.raises(
                ConfigError, match=r"data.allow_cut=0.24: \d of \d prompts of arc_easy .*0.25"
            ):
                ask([*others, *asked])


def test_token_ids_beyond_the_embedding_are_refused(llama, tokenizer, config):
    """By evaluation, and by training and held-out text: each reads tokens of its own."""
    import copy

    other = copy.deepcopy(tokenizer)
    other.add_tokens(["sleeps"])
    assert other("sleeps")["input_ids"] == [len(tokenizer)]
    reason = f"gives token {len(tokenizer)}, and the model's embedding has {len(tokenizer)} rows"
    with pytest.raises(ConfigError, match=reason):
        MaskedLM(llama, other, 2, False).loglikelihood(
            asked_of("label", {**PLAIN, "question": "Who sleeps?"})
        )
    with pytest.raises(ConfigError, match=reason):
        forgetting.text_loss(llama, other, ["It sleeps."], 2)
    with pytest.raises(ConfigError, match=reason):
        batches.check_ids(llama, batches.encode(other, [("It", " sleeps")]))


def test_one_token_choices_of_a_question_share_a_forward(llama, tokenizer):
    seen = []
    hook = llama.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    MaskedLM(llama, tokenizer, 8, False)._loglikelihood_tokens(
        [(("", ""), [5, 6, 7], [token]) for token in (10, 11, 12, 13)]
    )
    hook.remove()
    assert seen == [(1, 3)]


@pytest.mark.parametrize("name", ["lora", "moa_sparse"])
def test_two_evaluations_are_equal_even_from_training_mode(name, attached, tokenizer, config):
    model, cfg = attached(name).train(), config()
    first, second = (evaluate(model, tokenizer, cfg.task.eval, cfg, progress=False) for _ in range(2))
    assert first == second


def draw(*_):
    """A forward hook of a model that uses random numbers."""
    random.random(), np.random.rand(), torch.rand(1)


def test_random_states_and_modes_are_left_as_they_were(attached, tokenizer, config):
    model, cfg = attached("lora").train(), config()
    next(model.children()).eval()
    modes = [m.training for m in model.modules()]
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(7)
    expected = random.random(), np.random.rand(), torch.rand(3)
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(7)
    hook = model.register_forward_pre_hook(draw)
    evaluate(model, tokenizer, cfg.task.eval, cfg, progress=False)
    hook.remove()
    assert modes == [m.training for m in model.modules()]
    assert (random.random(), np.random.rand()) == expected[:2]
    assert torch.equal(torch.rand(3), expected[2])


def test_metrics_are_the_means_of_the_samples_and_carry_their_source(llama, tokenizer, config):
    cfg = config()
    result = evaluate(llama, tokenizer, cfg.task.eval, cfg, progress=False)
    assert result.routing == []
    assert result.metrics.pop("eval/cut_requests") == 0
    assert result.metrics.pop("eval/requests") == len(requests(cfg))
    assert set(result.metrics) == {
        f"eval/{t}@local:loglikelihood/{m}"
        for t in cfg.task.eval
        for m in ("acc", "acc_stderr", "acc_norm", "acc_norm_stderr")
    }
    for task in cfg.task.eval:
        samples = [s for s in result.samples if s["task"] == f"{task}@local:loglikelihood"]
        assert len(samples) == 24
        for key, metric in (("correct", "acc"), ("correct_norm", "acc_norm")):
            hits = np.array([s[key] for s in samples], dtype=float)
            assert result.metrics[f"eval/{task}@local:loglikelihood/{metric}"] == pytest.approx(hits.mean())
            assert result.metrics[f"eval/{task}@local:loglikelihood/{metric}_stderr"] == pytest.approx(
                hits.std(ddof=1) / len(hits) ** 0.5
            )
        for sample, row in zip(samples, load_rows(task, "test", cfg.data), strict=True):
            assert (sample["doc_id"], sample["choices"], sample["label"]) == (
                row["id"],
                row["choices"],
                row["label"],
            )
            assert sample["split"] == "test" and sample["skill"] == "none"
            assert sample["correct"] == (sample["prediction"] == sample["label"])
            assert sample["correct_norm"] == (sample["prediction_norm"] == sample["label"])
            assert sample["prediction"] == int(np.argmax(sample["loglikelihoods"]))


def test_expert_load_counts_each_real_token_of_question_and_answer_once(attached, tokenizer, config):
    model, cfg = attached("moe_lora_topk").eval(), config()
    result = evaluate(model, tokenizer, cfg.task.eval, cfg, progress=False)
    for name in cfg.task.eval:
        rows, counts, tokens = load_rows(name, "test", cfg.data), 0, 0
        for row in rows:  # one by one: no padding
            form = tasks.get(name).form()
            ids = tokenizer(form.prompt(row) + form.answer(row), return_tensors="pt")["input_ids"]
            site, routing = next(iter(capture_routing(model, {"input_ids": ids}).items()))
            counts, tokens = counts + routing.selected.sum(0), tokens + ids.shape[1]
        found = [
            r
            for r in result.routing
            if r["task"] == f"{name}@local:loglikelihood" and r["site"] == site and r["skill"] is None
        ]
        assert [r["assignments"] for r in found] == counts.tolist()
        assert {(r["tokens"], r["split"], r["unit"]) for r in found} == {(tokens, "test", "token")}
        assert sum(r["share"] for r in found) == pytest.approx(1)
    assert result.metrics["load/mean_active"] == pytest.approx(2)


def test_a_sequence_router_is_counted_by_sequences_and_a_soft_one_reports_no_assignments(
    attached, tokenizer, config
):
    cfg = config()
    result = evaluate(attached("moa_instance").eval(), tokenizer, ("arc_easy",), cfg, progress=False)
    assert {(r["unit"], r["tokens"], r["share"], r["usage"]) for r in result.routing} == {
        ("sequence", 24, None, None)
    }
    assert "load/mean_active" not in result.metrics
    assert "load/effective_experts" in result.metrics


NATIVE = [
    name
    for name in tasks.names()
    if tasks.get(name).native == "loglikelihood" and not tasks.get(name).unavailable("builtin")
]


@pytest.mark.parametrize("name", NATIVE)
def test_requests_and_scores_equal_those_of_the_task_file_in_plain_lm_eval(name):
    """Our task object against the one that lm-eval builds from the YAML alone, with random
    log-likelihoods."""
    from lm_eval.tasks import TaskManager

    ours = load_tasks((name,), Reader(DataConfig("builtin", eval_limit=20)))[name]
    manager = TaskManager(
        include_path=str(tasks.FOLDER),
        include_defaults=False,
        metadata={"source": "builtin", "eval_limit": 20},
    )
    theirs = manager.load([name])["tasks"][name]
    asked = []
    for task in (ours, theirs):
        task.set_config("num_fewshot", 0)
        task.set_fewshot_seed(0)
        task.build_all_requests(rank=0, world_size=1)
        asked.append([(r.doc_id, r.idx, r.args) for r in task.instances])
    assert asked[0] == asked[1]
    rng = random.Random(0)
    for mine, other in zip(ours.eval_docs, theirs.eval_docs, strict=True):
        results = [(-rng.random() * 9, False) for _ in ours.form.requests(mine)]
        want, got = theirs.process_results(other, results), ours.process_results(mine, results)
        assert {key: got[key] for key in want} == want


PROTOCOLS = {"loglikelihood": ("acc", "acc_norm"), "label": ("acc",), "generate": ("acc", "acc_strict")}
COLUMNS = """task protocol template extraction split doc_id question context choices label answer prediction
prediction_norm prediction_strict response extracted extracted_strict loglikelihoods correct
correct_norm correct_strict skill domain"""


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_every_protocol_has_its_metrics_and_one_schema(protocol, attached, tokenizer, config, tmp_path):
    cfg = config()
    object.__setattr__(cfg, "protocol", protocol)
    result = evaluate(
        attached("molora_oracle"),
        tokenizer,
        ("arc_easy", "arc_challenge"),
        cfg,
        progress=False,
        skills=SKILLS,
    )
    title = f"arc_easy@local:{protocol}"
    found = {key for key in result.metrics if key.startswith(f"eval/{title}/")}
    assert found == {f"eval/{title}/{name}{end}" for name in PROTOCOLS[protocol] for end in ("", "_stderr")}
    samples = [s for s in result.samples if s["task"] == title]
    assert len(samples) == 24 and all(set(s) == set(COLUMNS.split()) for s in samples)
    for column, metric in {
        "correct": "acc",
        "correct_norm": "acc_norm",
        "correct_strict": "acc_strict",
    }.items():
        values = [s[column] for s in samples]
        if metric in PROTOCOLS[protocol]:
            assert result.metrics[f"eval/{title}/{metric}"] == pytest.approx(np.mean(values))
        else:
            assert set(values) == {None}
    assert {s["split"] for s in samples} == {r["split"] for r in result.routing} == {"test"}
    files.write_parquet(tmp_path / "samples.parquet", result.samples)


def test_letters_are_scored_as_letters(llama, tokenizer, config):
    cfg = config()
    object.__setattr__(cfg, "protocol", "label")
    row = load_rows("arc_easy", "test", cfg.data)[0]
    sample = evaluate(llama, tokenizer, ("arc_easy",), cfg, progress=False).samples[0]
    prompt = tasks.get("arc_easy").form("label").prompt(row)
    pairs = [(prompt, f" {letter}") for letter in "ABCDE"[: len(row["choices"])]]
    want = [alone(llama, e) for e in batches.encode(tokenizer, pairs)]
    torch.testing.assert_close(
        torch.tensor(sample["loglikelihoods"]), torch.tensor(want), atol=1e-5, rtol=1e-6
    )
    assert sample["prediction"] == int(np.argmax(want)) and sample["correct"] == (
        sample["prediction"] == row["label"]
    )


class Answers(MaskedLM):
    """A model that says what it is told."""

    def generate_until(self, requests, disable_tqdm=False):
        said = [
            "the correct answer is {right}.",
            "answer1 or answer2",
            "no idea",
            "The correct answer is {wrong}. the correct answer is {right}",
        ]
        found = []
        for i, request in enumerate(requests):
            words = [f"answer{k + 1}" for k in range(len(request.doc["choices"]))]
            right = words[request.doc["label"]]
            found.append(said[i % 4].format(right=right, wrong=next(w for w in words if w != right)))
        return found


def test_generated_answers_are_read_twice(llama, tokenizer, config, monkeypatch):
    monkeypatch.setattr("moabench.benchmarks.evaluation.evaluate.MaskedLM", Answers)
    cfg = config()
    object.__setattr__(cfg, "protocol", "generate")
    samples = evaluate(llama, tokenizer, ("arc_easy",), cfg, progress=False).samples
    for i, sample in enumerate(samples):
        word = f"answer{sample['label'] + 1}"
        if i % 4 == 0:
            assert (sample["extracted"], sample["extracted_strict"]) == (word, word)
            assert sample["prediction"] == sample["prediction_strict"] == sample["label"]
            assert sample["correct"] and sample["correct_strict"]
        elif i % 4 == 1:
            assert (sample["extracted"], sample["extracted_strict"], sample["prediction"]) == (
                "answer1",
                None,
                0,
            )
            assert sample["correct"] == (sample["label"] == 0) and not sample["correct_strict"]
        elif i % 4 == 2:
            assert (
                sample["extracted"] is sample["prediction"] is sample["extracted_strict"] is None
                and not sample["correct"]
            )
        else:
            assert (
                not sample["correct"]
                and not sample["correct_strict"]
                and sample["prediction"] != sample["label"]
            )


def test_the_true_skill_reaches_the_model(attached, tokenizer, config):
    """The oracle routes by it: other numbers, other log-likelihoods; a skill that is not named is refused by
    the oracle."""
    model, cfg = attached("molora_oracle").eval(), config()

    def scores(skills):
        return [
            s["loglikelihoods"]
            for s in evaluate(model, tokenizer, ("arc_easy",), cfg, progress=False, skills=skills).samples
        ]

    assert scores(("none", "other")) == scores(("none",)) != scores(("other", "none"))
    with pytest.raises(ConfigError, match="skill_ids"):
        scores(("other",))


def test_a_protocol_that_a_source_cannot_serve_is_refused(llama, tokenizer, config):
    cfg = config()
    object.__setattr__(cfg, "protocol", "label")
    with pytest.raises(ConfigError, match=r"gsm8k.*no choices"):
        evaluate(llama, tokenizer, ("gsm8k",), cfg, progress=False)


def test_generation_leaves_room_and_counts_cut_prompts(llama, tokenizer):
    lm = MaskedLM(llama, tokenizer, 4, False)
    text = "red fox " * 200
    asked = [
        Instance("generate_until", {}, (prompt, {"until": [], "max_gen_toks": 5}), 0)
        for prompt in (text, "The red fox")
    ]
    assert len(lm.generate_until(asked)) == 2 and lm.cut == 1


@pytest.mark.parametrize("protocol", ["loglikelihood", "generate"])
def test_a_model_that_gives_nan_is_no_result(protocol, llama, tokenizer, config):
    """With NaN everywhere the first choice of each question would win, and it may be the right one."""
    llama.lm_head.weight.data[0, 0] = float("nan")
    cfg = dataclasses.replace(config(), protocol=protocol)
    with pytest.raises(files.RunError, match="training diverged"):
        evaluate(llama, tokenizer, ("arc_easy",), cfg, progress=False)
