"""Texts longer than what reads them lose their beginning: how many do is counted and said, too many are
refused (`data.allow_cut`), and so is a question of which nothing is left."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from moabench.benchmarks.tasks.rows import is_instruction
from moabench.methods.spec import ConfigError

from .batches import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def question_is_lost(
    tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], prompt: str, cut: Example
) -> bool:
    """Whether `cut`, the end of a text that began with the `prompt` of `row`, has no token of the question.

    What a template puts after the question (options, "Answer:") is no part of it. Where the prompt does not
    say the question word for word, all of the prompt is the question.
    """
    asked = (row["input"] or row["instruction"]) if is_instruction(row) else row["question"]
    after = prompt.rpartition(asked)[2] if asked in prompt else ""
    return cut.start <= max(1, len(tokenizer(after, add_special_tokens=False)["input_ids"]))


def check_share(cut: int, texts: int, allowed: float, what: str, length: int, remedy: str) -> None:
    """ConfigError where more than `allowed` (a share) of the texts were cut to `length` tokens. what: the
    texts; remedy: what would do for the longest."""
    if cut > allowed * texts:
        share = math.ceil(100 * cut / texts) / 100
        raise ConfigError(
            f"data.allow_cut={allowed:g}: {cut:,} of {texts:,} {what} are longer than the {length:,} tokens "
            f"that are read, and would lose their beginning. Expected {remedy}, or data.allow_cut={share:g}."
        )
