"""Evaluation: lm-eval in memory under one of three protocols, with per-example results, and expert load
counted in a pass of its own.

    loglikelihood   the task's multiple choice: log-likelihoods of whole choices, plain and divided by length
                    (acc, acc_norm)
    label           the same over the letters of the choices (acc)
    generate        greedy response, extracted as the papers do (acc) and strictly (acc_strict)

What is asked comes from a task's `Form`; lm-eval's evaluator asks and aggregates.
`lm_eval.evaluator.evaluate` is the part of `simple_evaluate` that evaluates; the rest of it reseeds,
describes git and the machine (seconds), and indexes 13,000 task files.

Nothing that training depends on is changed: random states and the train/eval mode of every module are
restored.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate as lm_evaluate
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm

from moabench.benchmarks import tasks
from moabench.benchmarks.data import batches, cache, cuts
from moabench.benchmarks.data.batches import Example
from moabench.benchmarks.machine.globals import undisturbed
from moabench.benchmarks.observing import load_measures
from moabench.benchmarks.observing.load import LoadCounts
from moabench.benchmarks.observing.load_measures import Choices
from moabench.benchmarks.tasks import scorers
from moabench.benchmarks.tasks.documents import Documents
from moabench.benchmarks.tasks.rows import Reader
from moabench.methods import record
from moabench.methods.spec import ConfigError

from .generation import generate
from .scoring import Score, log_likelihoods

if TYPE_CHECKING:
    from moabench.benchmarks.config.run import RunConfig
    from moabench.benchmarks.tasks import Form

Row = dict[str, Any]


@dataclass(frozen=True)
class EvalResult:
    """metrics: `eval/<title>/<metric>` (title: task@source:protocol), `load/`, `routing/` and
    `specialisation/<measure>`; samples: an example each (`_sample`); routing: a task, skill, site and expert
    each; matrices: co-activation, an entry each."""

    metrics: dict[str, float]
    samples: list[Row]
    routing: list[Row]
    matrices: list[Row]


def evaluate(
    model,
    tokenizer,
    names: tuple[str, ...],
    cfg: RunConfig,
    progress: bool,
    skills: tuple[str, ...] = (),
    reader: Reader | None = None,
) -> EvalResult:
    """Accuracy of `model` on the reported split of each task, and its expert load on the same questions with
    the right answer.

    skills: names in the order of their numbers; a model that is told the skill of a question gets the number,
    -1 if it is not among them. reader: the rows, where they have been read before. Raises ConfigError for
    what cannot be had from the source under `cfg.protocol`.
    """
    with undisturbed(model), _quiet():
        loaded = load_tasks(names, reader or Reader(cfg.data), cfg.protocol)
        encode = partial(
            cache.encoded, Path(cfg.runs_dir).expanduser() / ".cache", eos=False, encode=batches.encode
        )
        size, allowed = cfg.train.eval_batch_size, cfg.data.allow_cut
        lm = MaskedLM(model, tokenizer, size, progress, skills, encode, allowed)
        results = lm_evaluate(lm, {"tasks": dict(loaded)}, bootstrap_iters=1)
        load = _load(lm, loaded, progress)
    metrics, samples, routing, total = {}, [], [], LoadCounts()
    metrics |= {"eval/requests": lm.asked, "eval/cut_requests": lm.cut}
    for name, task in loaded.items():
        title = tasks.title(name, cfg.data.title, task.form.protocol)
        metrics |= _metrics(f"eval/{title}", results["results"][name])
        own = [_sample(record, task.form, title) for record in results["samples"][name]]
        metrics |= {f"eval/{title}/{s}": scorers.get(s).score(own) for s in task.form.task.scorers}
        samples += own
        whole = LoadCounts()
        for skill, meter in load.meters[name].items():
            whole.merge(meter)
            routing += (
                load_measures.rows(meter, task.form.task.split, title, skill) if skill is not None else []
            )
        routing += load_measures.rows(whole, task.form.task.split, title)
        total.merge(whole)
    metrics |= load_measures.measures(total) | load.choices.measures()
    return EvalResult(metrics, samples, routing, load_measures.coactivation(total, step=0))


def load_tasks(names: Sequence[str], reader: Reader, protocol: str = "native") -> dict[str, FormTask]:
    """lm-eval's task objects by name, with the rows of the reported split. Raises ConfigError for what cannot
    be had."""
    loaded, data = {}, reader.data
    for name in names:
        task = tasks.get(name)
        if reason := task.unavailable(data.source, protocol):
            raise ConfigError(f"task {name} with data.source={data.source}, protocol={protocol}: {reason}.")
        loaded[name] = FormTask(task.form(protocol), reader.reported(name), task.tokens(data.source))
    return loaded


class FormTask(ConfigurableTask):
    """One form over given rows, as a task of lm-eval. tokens: most of a generated answer."""

    def __init__(self, form: Form, rows: list[Row], tokens: int):
        self.form, self.tokens = form, tokens
        self.compares = form.extraction is None
        metrics = (
            ("acc", "acc_norm")
            if form.protocol == "loglikelihood"
            else ("acc",)
            if self.compares
            else ("acc", "acc_strict")
        )
        super().__init__(
            config={
                "task": form.task.name,
                "custom_dataset": lambda **_: {"test": Documents(rows)},
                "test_split": "test",
                "output_type": "multiple_choice" if self.compares else "generate_until",
                "doc_to_text": form.prompt,
                "doc_to_target": form.answer,
                "process_results": self._compared if self.compares else self._extracted,
                "metric_list": [
                    {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in metrics
                ],
                "num_fewshot": 0,
                "metadata": {"version": form.task.facts["version"]},
            }
        )

    def construct_requests(self, doc: Row, ctx: str, metadata=None, **_: Any) -> list[Instance]:
        """What a row asks; `ctx`, the prompt as lm-eval made it, is the form's own."""
        if self.compares:
            return [
                Instance("loglikelihood", doc, pair, i, metadata)
                for i, pair in enumerate(self.form.requests(doc))
            ]
        return [
            Instance("generate_until", doc, (ctx, {"until": [], "max_gen_toks": self.tokens}), 0, metadata)
        ]

    def _compared(self, doc: Row, results: list[Score]) -> dict[str, float]:
        best, normed = _best([score for score, _ in results], self.form.lengths(doc))
        found = {"acc": float(best == doc["label"]), "acc_norm": float(normed == doc["label"])}
        return {name: found[name] for name in self._metric_fn_list}

    def _extracted(self, doc: Row, results: list[str]) -> dict[str, float]:
        paper, strict = self.form.extract(results[0], doc)
        return {
            "acc": float(self.form.correct(paper, doc)),
            "acc_strict": float(self.form.correct(strict, doc)),
        }


