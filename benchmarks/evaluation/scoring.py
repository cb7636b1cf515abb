"""Log-likelihoods of answers, from as few tokens as the requests allow.

The answers to one question share its prompt. Where that pays, the prompt runs once and the answers continue
on copies of its KV cache; a router that decides once a sequence then decides at the prompt, as it does when
the whole text is read. Where it does not pay (short prompts, long answers, few of them), and for models whose
cache is more than keys and values, whole texts are read. Which way a question goes depends on the question
and the model alone, so that results do not depend on the batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from moabench.benchmarks.data import batches
from moabench.benchmarks.data.batches import Example

Score = tuple[float, bool]
"""Log-likelihood of an answer, and whether every token of it is the most likely one."""

RAGGED = 1.25
"""What sharing adds by padding: prompts and answers of a batch are padded apart, whole texts together (real
tasks: 1.2 to 1.5)."""


@dataclass
class Question:
    """Requests with one prompt. rows: what the model reads of an answer (all but its last token) -> the
    requests that it answers."""

    prompt: list[int]
    skill: int
    rows: dict[tuple[int, ...], list[int]] = field(default_factory=dict)

    def shares(self) -> bool:
        """True where the prompt once and the answers on its cache are fewer tokens, with their padding, than
        every whole text."""
        lengths = [len(row) for row in self.rows]
        whole = len(lengths) * len(self.prompt) + sum(lengths)
        return RAGGED * (len(self.prompt) + len(lengths) * max(lengths)) < whole


@torch.no_grad()
def log_likelihoods(
    model, examples: Sequence[Example], pad: int, batch_size: int, progress: bool = False
) -> list[Score]:
    """The score of each example's answer, in the order given. At most `batch_size` sequences run at a time,
    or one question's answers."""
    questions: dict[tuple, Question] = {}
    for i, e in enumerate(examples):
        key = (e.skill, *e.ids[: e.start])
        question = questions.setdefault(key, Question(e.ids[: e.start], e.skill))
        question.rows.setdefault(tuple(e.ids[e.start : -1]), []).append(i)
    shared = {key for key, question in questions.items() if question.shares()}
    if shared and (reads_ahead(model) or not splits(_cache(model, questions[min(shared)], pad))):
        shared = set()
    together = [question for key, question in questions.items() if key in shared]
    apart = [
        (question, row) for key, question in questions.items() if key not in shared for row in question.rows
    ]
    found: list[Score] = [(0.0, False)] * len(examples)
    with tqdm(total=len(examples), desc="evaluate", unit="answer", disable=not progress) as bar:
        for chosen in batches.by_length([len(q.prompt) + len(row) for q, row in apart], batch_size):
            _apart(model, [apart[k] for k in chosen], examples, pad, found)
            bar.update(sum(len(apart[k][0].rows[apart[k][1]]) for k in chosen))
        for some in _by_rows(together, batch_size):
            _together(model, some, examples, pad, found)
            bar.update(sum(len(asked) for q in some for asked in q.rows.values()))
    return found


def reads_ahead(model) -> bool:
    """True for a model whose router pools over the answer too, so that no cache of the prompt can serve it
    (pool=official_mean)."""
    config = getattr(model, "peft_config", {}).get(getattr(model, "active_adapter", None))
    mixtures = config.method.mixtures if hasattr(config, "method") else ()
    return any(
        m.routed and m.router.granularity == "sequence" and m.router.pool == "official_mean" for m in mixtures
    )


def splits(cache: Any) -> bool:
    """True for a cache that holds nothing but keys and values by row and place: its rows can be taken apart,
    and several tokens at once go on from it. Layers with a state of their own (Mamba, short convolutions,
    gated delta nets, compressed keys) can do neither, or not rightly."""
    plain = (DynamicLayer, DynamicSlidingWindowLayer)
    return type(cache) is DynamicCache and all(type(layer) in plain for layer in cache.layers)


def _cache(model, question: Question, pad: int) -> Any:
    """The cache of a prompt of one token: of what kind they are."""
    batch = batches.collate_prompts([question.prompt[:1]], [question.skill], pad)
    return model(**batches.inputs(model, batch), logits_to_keep=1, use_cache=True).past_key_values


def _by_rows(questions: list[Question], size: int) -> Iterator[list[Question]]:
    """Questions in batches of at most `size` answers (one question at least), longest first.

    Answers alike in length to a third come together, since there are several for each prompt, and among those
    prompts alike.
    """

    def longest(q: Question) -> tuple[int, int]:
        return -int(math.log(1 + max(map(len, q.rows)), 1.3)), -len(q.prompt)

    batch, rows = [], 0
    for question in sorted(questions, key=longest):
        if batch and rows + len(question.rows) > size:
            yield batch
            batch, rows = [], 0
        batch.append(question)
        rows += len(question.rows)
    if batch:
        yield batch


