"""Token batches for training and evaluation: encoded as lm-eval encodes, masked exactly, and handed to models
that may want to know more.

Texts are padded on the right, prompts that something will follow on the left: what follows then stands beside
its prompt, as in a batch of one, whatever a model makes of distances (sliding windows, learned positions).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moabench.benchmarks.machine.files import RunError
from moabench.methods.spec import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Example:
    """Token ids; those from `start` on are the answer. skill: number of what must be done, for routers that
    are told; -1: not known."""

    ids: list[int]
    start: int
    skill: int = -1

    def last(self, length: int) -> Example:
        """At most `length` tokens: the beginning of a long prompt is cut, the answer is kept."""
        cut = max(0, len(self.ids) - length)
        return replace(self, ids=self.ids[cut:], start=max(1, self.start - cut)) if cut else self

    def prompt(self) -> Example:
        """Without the answer."""
        return replace(self, ids=self.ids[: self.start])


def encode(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]], eos: bool = False
) -> list[Example]:
    """(prompt, answer) pairs as tokens; `eos` ends each answer with the tokenizer's end token. Raises
    ConfigError where it has none.

    The whole text is encoded, and the prompt is those tokens that it begins with when encoded alone. Where it
    ends in blanks, it is those that it has before any answer: most tokenizers join the last blank with a word
    that follows, some not with a number, and training and generation must go on from the same token. lm-eval
    gives all such blanks to the answer; otherwise it cuts where this does, but for tokens that reach over the
    end of a prompt. Each distinct text is encoded once, in one batch.
    """
    if eos and tokenizer.eos_token_id is None:
        raise ConfigError(
            f"model.path: the tokenizer ({tokenizer.name_or_path or type(tokenizer).__name__}) has no end "
            "token, so that no trained answer would end; expected eos_token in its tokenizer_config.json."
        )
    probes = {prompt: prompt + PROBE for prompt, _ in pairs if prompt[-1:].isspace()}
    texts = list(dict.fromkeys(text for p, a in pairs for text in (p, p + a, probes.get(p, p))))
    ids = dict(zip(texts, tokens(tokenizer, texts), strict=True))
    end = [tokenizer.eos_token_id] if eos else []
    kept = {p: ids[p][: _common(ids[p], ids[probes.get(p, p)])] for p in dict.fromkeys(p for p, _ in pairs)}
    return [Example(ids[p + a] + end, _common(kept[p], ids[p + a])) for p, a in pairs]


def tokens(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """The ids of each text with what the tokenizer puts before it (a beginning token), without what it puts
    after it (some append an end token): texts go on."""
    if not texts:
        return []
    whole, bare = (tokenizer(PROBE, add_special_tokens=special)["input_ids"] for special in (True, False))
    before = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), None)
    if before is None:
        raise ConfigError(
            f"model.path: the tokenizer ({tokenizer.name_or_path or type(tokenizer).__name__}) changes the "
            "tokens of a text when it adds its own; expected them before and after the text."
        )
    after = len(whole) - before - len(bare)
    found = tokenizer(list(texts), verbose=False)["input_ids"]
    return [ids[: len(ids) - after] for ids in found] if after else found


def positions(model: torch.nn.Module) -> int | None:
    """Most tokens that the model reads, as its config says; None where it says nothing."""
    config = model.config.get_text_config()
    names = ("n_positions", "max_position_embeddings", "n_ctx")
    return next((found for name in names if (found := getattr(config, name, None))), None)


def check_ids(model: torch.nn.Module, examples: Sequence[Example]) -> None:
    """ConfigError for a token that the model's embedding has no row of."""
    rows = model.get_input_embeddings().num_embeddings
    largest = max((max(e.ids, default=0) for e in examples), default=0)
    if largest >= rows:
        raise ConfigError(
            f"model.path: the tokenizer gives token {largest}, and the model's embedding has {rows} rows; "
            "expected the tokenizer that belongs to the model."
        )


PROBE = "a"
"""The beginning of an answer that is not known yet."""


def to_continue(prompt: str) -> tuple[str, str]:
    """The pair whose prompt, as `encode` has it, a model continues."""
    return prompt, PROBE if prompt[-1:].isspace() else f" {PROBE}"


def encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[Example]:
    """Prompts for a model to continue: the tokens that `encode` has before an answer."""
    return [e.prompt() for e in encode(tokenizer, [to_continue(prompt) for prompt in prompts])]


def _common(one: list[int], other: list[int]) -> int:
    """How many tokens two texts begin with in common."""
    if other[: len(one)] == one:
        return len(one)
    return next(i for i, (a, b) in enumerate(zip([*one, None], [*other, None], strict=False)) if a != b)


def collate(examples: Sequence[Example], pad: int) -> dict[str, Tensor | int]:
    """[B, L] tensors: input_ids, attention_mask, labels (-100 on prompt and padding), prompt_mask (True on
    prompt tokens).

    Also skill_ids [B] (-1: not known), and `kept`, a number: how many of the last columns a loss over the
    answers reads (a token is predicted one column before it).
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
        "skill_ids": torch.tensor([e.skill for e in examples]),
        "kept": length - min(e.start for e in examples) + 1,
    }


def collate_prompts(prompts: Sequence[Sequence[int]], skills: Sequence[int], pad: int) -> dict[str, Tensor]:
    """[B, L] tensors of prompts padded on the left: input_ids, attention_mask, position_ids, prompt_mask; and
    skill_ids [B]."""
    length = max(map(len, prompts))
    real = torch.arange(length) >= torch.tensor([[length - len(ids)] for ids in prompts])
    return {
        "input_ids": torch.tensor([[pad] * (length - len(ids)) + list(ids) for ids in prompts]),
        "attention_mask": real.long(),
        "position_ids": (real.cumsum(1) - 1).clamp(min=0),
        "prompt_mask": real,
        "skill_ids": torch.tensor(skills),
    }


def forward(
    model: torch.nn.Module, batch: dict[str, Tensor], kept: int, inner: torch.nn.Module | None = None
) -> Tensor:
    """Logits [B, kept, V] of the last `kept` columns.

    inner: the model inside, where `model` is a wrapper for several processes.
    """
    return model(**inputs(inner or model, batch), logits_to_keep=kept, use_cache=False).logits


def check_numbers(bad: bool) -> None:
    """Raise RunError if logits were NaN: the first choice would win every question, which looks like a
    result."""
    if bad:
        raise RunError(
            "the model's logits are not numbers (NaN): training diverged; expected a smaller "
            "train.lr or a train.max_grad_norm."
        )


EXTRAS = ("prompt_mask", "skill_ids")
"""What only models with a true attribute `accepts_<name>` are given."""


def inputs(model: torch.nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
    """The entries of a batch that `model` takes, on its device."""
    wanted = [key for key in ("input_ids", "attention_mask", "position_ids") if key in batch]
    wanted += [key for key in EXTRAS if key in batch and getattr(model, f"accepts_{key}", False)]
    return {key: batch[key].to(_device(model)) for key in wanted}


def _device(model: torch.nn.Module) -> torch.device:
    return next(model.parameters()).device


def by_length(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Indices in batches of `size`, longest first, so that little is padded and a batch that does not fit
    fails at once."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    return [order[i : i + size] for i in range(0, len(order), size)]


def training_order(lengths: Sequence[int], batch: int, steps: int, seed: int) -> list[int]:
    """Indices of `steps * batch` examples: whole shuffled passes over the data, similar lengths in one batch.

    A pure function of its arguments, so a resumed run sees what the uninterrupted one sees. The shuffled
    stream is cut into pools of 50 batches; each pool is sorted by length and its batches shuffled, so that
    batches still come in random order.
    """
    rng, stream, order = random.Random(seed), [], []
    while len(stream) < steps * batch:
        stream += rng.sample(range(len(lengths)), len(lengths))
    for i in range(0, steps * batch, 50 * batch):
        pool = sorted(stream[i : min(i + 50 * batch, steps * batch)], key=lambda index: -lengths[index])
        groups = [pool[j : j + batch] for j in range(0, len(pool), batch)]
        order += [index for group in rng.sample(groups, len(groups)) for index in group]
    return order
