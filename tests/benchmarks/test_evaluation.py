"""Evaluation against its invariants: batch size, repetition, lm-eval's own requests, what it leaves untouched, and counts by hand.

pytest tests/benchmarks/test_evaluation.py
"""

import random

import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from moabench.benchmarks import tasks
from moabench.benchmarks.data import load_rows
from moabench.benchmarks.evaluation import MaskedLM, evaluate, load_tasks
from moabench.methods import capture_routing

METHODS = ["none", "lora", "moe_lora_topk", "moa_sparse", "mixlora", "moa_instance"]
"""One of each kind: no adapter, no router, token routers at linears, blocks and FFNs, a router that pools over the sequence."""


def requests(config):
    """Every log-likelihood request of the evaluation: ragged prompts and answers, some of one token."""
    found = []
    for task in load_tasks(("arc_easy", "arc_challenge"), config.data).values():
        task.build_all_requests(rank=0, world_size=1)
        found += task.instances
    return found


@pytest.mark.parametrize("name", METHODS)
def test_log_likelihoods_do_not_depend_on_the_batch(name, attached, tokenizer, config):
    """lm-eval's own call, without a mask, moves a sequence-pooled router by 0.1 between these."""
    model = attached(name).eval()
    asked = requests(config())
    one, many = ([ll for ll, _ in MaskedLM(model, tokenizer, size, False).loglikelihood(asked)] for size in (1, 64))
    torch.testing.assert_close(torch.tensor(one), torch.tensor(many), atol=3e-5, rtol=0)


def test_a_router_that_pools_over_the_sequence_pools_over_the_prompt_alone(attached, tokenizer):
    """Against one plain call of the model that is told where the prompt ends."""
    model = attached("moa_instance").eval()
    ids, start = torch.tensor([[5, 60, 7, 80, 9, 100, 11]]), 3
    answers = [ids[0, start:].tolist(), ids[0, start : start + 2].tolist(), [42]]  # ragged: padding in the batch
    found = MaskedLM(model, tokenizer, 8, False)._loglikelihood_tokens([(("", ""), ids[0, :start].tolist(), a) for a in answers])
    prompt = torch.arange(6)[None] < start
    inputs = {"input_ids": ids[:, :-1], "attention_mask": torch.ones(1, 6, dtype=torch.long), "prompt_mask": prompt}
    with torch.no_grad():
        scores = model(**inputs).logits[0].log_softmax(-1)
    for (value, _), answer in zip(found, answers, strict=True):
        assert value == pytest.approx(sum(scores[start - 1 + i, t].item() for i, t in enumerate(answer)), abs=3e-5)


def test_log_likelihoods_and_greedy_flags_equal_lm_evals_on_a_model_without_routers(llama, tokenizer, config):
    asked = requests(config())
    asked += [Instance("loglikelihood", {}, ("The red fox ", "sleeps"), 0), Instance("loglikelihood", {}, ("", "red fox"), 0)]
    ours = MaskedLM(llama, tokenizer, 8, False).loglikelihood(asked)
    theirs = HFLM(pretrained=llama, tokenizer=tokenizer, batch_size=8, backend="causal").loglikelihood(asked, disable_tqdm=True)
    close = {"atol": 3e-5, "rtol": 1e-6}  # lm-eval sums an answer's tokens in fp32, and some answers are at -130
    torch.testing.assert_close(torch.tensor([a for a, _ in ours]), torch.tensor([a for a, _ in theirs]), **close)
    assert [g for _, g in ours] == [g for _, g in theirs]


def test_a_greedy_continuation_is_recognised(llama, tokenizer):
    prompt = tokenizer("The red fox", return_tensors="pt")["input_ids"]
    greedy = llama.generate(prompt, max_new_tokens=3, do_sample=False, attention_mask=torch.ones_like(prompt))[0, prompt.shape[1] :]
    lm = MaskedLM(llama, tokenizer, 2, False)
    other = greedy.clone()
    other[1] += 1
    asked = [(("", ""), prompt[0].tolist(), part.tolist()) for part in (greedy, other)]
    assert [flag for _, flag in lm._loglikelihood_tokens(asked)] == [True, False]


