"""Token batches for training and evaluation: encoded as lm-eval encodes, padded on the right, masked exactly."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Example:
    """Token ids; those from `start` on are the answer."""

    ids: list[int]
    start: int

    def last(self, length: int) -> Example:
        """At most `length` tokens: the beginning of a long prompt is cut, the answer is kept."""
        cut = max(0, len(self.ids) - length)
        return Example(self.ids[cut:], max(1, self.start - cut)) if cut else self


def encode(tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]], eos: bool = False) -> list[Example]:
    """(prompt, answer) pairs as tokens; `eos` ends each answer with the tokenizer's end token.

    As lm-eval does: blanks at the end of a prompt go to the answer; the whole text is encoded, and the answer is what follows as
    many tokens as the prompt alone has. Each distinct text is encoded once, in one batch.
    """
    moved = [(p.rstrip(), p[len(p.rstrip()) :] + a) for p, a in pairs]
    texts = list(dict.fromkeys(text for p, a in moved for text in (p, p + a)))
    ids = dict(zip(texts, tokenizer(texts, verbose=False)["input_ids"], strict=True))
    end = [tokenizer.eos_token_id] if eos and tokenizer.eos_token_id is not None else []
    return [Example(ids[p + a] + end, len(ids[p])) for p, a in moved]


def collate(examples: Sequence[Example], pad: int) -> dict[str, Tensor | int]:
    """[B, L] tensors: input_ids, attention_mask, labels (-100 on prompt and padding), prompt_mask (True on prompt tokens).

    And `kept`, a number: how many of the last columns a loss over the answers reads (a token is predicted one column before it).
    """
    length = max(len(e.ids) for e in examples)
    ids = torch.tensor([e.ids + [pad] * (length - len(e.ids)) for e in examples])
    position = torch.arange(length)
    real = position < torch.tensor([[len(e.ids)] for e in examples])
    prompt = position < torch.tensor([[e.start] for e in examples])
    return {
        "input_ids": ids,
        "attention_mask": real.long(),
        "labels": ids.masked_fill(prompt | ~real, -100),
        "prompt_mask": prompt & real,
        "kept": length - min(e.start for e in examples) + 1,
    }


def forward(model: torch.nn.Module, batch: dict[str, Tensor], kept: int, inner: torch.nn.Module | None = None) -> Tensor:
    """Logits [B, kept, V] of the last `kept` columns. The mask of prompt tokens goes to models that say they accept one.

    inner: the model inside, where `model` is a wrapper for several processes.
    """
    keys = ["input_ids", "attention_mask"] + ["prompt_mask"] * bool(getattr(inner or model, "accepts_prompt_mask", False))
    inputs = {key: batch[key].to(_device(model)) for key in keys}
    return model(**inputs, logits_to_keep=kept, use_cache=False).logits


def _device(model: torch.nn.Module) -> torch.device:
    return next(model.parameters()).device


def by_length(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Indices in batches of `size`, longest first, so that little is padded and a batch that does not fit fails at once."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    return [order[i : i + size] for i in range(0, len(order), size)]


def training_order(lengths: Sequence[int], batch: int, steps: int, seed: int) -> list[int]:
    """Indices of `steps * batch` examples: whole shuffled passes over the data, similar lengths in one batch.

    A pure function of its arguments, so a resumed run sees what the uninterrupted one sees. The shuffled stream is cut into pools of
    50 batches; each pool is sorted by length and its batches shuffled, so that batches still come in random order.
    """
    rng, stream, order = random.Random(seed), [], []
    while len(stream) < steps * batch:
        stream += rng.sample(range(len(lengths)), len(lengths))
    for i in range(0, steps * batch, 50 * batch):
        pool = sorted(stream[i : min(i + 50 * batch, steps * batch)], key=lambda index: -lengths[index])
        groups = [pool[j : j + batch] for j in range(0, len(pool), batch)]
        order += [index for group in rng.sample(groups, len(groups)) for index in group]
    return order