def _apart(
    model,
    rows: list[tuple[Question, tuple[int, ...]]],
    examples: Sequence[Example],
    pad: int,
    found: list[Score],
) -> None:
    """Scores from one pass over whole texts."""
    batch = batches.collate([Example(q.prompt + list(row), len(q.prompt), q.skill) for q, row in rows], pad)
    logits = batches.forward(model, batch, batch["kept"])
    first = batch["input_ids"].shape[1] - batch["kept"]  # column of the first logits kept
    places = [(r, len(q.prompt) - 1 - first, len(row) + 1) for r, (q, row) in enumerate(rows)]
    where = [(r, start + j) for r, start, length in places for j in range(length)]
    _score(_at(logits, where), [(len(row) + 1, q.rows[row]) for q, row in rows], examples, found)


def _together(
    model, questions: list[Question], examples: Sequence[Example], pad: int, found: list[Score]
) -> None:
    """Scores from one pass over prompts and one over the answers that have more than one token."""
    batch = batches.collate_prompts([q.prompt for q in questions], [q.skill for q in questions], pad)
    rows = [(g, row) for g, q in enumerate(questions) for row in q.rows]
    longer = [(g, row) for g, row in rows if row]
    out = model(**batches.inputs(model, batch), logits_to_keep=1, use_cache=bool(longer))
    parts = {
        (g, row): [scores]
        for (g, row), scores in zip(rows, _at(out.logits, [(g, 0) for g, _ in rows]).split(1), strict=True)
    }
    if longer:
        owner = torch.tensor([g for g, _ in longer])
        out.past_key_values.batch_select_indices(owner.to(out.logits.device))
        more = continuation(batch, owner, [row for _, row in longer], pad)
        logits = model(
            **batches.inputs(model, more), past_key_values=out.past_key_values, use_cache=True
        ).logits
        scores = _at(logits, [(r, j) for r, (_, row) in enumerate(longer) for j in range(len(row))])
        for key, part in zip(longer, scores.split([len(row) for _, row in longer]), strict=True):
            parts[key].append(part)
    scores = torch.cat([part for row in rows for part in parts[row]])
    _score(scores, [(len(row) + 1, questions[g].rows[row]) for g, row in rows], examples, found)


def continuation(
    batch: dict[str, Tensor], owner: Tensor, rows: Sequence[Sequence[int]], pad: int
) -> dict[str, Tensor]:
    """The batch that goes on from the cache of prompts `batch`: R rows of tokens, each after the prompt owner
    [R], padded on the right."""
    length = max(map(len, rows))
    real = torch.arange(length) < torch.tensor([[len(row)] for row in rows])
    mask = batch["attention_mask"][owner]
    return {
        "input_ids": torch.tensor([list(row) + [pad] * (length - len(row)) for row in rows]),
        "attention_mask": torch.cat([mask, real.long()], 1),
        "position_ids": mask.sum(1, keepdim=True) + torch.arange(length),
        "prompt_mask": torch.zeros_like(real),
        "skill_ids": batch["skill_ids"][owner],
    }


def _at(logits: Tensor, where: list[tuple[int, int]]) -> Tensor:
    """Log-probabilities [N, V], fp32, at N (row, column) places of logits [B, L, V]."""
    index = torch.tensor(where, device=logits.device)
    return logits[index[:, 0], index[:, 1]].float().log_softmax(-1)


def _score(
    scores: Tensor, rows: list[tuple[int, list[int]]], examples: Sequence[Example], found: list[Score]
) -> None:
    """Fills `found` from scores [N, V], row after row; rows: how many places each has, and the requests that
    it answers."""
    first = [0, *accumulate(places for places, _ in rows)]
    requests = [(i, first[r]) for r, (_, asked) in enumerate(rows) for i in asked]
    answers = [examples[i].ids[examples[i].start :] for i, _ in requests]
    index = [
        begin + j for (_, begin), answer in zip(requests, answers, strict=True) for j in range(len(answer))
    ]
    index = torch.tensor(index, device=scores.device)
    targets = torch.tensor([token for answer in answers for token in answer], device=scores.device)
    picked = torch.stack(
        [scores[index, targets].double(), (scores.argmax(-1)[index] == targets).double()]
    ).cpu()
    batches.check_numbers(bool(picked.isnan().any()))
    for (i, _), part in zip(requests, picked.split([len(answer) for answer in answers], dim=1), strict=True):
        found[i] = float(part[0].sum()), bool(part[1].all())
