"""Training against its invariants: accumulation, resume, a mid-run evaluation, what is trained, what the loss
and the load count.

pytest tests/benchmarks/test_training.py
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from moabench.benchmarks import tasks
from moabench.benchmarks.data import batches, mixes
from moabench.benchmarks.evaluation.evaluate import evaluate
from moabench.benchmarks.tasks.rows import load_rows
from moabench.benchmarks.training import step
from moabench.benchmarks.training import train as training
from moabench.benchmarks.training.joined import Joined
from moabench.benchmarks.training.step import answer_nll
from moabench.benchmarks.training.train import _arguments, encode_rows, train
from moabench.benchmarks.training.trainer import MixtureTrainer
from moabench.methods import Router, catalog, record
from moabench.methods.spec import ConfigError

METHODS = [
    "full",
    "lora",
    "moe_lora_topk",
    "moa_sparse",
    "mixlora",
    "moa_instance",
    "moe_lora_bias",
    "riemannian_moe_lora",
]


def rows(cfg):
    return [row for task in cfg.task.eval for row in load_rows(task, "train", cfg.data)]


def trainable(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_equal(found, expected):
    assert found.keys() == expected.keys() and found
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def draw(*_):
    """A forward hook of a model that uses random numbers."""
    torch.rand(1)


class Stop(TrainerCallback):
    """The power goes off after `step` steps."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


# the same run, disturbed and undisturbed


@pytest.mark.parametrize("name", METHODS)
def test_a_resumed_run_ends_bitwise_equal(name, attached, tokenizer, config, tmp_path):
    """Cut at step 5, between a checkpoint (4) and a logged step (6); dropout of the methods makes random
    states matter."""
    cfg = config(name, steps=8, save_every=4, log_every=3)
    whole_model = attached(name)
    whole = train(whole_model, tokenizer, rows(cfg), cfg, tmp_path / "whole", resume=False, progress=False)
    cut_model = attached(name)
    with pytest.raises(KeyboardInterrupt):
        train(
            cut_model,
            tokenizer,
            rows(cfg),
            cfg,
            tmp_path / "cut",
            resume=False,
            progress=False,
            callbacks=[Stop(5)],
        )
    resumed_model = attached(name)
    resumed = train(resumed_model, tokenizer, rows(cfg), cfg, tmp_path / "cut", resume=True, progress=False)
    assert_equal(trainable(resumed_model), trainable(whole_model))
    for (name_, again), (_, buffer) in zip(
        resumed_model.named_buffers(), whole_model.named_buffers(), strict=True
    ):
        assert torch.equal(again, buffer), name_
    clocks = ("seconds", "tokens_per_second")
    timeless = [
        [{k: v for k, v in row.items() if k not in clocks} for row in r.history] for r in (resumed, whole)
    ]
    assert timeless[0] == timeless[1]
    assert [row["step"] for row in whole.history] == [3, 6, 8]
    assert resumed.routing == whole.routing
    assert resumed.metrics["train/tokens"] == whole.metrics["train/tokens"]


