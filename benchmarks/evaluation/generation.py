"""Greedy generation: batched by length, on the KV cache, each sequence until its own end.

A loop of our own and not transformers' `generate`: that hands no skill ids to a router, looks at the device
after every token, and keeps a finished sequence in the batch until the longest is done. Here finished
sequences leave the batch (where the cache can be taken apart), and the device is asked once in CHECK tokens.
Prompts are padded on the left and masked, positions count real tokens, so a text does not depend on its
neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from moabench.benchmarks.data import batches
from moabench.benchmarks.data.batches import Example

from .scoring import splits

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHECK = 4
"""Tokens between two looks at who is done."""


@dataclass(frozen=True)
class Stop:
    """When a sequence is done: at an end token, once its text holds a stop string, or after `length`
    tokens."""

    length: int
    ends: frozenset[int]
    strings: tuple[str, ...]
    tokenizer: PreTrainedTokenizerBase

    def done(self, ids: list[int]) -> bool:
        if len(ids) >= self.length or not self.ends.isdisjoint(ids):
            return True
        return bool(self.strings) and any(stop in self._decoded(ids) for stop in self.strings)

    def text(self, ids: list[int]) -> str:
        """The text of generated tokens: what comes before the first end token and the first stop string."""
        end = next((i for i, token in enumerate(ids) if token in self.ends), len(ids))
        text = self._decoded(ids[: min(end, self.length)])
        return text[: min((at for stop in self.strings if (at := text.find(stop)) >= 0), default=len(text))]

    def _decoded(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)


@torch.no_grad()
def generate(
    model,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Example],
    max_new_tokens: int,
    stop: Sequence[str] = (),
    batch_size: int = 64,
    progress: bool = False,
) -> list[str]:
    """The greedy continuation of each prompt (`batches.encode_prompts`), in the order given.

    The model must be in evaluation mode and have room for prompt and continuation. Raises ConfigError for a
    router that reads ahead.
    """
    until = Stop(max_new_tokens, _ends(model, tokenizer), tuple(filter(None, stop)), tokenizer)
    texts = [""] * len(prompts)
    with tqdm(total=len(prompts), desc="generate", unit="text", disable=not progress) as bar:
        for chosen in batches.by_length([len(p.ids) for p in prompts], batch_size):
            found = _generate(model, [prompts[i] for i in chosen], until, tokenizer.pad_token_id or 0)
            for i, ids in zip(chosen, found, strict=True):
                texts[i] = until.text(ids)
            bar.update(len(chosen))
    return texts


def _ends(model, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """End tokens of the tokenizer and of the model's own generation config, which may name several."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return frozenset(
        t for t in [tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])] if t is not None
    )


def _generate(model, prompts: list[Example], until: Stop, pad: int) -> list[list[int]]:
    """New token ids of each prompt; up to CHECK - 1 more than it needs."""
    batch = batches.collate_prompts([p.ids for p in prompts], [p.skill for p in prompts], pad)
    batch = {key: value.to(next(model.parameters()).device) for key, value in batch.items()}
    found: list[list[int]] = [[] for _ in prompts]
    alive, waiting, cache = list(range(len(prompts))), [], None
    for step in range(1, until.length + 1):
        out = model(**batches.inputs(model, batch), past_key_values=cache, logits_to_keep=1, use_cache=True)
        cache = out.past_key_values
        waiting.append(out.logits[:, -1].argmax(-1))
        batch = _next(batch, waiting[-1])
        if len(waiting) < CHECK and step < until.length:
            continue
        batches.check_numbers(bool(out.logits.isnan().any()))
        for i, ids in zip(alive, torch.stack(waiting, 1).tolist(), strict=True):
            found[i] += ids
        waiting = []
        kept = [row for row, i in enumerate(alive) if not until.done(found[i])]
        if not kept:
            break
        if len(kept) < len(alive) and splits(cache):  # otherwise they go on, and what they say is cut off
            index = torch.tensor(kept, device=out.logits.device)
            cache.batch_select_indices(index)
            batch = {key: value[index] for key, value in batch.items()}
            alive = [alive[row] for row in kept]
    return found


def _next(batch: dict[str, torch.Tensor], token: torch.Tensor) -> dict[str, torch.Tensor]:
    """The batch of one more token [B] after `batch`."""
    mask = batch["attention_mask"]
    return {
        "input_ids": token[:, None],
        "attention_mask": torch.cat([mask, mask.new_ones(len(mask), 1)], 1),
        "position_ids": batch["position_ids"][:, -1:] + 1,
        "prompt_mask": torch.zeros_like(token[:, None], dtype=torch.bool),
        "skill_ids": batch["skill_ids"],
    }
