"""Evaluation: lm-eval in memory, with exact masks, per-example results, and expert load counted in a pass of its own.

`lm_eval.evaluator.evaluate` is the part of `simple_evaluate` that evaluates; the rest of it reseeds, describes git and the machine
(seconds), and indexes 13,000 task files.

Nothing that training depends on is changed: random states and the train/eval mode of every module are restored.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np
import torch
from lm_eval.evaluator import evaluate as lm_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tqdm import tqdm

from moabench.methods import record

from . import batches, tasks
from .batches import Example
from .meter import Meter

if TYPE_CHECKING:
    from .config import DataConfig, RunConfig


@dataclass(frozen=True)
class EvalResult:
    """metrics: `eval/<task>@<source>/<metric>` and `load/<measure>`; samples: an example each; routing: a site and expert each."""

    metrics: dict[str, float]
    samples: list[dict[str, Any]]
    routing: list[dict[str, Any]]


def evaluate(model, tokenizer, names: tuple[str, ...], cfg: RunConfig, progress: bool) -> EvalResult:
    """Accuracy of `model` on the reported split of each task, and its expert load on the same questions with the right answer."""
    with _undisturbed(model), _quiet():
        loaded = load_tasks(names, cfg.data)
        lm = MaskedLM(model, tokenizer, cfg.train.eval_batch_size, progress)
        results = lm_evaluate(lm, {"tasks": loaded}, bootstrap_iters=1)
        meters = _load(lm, {name: task.eval_docs for name, task in loaded.items()}, progress)
    metrics, samples, routing, total = {"eval/cut_requests": lm.cut}, [], [], Meter()
    for name in names:
        title, split = f"{name}@{cfg.data.source}", tasks.get(name).split
        metrics |= _metrics(f"eval/{title}", results["results"][name])
        samples += [_sample(record, title, split) for record in results["samples"][name]]
        routing += meters[name].rows(split, title)
        total.merge(meters[name])
    return EvalResult(metrics | {f"load/{name}": value for name, value in total.measures().items()}, samples, routing)


def load_tasks(names: tuple[str, ...], data: DataConfig) -> dict[str, Any]:
    """lm-eval's task objects, with their documents from `data`. Raises ConfigError for what `load_rows` refuses."""
    for name in names:
        tasks.get(name, "task.eval")
    metadata = {"source": data.source, "root": data.root, "eval_limit": data.eval_limit, "seed": data.seed}
    manager = TaskManager(include_path=str(tasks.FOLDER), include_defaults=False, metadata=metadata)
    loaded = manager.load(list(names))["tasks"]
    for task in loaded.values():
        task.set_config("num_fewshot", 0)
        task.set_fewshot_seed(0)
    return loaded


class MaskedLM(HFLM):
    """HFLM with our own log-likelihoods.

    lm-eval pads with token 0 and passes no mask, which moves every router that pools over a sequence. Here padding is masked,
    models that ask for it are told where the prompt ends, and only the columns of logits that are scored are computed.
    """

    def __init__(self, model, tokenizer, batch_size: int, progress: bool):
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, backend="causal")
        self.progress = progress
        self.cut = 0
        """Requests whose prompt lost its beginning because it is longer than the model reads."""

    def loglikelihood(self, requests, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        pairs = [request.args for request in requests]
        if any(not context for context, _ in pairs):
            return super().loglikelihood(requests, disable_tqdm=True)
        examples = batches.encode(self.tokenizer, pairs)
        return self._loglikelihood_tokens([(p, e.ids[: e.start], e.ids[e.start :]) for p, e in zip(pairs, examples, strict=True)])

    @torch.no_grad()
    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, override_bs: int | None = None) -> list[tuple[float, bool]]:
        """(log-likelihood, is greedy) of each (texts, context ids, continuation ids), in the order given."""
        inputs: dict[tuple[int, ...], list[int]] = {}  # what the model reads -> the requests that it answers
        wholes = [Example(list(context) + list(answer), len(context)).last(self.max_length + 1) for _, context, answer in requests]
        self.cut += sum(len(whole.ids) < len(r[1]) + len(r[2]) for whole, r in zip(wholes, requests, strict=True))
        for i, whole in enumerate(wholes):
            inputs.setdefault((whole.start, *whole.ids[:-1]), []).append(i)
        keys = list(inputs)
        found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        with tqdm(total=len(keys), desc="evaluate", unit="seq", disable=not self.progress or disable_tqdm) as bar:
            for chosen in batches.by_length([len(key) for key in keys], override_bs or self.batch_size):
                rows = [Example(list(keys[k][1:]), keys[k][0]) for k in chosen]
                scored = [(row, i) for row, k in enumerate(chosen) for i in inputs[keys[k]]]
                for (_, i), result in zip(scored, self._score(rows, [(row, wholes[i]) for row, i in scored]), strict=True):
                    found[i] = result
                bar.update(len(rows))
        return found

    def _score(self, rows: list[Example], requests: list[tuple[int, Example]]) -> list[tuple[float, bool]]:
        """(log-likelihood, is greedy) of each (row, whole text), from one forward over `rows`."""
        batch = batches.collate(rows, self.tokenizer.pad_token_id or 0)
        logits = batches.forward(self.model, batch, batch["kept"])
        first = batch["input_ids"].shape[1] - batch["kept"]  # column of the first logits kept
        spans = [range(row.start - 1, len(row.ids)) for row in rows]
        where = torch.tensor([(r, p - first) for r, span in enumerate(spans) for p in span], device=logits.device)
        scores = logits[where[:, 0], where[:, 1]].float().log_softmax(-1)  # [scored positions, vocabulary]
        offsets = np.cumsum([0] + [len(span) for span in spans])
        index = [offsets[row] + j for row, whole in requests for j in range(len(whole.ids) - whole.start)]
        index = torch.tensor(index, device=logits.device)
        targets = torch.tensor([t for _, whole in requests for t in whole.ids[whole.start :]], device=logits.device)
        picked = torch.stack([scores[index, targets], (scores.argmax(-1)[index] == targets).float()]).double().cpu()
        lengths = [len(whole.ids) - whole.start for _, whole in requests]
        return [(float(part[0].sum()), bool(part[1].all())) for part in picked.split(lengths, dim=1)]


