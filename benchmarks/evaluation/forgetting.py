"""What training took away: the loss on held-out text of the kind that the base was pre-trained on, before and
after.

For the shipped model that text is the part of the built-in corpus that pre-training left out. For another
model the user gives a file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moabench.benchmarks.machine.globals import undisturbed
from moabench.methods.spec import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from moabench.benchmarks.config.run import RunConfig
    from moabench.benchmarks.data.batches import Example

PARAGRAPHS = 1000
"""How much of the built-in corpus is read (about 30,000 tokens)."""
WINDOW = 512
"""Most tokens predicted in one window of a document, where the model reads that many."""


def held_out_texts(cfg: RunConfig) -> list[str]:
    """The documents of `cfg.forgetting`; none for `none`, and for `auto` with any but the shipped model.

    A file is UTF-8 text. If it has blank lines, these separate the documents; otherwise each line is one.
    Raises ConfigError for a file that is missing, empty or not UTF-8.
    """
    if cfg.forgetting == "none" or (cfg.forgetting == "auto" and cfg.model.kind != "builtin"):
        return []
    if cfg.forgetting == "auto":
        from moabench.benchmarks import world

        return list(islice(world.corpus(heldout=True), PARAGRAPHS))
    return _documents(Path(cfg.forgetting).expanduser())


def _documents(path: Path) -> list[str]:
    where = f"forgetting={str(path)!r}"
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{where}: not UTF-8 (byte {error.start} is {error.object[error.start]:#04x}). Expected "
            "UTF-8 text."
        ) from error
    except OSError as error:
        known = "Expected auto, none or a text file."
        raise ConfigError(
            f"{where}: cannot be read ({(error.strerror or str(error)).lower()}). {known}"
        ) from error
    text = text.replace("\r\n", "\n").rstrip()
    text = re.sub(r"\A([ \t]*\n)+", "", text)
    found = [document.strip("\n") for document in re.split(r"\n[ \t]*\n", text)]
    found = [document for document in (found if len(found) > 1 else text.split("\n")) if document.strip()]
    if not found:
        raise ConfigError(
            f"{where}: no text in it. Expected documents, one a line or with blank lines between them."
        )
    return found


def text_loss(
    model, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], batch_size: int, progress: bool = False
) -> dict[str, float]:
    """`loss` (mean nats a token), `perplexity` and `tokens` (how many were predicted) of `texts`, in
    evaluation mode, which is undone.

    Every token is predicted once, from the end or beginning token of the tokenizer on (a tokenizer with
    neither leaves out the first of each text). Long texts are read in windows, of which each begins with the
    last token of the one before. Text has no prompt and no skill: a router that decides once a sequence
    decides at the first token, since more would be the future, and one that is told skills is told the number
    of the text.
    """
    import torch
    import torch.nn.functional as F
    from tqdm import tqdm

    from moabench.benchmarks.data import batches

    examples = windows(model, tokenizer, texts)
    total, tokens = 0.0, sum(len(e.ids) - 1 for e in examples)
    if not tokens:
        raise ConfigError("forgetting: the texts have no token to predict. Expected longer ones.")
    with (
        torch.no_grad(),
        undisturbed(model),
        tqdm(total=len(examples), desc="held-out text", unit="window", disable=not progress) as bar,
    ):
        for chosen in batches.by_length([len(e.ids) for e in examples], batch_size):
            batch = batches.collate([examples[i] for i in chosen], tokenizer.pad_token_id or 0)
            logits = batches.forward(model, batch, batch["kept"])
            labels = batch["labels"][:, 1:].to(logits.device)
            nll = F.cross_entropy(
                logits[:, :-1].flatten(0, 1).float(), labels.flatten(), ignore_index=-100, reduction="none"
            )
            total += float(nll.double().sum())
            bar.update(len(chosen))
    return {"loss": total / tokens, "perplexity": math.exp(min(total / tokens, 700.0)), "tokens": tokens}


def windows(model, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[Example]:
    """Texts as windows whose tokens after the first are predicted."""
    from moabench.benchmarks.data import batches

    size = min(WINDOW, batches.positions(model) or WINDOW)
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    found = []
    for number, ids in enumerate(batches.tokens(tokenizer, texts)):
        if first is not None and ids[:1] != [first]:
            ids = [first, *ids]
        found += [batches.Example(ids[i : i + size + 1], 1, number) for i in range(0, len(ids) - 1, size)]
    batches.check_ids(model, found)
    return found


def change(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, float]:
    """`forgetting/before` and `forgetting/change` (nats a token; above 0: it got worse) from the metrics of
    base and trained model."""
    key = "forgetting/loss"
    return {"forgetting/before": before[key], "forgetting/change": after[key] - before[key]}