def _best(scores: Sequence[float], lengths: Sequence[int]) -> tuple[int, int]:
    """The choice with the highest log-likelihood, and that with the highest one a character; the first of
    equals, as in lm-eval."""
    return int(np.argmax(scores)), int(np.argmax(np.array(scores) / np.array(lengths)))


class MaskedLM(HFLM):
    """HFLM with our own log-likelihoods and generation.

    lm-eval pads with token 0 and passes no mask, which moves every router that pools over a sequence. Here
    padding is masked, models that ask for it are told where the prompt ends and what the skill is, and
    prompts are read once where that saves time.

    encode: what turns (prompt, answer) pairs into tokens; a cache may stand here. allow_cut: share of a
    task's prompts that may be longer than the model reads.
    """

    def __init__(
        self,
        model,
        tokenizer,
        batch_size: int,
        progress: bool,
        skills: tuple[str, ...] = (),
        encode: Callable[..., list[Example]] = batches.encode,
        allow_cut: float = 1.0,
    ):
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, backend="causal")
        self.progress, self.encode, self.allow_cut = progress, encode, allow_cut
        self.skill_ids = {name: number for number, name in enumerate(skills)}
        self.asked = self.cut = 0
        """Requests, and those whose prompt lost its beginning because it is longer than the model reads."""

    def examples(self, pairs: Sequence[tuple[str, str]], docs: Iterable[Row]) -> list[Example]:
        """(prompt, answer) pairs as tokens, with the skill of the document that each belongs to."""
        encoded = self.encode(self.tokenizer, pairs)
        batches.check_ids(self.model, encoded)
        found = zip(encoded, docs, strict=True)
        return [replace(e, skill=self.skill_ids.get(doc.get("skill"), -1)) for e, doc in found]

    def _at_most(
        self, examples: list[Example], length: int, requests: Sequence[Instance] = ()
    ) -> list[Example]:
        """Examples of at most `length` tokens. requests: what each is of; ConfigError where too many of a
        task are cut, or nothing of a question is left."""
        found = [e.last(length) for e in examples]
        long = [i for i, e in enumerate(examples) if len(e.ids) > length]
        self.asked, self.cut = self.asked + len(examples), self.cut + len(long)
        if long and requests:
            self._check_cut(examples, found, long, length, requests)
        return found

    def _check_cut(
        self,
        whole: list[Example],
        found: list[Example],
        long: list[int],
        length: int,
        requests: Sequence[Instance],
    ) -> None:
        names = [request.doc.get("task") for request in requests]
        for i in filter(lambda i: names[i], long):
            row, longest = requests[i].doc, len(whole[i].ids) + self.max_length - length
            if cuts.question_is_lost(self.tokenizer, row, requests[i].args[0], found[i]):
                raise ConfigError(
                    f"task {names[i]}, row {row['id']}: nothing of the question is left in the "
                    f"{self.max_length:,} tokens that the model reads; expected a model that reads "
                    f"{longest:,}, or a shorter question."
                )
        for name in dict.fromkeys(names[i] for i in long if names[i]):
            longest = max(len(whole[i].ids) for i in long if names[i] == name) + self.max_length - length
            cut = sum(names[i] == name for i in long)
            what, remedy = f"prompts of {name}", f"a model that reads {longest:,}"
            cuts.check_share(cut, names.count(name), self.allow_cut, what, length, remedy)

    def loglikelihood(self, requests, disable_tqdm: bool = False) -> list[Score]:
        pairs = [request.args for request in requests]
        if any(not context for context, _ in pairs):  # lm-eval puts an end token in its place
            return super().loglikelihood(requests, disable_tqdm=True)
        examples = self.examples(pairs, [request.doc for request in requests])
        return self._scores(examples, disable_tqdm, requests)

    def _loglikelihood_tokens(
        self, requests, disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[Score]:
        """(log-likelihood, is greedy) of each (texts, context ids, continuation ids), in the order given."""
        examples = [Example([*context, *answer], len(context)) for _, context, answer in requests]
        return self._scores(examples, disable_tqdm)

    def _scores(self, examples: list[Example], quiet: bool, requests: Sequence[Instance] = ()) -> list[Score]:
        # the last token is scored, not read
        examples = self._at_most(examples, self.max_length + 1, requests)
        return log_likelihoods(
            self.model,
            examples,
            self.tokenizer.pad_token_id or 0,
            self.batch_size,
            self.progress and not quiet,
        )

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """Greedy continuations; `until` and `max_gen_toks` of a request are heeded, a temperature is not."""
        groups: dict[tuple, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault((request.args[1]["max_gen_toks"], tuple(request.args[1]["until"])), []).append(
                i
            )
        texts = [""] * len(requests)
        for (tokens, until), chosen in groups.items():
            room = max(1, self.max_length - tokens)
            pairs = [batches.to_continue(requests[i].args[0]) for i in chosen]
            asked = [requests[i] for i in chosen]
            prompts = [e.prompt() for e in self.examples(pairs, [request.doc for request in asked])]
            prompts = self._at_most(prompts, room, asked)
            show = self.progress and not disable_tqdm
            for i, text in zip(
                chosen,
                generate(self.model, self.tokenizer, prompts, tokens, until, self.batch_size, show),
                strict=True,
            ):
                texts[i] = text
        return texts


@dataclass
class Load:
    """What the routers decided: by task and skill over tokens, and for each sequence."""

    meters: dict[str, dict[str | None, LoadCounts]]
    choices: Choices


@torch.no_grad()
def _load(lm: MaskedLM, loaded: dict[str, FormTask], progress: bool) -> Load:
    """Expert load on prompt and right answer of every document; empty for a model without routers. A batch
    holds one skill of a task."""
    load, work = Load({name: {} for name in loaded}, Choices()), []
    for name, task in loaded.items():
        pairs = [(task.form.prompt(row), task.form.answer(row)) for row in task.eval_docs]
        groups: dict[str | None, list[Example]] = {}
        for example, row in zip(lm.examples(pairs, task.eval_docs), task.eval_docs, strict=True):
            groups.setdefault(row.get("skill"), []).append(example.last(lm.max_length))
        for skill, examples in groups.items():
            lengths = [len(e.ids) for e in examples]
            work += [
                (name, skill, [examples[i] for i in chunk])
                for chunk in batches.by_length(lengths, lm.batch_size)
            ]
    for name, skill, chunk in tqdm(work, desc="expert load", unit="batch", disable=not progress, leave=False):
        batch = batches.collate(chunk, lm.tokenizer.pad_token_id or 0)
        with record(lm.model) as rec:
            batches.forward(lm.model, batch, kept=1)
        if not rec.routing:
            break
        shape = tuple(batch["input_ids"].shape)
        load.meters[name].setdefault(skill, LoadCounts(pairs=True)).update(rec.routing, shape)
        load.choices.add(rec.routing, shape, [name] * len(chunk), [skill] * len(chunk))
    return load


def _metrics(prefix: str, result: Row) -> dict[str, float]:
    """lm-eval's "acc,none" and "acc_stderr,none" as `<prefix>/acc` and `<prefix>/acc_stderr`."""
    numbers = {key.partition(",")[0]: value for key, value in result.items() if "," in key}
    return {
        f"{prefix}/{name}": float(value) for name, value in numbers.items() if isinstance(value, (int, float))
    }


def _sample(record: Row, form: Form, title: str) -> Row:
    """One example, with the same keys under every protocol; None where a protocol has no such thing.

    label and prediction* are numbers of choices, extracted* the answer found in `response`, in the protocol's
    words. _norm: by log-likelihood a character; _strict: by the strict extraction.
    """
    doc = record["doc"]
    choices = doc.get("choices")
    found: Row = {
        "prediction_norm": None,
        "prediction_strict": None,
        "response": None,
        "extracted": None,
        "extracted_strict": None,
    }
    if form.extraction is None:
        scores = [score for score, _ in record["filtered_resps"]]
        found["prediction"], normed = _best(scores, form.lengths(doc))
        found |= {"loglikelihoods": scores} | ({"prediction_norm": normed} if "acc_norm" in record else {})
    else:
        response = record["filtered_resps"][0]
        paper, strict = form.extract(response, doc)
        found |= {
            "response": response,
            "extracted": paper,
            "extracted_strict": strict,
            "loglikelihoods": None,
        }
        found |= {"prediction": _choice(form, doc, paper), "prediction_strict": _choice(form, doc, strict)}
    return {
        "task": title,
        **form.names,
        "split": form.task.split,
        "doc_id": doc["id"],
        "question": doc["question"],
        "context": doc.get("context"),
        "choices": list(choices) if choices else None,
        "label": doc.get("label"),
        "answer": choices[doc["label"]] if form.task.kind == "choices" else doc["answer"],
        **found,
        "correct": bool(record["acc"]),
        "correct_norm": bool(record["acc_norm"]) if "acc_norm" in record else None,
        "correct_strict": bool(record["acc_strict"]) if "acc_strict" in record else None,
        "skill": doc.get("skill"),
        "domain": doc.get("domain"),
    }


def _choice(form: Form, doc: Row, extracted: str | None) -> int | None:
    """The choice that an extracted answer names; None where answers are free."""
    if form.extraction == "number" or extracted is None:
        return None
    return next((i for i in range(len(doc["choices"])) if form.correct(extracted, {**doc, "label": i})), None)


@contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval warns about what we do on purpose (a model in memory, a callable data set), and has a bar that
    no switch stops."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with mock.patch("lm_eval.api.task.tqdm", lambda iterable, **_: iterable):
            yield
    finally:
        logger.setLevel(level)