def test_a_prompt_longer_than_the_model_reads_loses_its_beginning_and_is_counted(llama, tokenizer):
    lm = MaskedLM(llama, tokenizer, 2, False)
    long = [5 + i % 200 for i in range(lm.max_length + 9)]
    results = lm._loglikelihood_tokens([(("", ""), prompt, [20, 21]) for prompt in (long, long[-lm.max_length + 1 :], long[:9])])
    assert results[0] == pytest.approx(results[1], abs=3e-5)
    assert lm.cut == 1


def test_one_token_choices_of_a_question_share_a_forward(llama, tokenizer):
    seen = []
    hook = llama.register_forward_pre_hook(lambda m, args, kwargs: seen.append(kwargs["input_ids"].shape), with_kwargs=True)
    MaskedLM(llama, tokenizer, 8, False)._loglikelihood_tokens([(("", ""), [5, 6, 7], [token]) for token in (10, 11, 12, 13)])
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
    assert set(result.metrics) == {
        f"eval/{t}@local/{m}" for t in cfg.task.eval for m in ("acc", "acc_stderr", "acc_norm", "acc_norm_stderr")
    }
    for task in cfg.task.eval:
        samples = [s for s in result.samples if s["task"] == f"{task}@local"]
        assert len(samples) == 24
        for key, metric in (("correct", "acc"), ("correct_norm", "acc_norm")):
            hits = np.array([s[key] for s in samples], dtype=float)
            assert result.metrics[f"eval/{task}@local/{metric}"] == pytest.approx(hits.mean())
            assert result.metrics[f"eval/{task}@local/{metric}_stderr"] == pytest.approx(hits.std(ddof=1) / len(hits) ** 0.5)
        for sample, row in zip(samples, load_rows(task, "test", cfg.data), strict=True):
            assert (sample["doc_id"], sample["choices"], sample["label"]) == (row["id"], row["choices"], row["label"])
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
            task = tasks.get(name)
            ids = tokenizer(task.prompt(row) + task.answer(row), return_tensors="pt")["input_ids"]
            site, routing = next(iter(capture_routing(model, {"input_ids": ids}).items()))
            counts, tokens = counts + routing.selected.sum(0), tokens + ids.shape[1]
        found = [r for r in result.routing if r["task"] == f"{name}@local" and r["site"] == site]
        assert [r["assignments"] for r in found] == counts.tolist()
        assert {(r["tokens"], r["split"], r["unit"]) for r in found} == {(tokens, "test", "token")}
        assert sum(r["share"] for r in found) == pytest.approx(1)
    assert result.metrics["load/mean_active"] == pytest.approx(2)


def test_a_sequence_router_is_counted_by_sequences_and_a_soft_one_reports_no_assignments(attached, tokenizer, config):
    cfg = config()
    result = evaluate(attached("moa_instance").eval(), tokenizer, ("arc_easy",), cfg, progress=False)
    assert {(r["unit"], r["tokens"], r["share"], r["usage"]) for r in result.routing} == {("sequence", 24, None, None)}
    assert "load/mean_active" not in result.metrics
    assert "load/effective_experts" in result.metrics


@pytest.mark.parametrize("name", ["arc_easy", "arc_challenge"])
def test_requests_follow_lm_evals_own_arc_files(name, config):
    """Prompt and choices rendered from lm-eval's ARC templates, on a document in the public form."""
    from pathlib import Path

    import lm_eval
    from lm_eval.tasks._yaml_loader import load_yaml
    from lm_eval.utils import apply_template

    theirs = load_yaml(Path(lm_eval.__file__).parent / "tasks" / "arc" / f"{name}.yaml", resolve_func=False)
    task, row = tasks.get(name), load_rows(name, "test", config().data)[0]
    letters = "ABCDE"[: len(row["choices"])]
    public = {"question": row["question"], "choices": {"text": row["choices"], "label": list(letters)}, "answerKey": letters[row["label"]]}
    ours = load_tasks((name,), config().data)[name]
    assert ours.doc_to_text(row) == task.prompt(row) == apply_template(theirs["doc_to_text"], public)
    assert ours.doc_to_choice(row) == row["choices"]
    assert str(ours.doc_to_target(row)) == apply_template(theirs["doc_to_target"], public)
    assert [m["metric"] for m in theirs["metric_list"]] == [m["metric"] for m in task.config["metric_list"]]
    assert task.answer(row) == ours.config.target_delimiter + row["choices"][row["label"]]