@pytest.mark.parametrize("name", ["lora", "mixlora"])
def test_a_mid_run_evaluation_changes_nothing(name, attached, tokenizer, config, tmp_path):
    cfg = config(name)

    class Evaluate(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 3:
                assert model.training
                hook = model.register_forward_pre_hook(draw)
                evaluate(model, tokenizer, ("arc_easy",), cfg, progress=False)
                hook.remove()
                assert model.training

    with_it, without = attached(name), attached(name)
    train(
        with_it,
        tokenizer,
        rows(cfg),
        cfg,
        tmp_path / "a",
        resume=False,
        progress=False,
        callbacks=[Evaluate()],
    )
    train(without, tokenizer, rows(cfg), cfg, tmp_path / "b", resume=False, progress=False)
    assert_equal(trainable(with_it), trainable(without))


@pytest.mark.parametrize("name", ["lora", "mixlora", "moa_sparse"])
def test_gradient_checkpointing_changes_no_gradient_and_counts_nothing_twice(
    name, attached, tokenizer, config, tmp_path
):
    results = {}
    for on in (False, True):
        cfg = config(name, steps=2, log_every=1, gradient_checkpointing=on)
        model = attached(name)
        found = train(model, tokenizer, rows(cfg), cfg, tmp_path / str(on), resume=False, progress=False)
        results[on] = (
            trainable(model),
            found.routing,
            [{k: v for k, v in row.items() if k.startswith("loss")} for row in found.history],
        )
    for key, value in results[False][0].items():
        torch.testing.assert_close(results[True][0][key], value, rtol=1e-4, atol=1e-6)
    assert results[True][2] == [pytest.approx(row) for row in results[False][2]]
    assert [r["tokens"] for r in results[True][1]] == [r["tokens"] for r in results[False][1]]


@pytest.mark.parametrize("state", [None, "", '{"global_st'])
def test_an_interrupted_checkpoint_is_passed_over(state, attached, tokenizer, config, tmp_path):
    cfg = config("lora")
    with pytest.raises(KeyboardInterrupt):
        train(
            attached("lora"),
            tokenizer,
            rows(cfg),
            cfg,
            tmp_path,
            resume=False,
            progress=False,
            callbacks=[Stop(4)],
        )
    (
        tmp_path / "checkpoints" / "checkpoint-5"
    ).mkdir()  # killed before or while its trainer_state.json was written
    if state is not None:
        (tmp_path / "checkpoints" / "checkpoint-5" / "trainer_state.json").write_text(state)
    result = train(attached("lora"), tokenizer, rows(cfg), cfg, tmp_path, resume=True, progress=False)
    assert [row["step"] for row in result.history] == [2, 4, 6]


# the loss


BALANCED = ["mixlora", "adamole"]
"""With a balance loss, of the whole model and of each linear."""


@pytest.mark.parametrize("name", ["lora", "moe_lora_topk", *BALANCED])
def test_gradients_do_not_depend_on_accumulation(name, attached, tokenizer, config, tmp_path, monkeypatch):
    """8 sequences at once against 4 times 2: task loss by answer tokens over all 8, a balance loss by the
    counts of all their tokens. With batch=micro it is the mean over passes of 2, another gradient."""
    model = without_dropout(attached(name), monkeypatch)
    examples, _ = encode_rows(tokenizer, rows(config())[:8], config())
    once, parts = (
        gradients(model, config(batch_size=8), examples, tmp_path),
        gradients(model, config(batch_size=2, accumulation=4), examples, tmp_path),
    )
    assert_close(parts["task"], once["task"])
    if name in BALANCED:
        assert_close(parts["aux"], once["aux"])
    assert_close(parts["all"], {k: parts["task"][k] + parts["aux"].get(k, 0) for k in parts["all"]})


@pytest.mark.parametrize("name", BALANCED)
def test_the_published_balance_loss_is_a_mean_over_passes(
    name, attached, tokenizer, config, tmp_path, monkeypatch
):
    model = without_dropout(attached(name, **{"losses.switch_balance.batch": "micro"}), monkeypatch)
    examples, _ = encode_rows(tokenizer, rows(config())[:8], config())
    parts, once = (
        gradients(model, config(batch_size=size, accumulation=8 // size), examples, tmp_path)["aux"]
        for size in (2, 8)
    )
    expected = {}
    for i in range(0, 8, 2):
        found = gradients(model, config(batch_size=2), examples[i : i + 2], tmp_path)["aux"]
        expected = {key: expected.get(key, 0) + value / 4 for key, value in found.items()}
    assert_close(parts, expected)
    routers = [key for key in once if "router" in key]
    assert any((parts[key] - once[key]).norm() > 0.02 * once[key].norm() for key in routers)


def test_passes_are_counted_with_the_random_numbers_that_they_draw(
    attached, tokenizer, config, tmp_path, monkeypatch
):
    """What was counted before the passes of a step is what they then are, dropout included; of the random
    numbers of training nothing is taken."""
    cfg, met = config("mixlora", batch_size=2, accumulation=3, steps=2), []

    def means(joined):
        counted = joined.counted
        return lambda own: met.append((own, counted)) or counted

    monkeypatch.setattr(Joined, "means", property(means))
    train(attached("mixlora"), tokenizer, rows(cfg), cfg, tmp_path, resume=False, progress=False)
    assert len(met) == 6
    for passes in (met[:3], met[3:]):
        counted = passes[0][1]
        assert counted and all(own.keys() == counted.keys() for own, _ in passes)
        for key, tensors in counted.items():
            for i, tensor in enumerate(tensors):
                own = torch.stack([own[key][i] for own, _ in passes])
                torch.testing.assert_close(own.mean(0), tensor, rtol=1e-6, atol=1e-6)
                assert not torch.equal(own[0], own[1])


def test_a_method_without_such_a_loss_is_asked_once(attached, tokenizer, config, tmp_path, monkeypatch):
    """One pass shows that nothing is to be counted; weights are those of a training that never asked."""
    cfg, asked = config("moe_lora_topk", batch_size=2, accumulation=2, steps=3), []
    original = step.sums
    monkeypatch.setattr(step, "sums", lambda *args, **kwargs: asked.append(1) or original(*args, **kwargs))
    ends = []
    for part in ("a", "b"):
        model = attached("moe_lora_topk")
        train(model, tokenizer, rows(cfg), cfg, tmp_path / part, resume=False, progress=False)
        ends.append(trainable(model))
        monkeypatch.setattr(Joined, "count", lambda joined, passes: None)
    assert len(asked) == 1
    assert_equal(*ends)


def without_dropout(model, monkeypatch):
    """Evaluation mode, which training does not leave: two runs of it draw different masks."""
    model.eval()
    monkeypatch.setattr(model, "train", lambda mode=True: model)
    return model


def gradients(model, cfg, examples, folder):
    """Gradients of the task loss, of the auxiliary losses and of both, as one optimiser step accumulates
    them."""
    size, steps = cfg.train.batch_size, len(examples) // cfg.train.batch_size
    found = {}
    for part in ("task", "aux", "all"):
        trainer = MixtureTrainer(model=model, args=_arguments(model, cfg, 1, folder), train_dataset=examples)
        trainer.current_gradient_accumulation_steps = steps
        model.zero_grad()
        chunks = [batches.collate(examples[i : i + size], 2) for i in range(0, len(examples), size)]
        chunks, items = trainer.get_batch_samples(iter(chunks), steps, torch.device("cpu"))
        for chunk in chunks:
            losses = {}
            trainer.tally.add = lambda parts, mask, routing, losses=losses: losses.update(parts)
            total = trainer.compute_loss(model, chunk, num_items_in_batch=items)
            aux = sum(value for key, value in losses.items() if key != "task")
            loss = {"task": losses["task"], "aux": aux, "all": total}[part]
            if torch.is_tensor(loss) and loss.requires_grad:
                loss.backward()
        found[part] = {
            n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad and p.grad is not None
        }
    return found


def assert_close(found, expected):
    assert found.keys() == expected.keys() and found
    for name, value in expected.items():
        error = (found[name] - value).norm() / value.norm().clamp_min(1e-8)
        assert error < 1e-4, f"{name}: relative error {error:.2g}"


def test_the_loss_is_that_of_the_answer_tokens_and_the_end(llama, tokenizer, config):
    """Against transformers' own loss, from labels that are -100 on the prompt."""
    row = rows(config())[0]
    (example,), cut = encode_rows(tokenizer, [row], config(max_length=256))
    form = tasks.get("arc_easy").form("loglikelihood")
    assert tokenizer.decode(example.ids[example.start :]) == form.answer(row) + "</s>"
    assert tokenizer.decode(example.ids[: example.start]) == form.prompt(row)
    assert cut == {"train/cut_examples": 0, "train/left_out": 0}
    batch = batches.collate([example], 2)
    labels = torch.tensor([[-100] * example.start + example.ids[example.start :]])
    assert torch.equal(batch["labels"], labels)
    expected = llama(input_ids=batch["input_ids"], labels=labels).loss
    logits = batches.forward(llama, batch, batch["kept"])
    found = answer_nll(logits, labels[:, -batch["kept"] :]) / (len(example.ids) - example.start)
    torch.testing.assert_close(found, expected)


def test_the_loss_of_whole_sequences(llama, tokenizer, config):
    """loss=whole: transformers' own loss over every token; the prompt stays marked as one."""
    examples, _ = encode_rows(tokenizer, rows(config())[:5], config())
    batch, response = (training._collate(examples, 2, loss) for loss in ("whole", "response"))
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    assert torch.equal(batch["labels"], labels) and torch.equal(batch["prompt_mask"], response["prompt_mask"])
    assert torch.equal(response["labels"], labels.masked_fill(batch["prompt_mask"], -100))
    expected = llama(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss
    found = (
        answer_nll(batches.forward(llama, batch, batch["kept"]), labels[:, -batch["kept"] :])
        / (labels[:, 1:] != -100).sum()
    )
    torch.testing.assert_close(found, expected)


def test_training_rows_carry_the_number_of_their_skill(tokenizer, config):
    given = [
        dict(row, skill=skill) for row, skill in zip(rows(config()), ("b", "a", None, "c"), strict=False)
    ]
    examples, _ = encode_rows(tokenizer, given, config(), skills=("a", "b"))
    assert [example.skill for example in examples] == [1, 0, -1, -1]


@pytest.mark.parametrize("protocol", tasks.PROTOCOLS)
def test_rows_are_trained_in_the_form_in_which_they_are_evaluated(tokenizer, config, protocol):
    row = rows(config())[0]
    (example,), _ = encode_rows(tokenizer, [row], replace(config(max_length=4096), protocol=protocol))
    form = tasks.get(row["task"]).form(protocol)
    assert tokenizer.decode(example.ids) == form.prompt(row) + form.answer(row) + "</s>"


def test_a_rows_kind_is_not_read_from_the_keys_that_it_has(tokenizer, config):
    """Keys of instruction files, other tasks and templates: the same tokens under each protocol."""
    row = rows(config())[0]
    strange = ("instruction", "output", "input", "mix", "answer", "stem", "options", "words", "lettered")
    for protocol in tasks.PROTOCOLS:
        cfg = replace(config(max_length=4096), protocol=protocol)
        encoded, _ = encode_rows(tokenizer, [row, *({**row, key: "x"} for key in strange)], cfg)
        assert all(example == encoded[0] for example in encoded)


def test_padding_changes_no_loss(llama, tokenizer, config):
    examples, _ = encode_rows(tokenizer, rows(config())[:6], config())

    def nll(chosen, pad):
        batch = batches.collate(chosen, pad)
        return answer_nll(batches.forward(llama, batch, batch["kept"]), batch["labels"][:, -batch["kept"] :])

    alone = sum(nll([example], 2) for example in examples)
    for pad in (2, 1, 7):  # also where the pad token is the end token, or a word
        torch.testing.assert_close(nll(examples, pad), alone, rtol=1e-5, atol=1e-5)


def test_logged_parts_add_up(attached, tokenizer, config, tmp_path):
    cfg = config("mixlora", log_every=1)
    result = train(attached("mixlora"), tokenizer, rows(cfg), cfg, tmp_path, resume=False, progress=False)
    for row in result.history:
        parts = [value for key, value in row.items() if key.startswith("loss/") and key != "loss/total"]
        assert len(parts) == 2
        assert sum(parts) == pytest.approx(row["loss/total"])
    assert result.metrics["train/loss_task"] == pytest.approx(result.history[-1]["loss/task"])
    assert result.metrics["train/tokens"] == sum(row["tokens"] for row in result.history)
    assert result.metrics["memory/peak_bytes"] > 2**20


def test_a_loss_that_is_not_finite_is_an_error(attached, tokenizer, config, tmp_path):
    cfg = config("lora", lr=1e30, max_grad_norm=0.0)
    with pytest.raises(ConfigError, match=r"loss/\w+=(nan|inf) at step \d.*learning rate"):
        train(attached("lora"), tokenizer, rows(cfg), cfg, tmp_path, resume=False, progress=False)


# what is trained, and on what


def test_nothing_happens_where_nothing_is_trainable(attached, tokenizer, config, tmp_path):
    model = attached("none")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    result = train(model, tokenizer, rows(config()), config(), tmp_path, resume=False, progress=False)
    assert (result.metrics, result.history, result.routing) == ({}, [], [])
    assert_equal(dict(model.state_dict()), before)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["lora", "moa_sparse"])
def test_the_frozen_base_stays(name, attached, tokenizer, config, tmp_path):
    model, cfg = attached(name), config(name)
    before = {k: p.detach().clone() for k, p in model.named_parameters() if not p.requires_grad}
    start = trainable(model)
    train(model, tokenizer, rows(cfg), cfg, tmp_path, resume=False, progress=False)
    assert_equal({k: p.detach() for k, p in model.named_parameters() if not p.requires_grad}, before)
    assert any(not torch.equal(value, start[key]) for key, value in trainable(model).items())
    assert not model.training
    assert model.config.use_cache


@pytest.mark.parametrize(("name", "rate"), [("full", "lr_full"), ("lora", "lr"), ("moa_soft", "lr")])
def test_adapters_and_whole_models_have_their_own_learning_rate(name, rate, attached, config, tmp_path):
    cfg = config(name, lr=1e-2, lr_full=1e-4)
    assert _arguments(attached(name), cfg, 6, tmp_path).learning_rate == getattr(cfg.train, rate)


def test_weight_decay_leaves_out_what_says_so(llama, config, tmp_path):
    llama.model.layers[0].mlp.up_proj.no_weight_decay = {"weight"}
    llama.model.register_parameter("vector", torch.nn.Parameter(torch.ones(3)))
    decayed = MixtureTrainer(
        model=llama, args=_arguments(llama, config(), 1, tmp_path)
    ).get_decay_parameter_names(llama)
    assert "model.layers.1.mlp.up_proj.weight" in decayed
    assert not {"model.layers.0.mlp.up_proj.weight", "model.vector", "model.norm.weight"} & set(decayed)


UNDECAYED = {"gamma", "up_bias", "threshold_weight", "vectors"}
"""Tensors of two dimensions that are no matrices: gates, biases, factors side by side; a head that is never
trained."""


@pytest.mark.parametrize("name", [n for n in catalog.names() if n not in ("none", "full")])
def test_what_weight_decay_reaches(name, attached, config, tmp_path):
    """The optimiser's groups, tensor by tensor: matrices alone, whatever they are called. b1 to b3 of MoA's
    gate network, prompt gates, thresholds that are not trained and DoRA's magnitudes have none."""
    model = attached(name)
    args = _arguments(model, config(name, weight_decay=0.1), 1, tmp_path)
    trainer = MixtureTrainer(model=model, args=args)
    trainer.create_optimizer()
    groups = trainer.optimizer.param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    tensors = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert decay.keys() == {id(p) for p in tensors.values()}
    for full_name, p in tensors.items():
        own = full_name.rpartition("__")[2]
        expected = 0.0 if p.ndim < 2 or own in UNDECAYED else 0.1
        assert decay[id(p)] == expected, full_name
    assert ("lora_magnitude" in " ".join(tensors)) == (name == "dora")
    shipped = {n.rpartition("__")[2] for n in tensors} & {"b1", "b2", "b3", "gamma", "threshold_weight"}
    assert shipped == MOA.get(name, set())


MOA = {
    "moa_soft": {"b1", "b2", "b3", "gamma"},
    "moa_sparse": {"b1", "b2", "b3", "threshold_weight"},
    "moa_instance": {"b1", "b2", "b3", "gamma"},
    "unipeft": {"gamma"},
    "naive_sum": {"gamma"},
}


@pytest.mark.parametrize(("grad", "decays"), [("none", False), ("subtract", True), ("ste", True)])
def test_a_threshold_that_learns_decays(grad, decays):
    (weight,) = (
        p
        for n, p in Router.parse({"kind": "threshold", "grad": grad}, "router").params(8, 3).items()
        if n == "threshold_weight"
    )
    assert weight.decay is decays


def test_every_row_is_seen_once_a_pass_in_batches_of_like_length():
    lengths = [(7 * i) % 50 + 5 for i in range(1003)]
    order = batches.training_order(lengths, batch=16, steps=126, seed=3)
    assert len(order) == 126 * 16
    assert sorted(order[:1003]) != order[:1003]
    counts = np.bincount(order, minlength=1003)
    assert counts.min() >= 2 and counts.max() <= 3  # 2016 = 2 passes and 10 examples of the third
    assert order == batches.training_order(lengths, 16, 126, 3) != batches.training_order(lengths, 16, 126, 4)
    spread = [
        max(lengths[i] for i in order[j : j + 16]) - min(lengths[i] for i in order[j : j + 16])
        for j in range(0, 2016, 16)
    ]
    assert np.median(spread) <= 5


def test_long_prompts_lose_their_beginning_and_are_counted(tokenizer, config):
    cfg = config(max_length=40)
    examples, cut = encode_rows(tokenizer, rows(cfg), cfg)
    whole, _ = encode_rows(tokenizer, rows(cfg), config(max_length=4096))
    assert cut["train/cut_examples"] == sum(len(e.ids) > 40 for e in whole) > 0
    assert cut["train/left_out"] == 0
    assert all(
        e.ids == w.ids[-40:] and 1 <= e.start < len(e.ids) for e, w in zip(examples, whole, strict=True)
    )
    assert (examples, cut) == encode_rows(tokenizer, rows(cfg), config(max_length=4096), positions=40)


def allowing(cfg, share):
    return replace(cfg, data=replace(cfg.data, allow_cut=share))


def test_more_cut_texts_than_allowed_are_an_error_that_says_what_would_do(tokenizer, config):
    whole, _ = encode_rows(tokenizer, rows(config()), config(max_length=4096))
    lengths = sorted(len(e.ids) for e in whole)
    cfg = config(max_length=lengths[-5] - 1)
    cut = sum(length > cfg.train.max_length for length in lengths)
    share = cut / len(lengths)
    assert encode_rows(tokenizer, rows(cfg), allowing(cfg, share))[1]["train/cut_examples"] == cut
    with pytest.raises(
        ConfigError, match=rf"{cut} of {len(lengths)} training.*train.max_length={lengths[-1]}"
    ):
        encode_rows(tokenizer, rows(cfg), allowing(cfg, share - 1e-6))
    with pytest.raises(ConfigError, match="a model that reads more"):
        encode_rows(tokenizer, rows(cfg), allowing(config(max_length=4096), 0), positions=16)


def test_a_row_with_nothing_of_its_question_beside_the_answer_is_left_out(tokenizer, config):
    """Of a task, and of an instruction file; an answer of more than all tokens, and one that just leaves the
    end of the template."""
    cfg = config(max_length=80)
    task = rows(cfg)[0]
    long = {**task, "choices": ["fox " * 90, "b", "c"], "label": 0}
    given = {"id": "i", "task": "", "mix": "m", "instruction": "Do it.", "input": "", "output": "so"}
    longer = {**given, "output": "so " * 16}
    (end,) = batches.encode(tokenizer, [mixes.pair(longer)], eos=True)
    kept = tokenizer.decode(end.last(80).prompt().ids)
    assert "Response" in kept and "Do it." not in kept, kept
    for good, bad in ((task, long), (given, longer)):
        examples, cut = encode_rows(tokenizer, [good, bad], cfg)
        assert examples == encode_rows(tokenizer, [good], cfg)[0] and cut["train/left_out"] == 1
        with pytest.raises(ConfigError, match="nothing of any question is left"):
            encode_rows(tokenizer, [bad], cfg)


def test_epochs_are_whole_passes(attached, tokenizer, config, tmp_path):
    cfg = config("lora", steps=None, epochs=0.5, batch_size=4, accumulation=2)
    result = train(attached("lora"), tokenizer, rows(cfg), cfg, tmp_path, resume=False, progress=False)
    assert result.metrics["train/steps"] == math.ceil(80 / 2 / 8)


def test_training_load_covers_every_site_and_token(attached, tokenizer, config, tmp_path):
    cfg = config("moe_lora_topk")
    model = attached("moe_lora_topk")
    result = train(model, tokenizer, rows(cfg), cfg, tmp_path, resume=False, progress=False)
    with torch.no_grad(), record(model) as rec:
        model(input_ids=torch.tensor([[5, 6, 7]]))
    assert {r["site"] for r in result.routing} == set(rec.routing)
    assert {(r["split"], r["task"]) for r in result.routing} == {("train", "own@local")}
    assert {r["tokens"] for r in result.routing} == {result.metrics["train/tokens"]}
    assert result.metrics["load/train_mean_active"] == pytest.approx(2)
    assert result.history[0]["load/mean_active"] == pytest.approx(2)


def test_a_rule_acts_once_a_step_however_the_batch_is_cut(attached, tokenizer, config, tmp_path):
    """moe_lora_bias with every router's bias moved by 1e-3 a step: after 3 steps no bias can have moved
    further, and recomputed layers and accumulated passes are counted once, so that all ways end with the same
    one."""
    found = []
    for more in ({}, {"batch_size": 2, "accumulation": 2}, {"gradient_checkpointing": True}):
        cfg = config("moe_lora_bias", **({"batch_size": 4, "steps": 3} | more))
        model = attached("moe_lora_bias")
        train(model, tokenizer, rows(cfg)[:24], cfg, tmp_path / str(len(found)), resume=False, progress=False)
        found.append({n: b.clone() for n, b in model.named_buffers() if "load_bias" in n})
    assert found[0] and any(b.any() for b in found[0].values())
    for biases in found:
        for bias in biases.values():
            steps = bias / 1e-3
            assert torch.allclose(steps, steps.round(), atol=1e-3) and steps.abs().max() <= 3.001
    assert_equal(found[2], found[0])
    alike = sum(int(torch.equal(found[1][n], b)) for n, b in found[0].items())
    assert alike >= 0.8 * len(found[0]), "sums in another order may turn a choice, not more"