@torch.no_grad()
def _load(lm: MaskedLM, docs: dict[str, Iterable[dict]], progress: bool) -> dict[str, Meter]:
    """Expert load per task on prompt and right answer of every document; empty for a model without routers."""
    meters, work = {name: Meter() for name in docs}, []
    for name, rows in docs.items():
        pairs = [(tasks.get(name).prompt(row), tasks.get(name).answer(row)) for row in rows]
        examples = [example.last(lm.max_length) for example in batches.encode(lm.tokenizer, pairs)]
        work += [(name, [examples[i] for i in chunk]) for chunk in batches.by_length([len(e.ids) for e in examples], lm.batch_size)]
    for name, chunk in tqdm(work, desc="expert load", unit="batch", disable=not progress, leave=False):
        batch = batches.collate(chunk, lm.tokenizer.pad_token_id or 0)
        with record(lm.model) as rec:
            batches.forward(lm.model, batch, kept=1)
        if not rec.routing:
            break
        meters[name].update(rec.routing, batch["input_ids"].shape)
    return meters


def _metrics(prefix: str, result: dict[str, Any]) -> dict[str, float]:
    """lm-eval's "acc,none" and "acc_stderr,none" as `<prefix>/acc` and `<prefix>/acc_stderr`."""
    numbers = {key.partition(",")[0]: value for key, value in result.items() if "," in key}
    return {f"{prefix}/{name}": float(value) for name, value in numbers.items() if isinstance(value, (int, float))}


def _sample(record: dict[str, Any], title: str, split: str) -> dict[str, Any]:
    doc, scores = record["doc"], [response[0] for response in record["filtered_resps"]]
    normed = [score / len(choice) for score, choice in zip(scores, doc["choices"], strict=True)]
    return {
        "task": title,
        "split": split,
        "doc_id": doc["id"],
        "question": doc["question"],
        "choices": list(doc["choices"]),
        "label": int(record["target"]),
        "prediction": int(np.argmax(scores)),
        "prediction_norm": int(np.argmax(normed)),
        "loglikelihoods": scores,
        "correct": bool(record["acc"]),
        "correct_norm": bool(record["acc_norm"]),
        "skill": doc.get("skill"),
        "domain": doc.get("domain"),
    }


@contextmanager
def _undisturbed(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode inside; random states and each module's own mode as before afterwards (lm-eval draws from them)."""
    modes = {module: module.training for module in model.modules()}
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if cuda:
            torch.cuda.set_rng_state_all(cuda)


@contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval warns about what we do on purpose (a model in memory, a callable data set), and has a bar that no switch stops."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with mock.patch("lm_eval.api.task.tqdm", lambda iterable, **_: iterable):
            yield
    finally:
        logger.setLevel(level)
