"""The tokens that every probe of a study reads: derived from data, protocol and tokenizer, never from method
or seed, and kept by content.

Whole questions with their right answers, from the evaluated tasks in turn, until there are `probe.tokens`
tokens (the last is cut).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moabench.benchmarks import tasks
from moabench.benchmarks.config.hashing import digest
from moabench.benchmarks.data import batches
from moabench.benchmarks.data.batches import Example
from moabench.benchmarks.machine import files
from moabench.benchmarks.tasks.rows import Reader

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from moabench.benchmarks.config.run import RunConfig

LONGEST = 256
"""Most tokens of a question; a longer one loses its beginning."""
CHUNK = 64
"""Questions encoded at a time."""


@dataclass(frozen=True)
class ProbeSet:
    """examples, and the task and true skill (None where there is none) of each; `hash` is that of all of
    it."""

    examples: tuple[Example, ...]
    tasks: tuple[str, ...]
    skills: tuple[str | None, ...]

    @property
    def tokens(self) -> int:
        return sum(len(e.ids) for e in self.examples)

    @property
    def hash(self) -> str:
        """SHA-256 (hex) of tokens, tasks and skills."""
        return digest(self.plain())

    def plain(self) -> list[dict[str, Any]]:
        found = zip(self.examples, self.tasks, self.skills, strict=True)
        return [{"ids": e.ids, "start": e.start, "task": task, "skill": skill} for e, task, skill in found]


def probe_set(cfg: RunConfig, tokenizer: PreTrainedTokenizerBase, reader: Reader) -> ProbeSet:
    """The probe set of a config; also written to `<runs_dir>/.probes/<hash>.json`."""
    chosen, left = [], cfg.probe.tokens
    asked = _in_turn(cfg, reader)
    while left and (some := list(islice(asked, CHUNK))):
        pairs = [(form.prompt(row), form.answer(row)) for _, form, row in some]
        for example, (name, _, row) in zip(batches.encode(tokenizer, pairs), some, strict=True):
            whole = example.last(LONGEST)
            part = Example(whole.ids[:left], min(whole.start, left))
            chosen.append((part, name, row.get("skill")))
            left -= len(part.ids)
            if not left:
                break
    found = ProbeSet(*(tuple(column) for column in zip(*chosen, strict=True)))
    path = Path(cfg.runs_dir).expanduser() / ".probes" / f"{found.hash[:16]}.json"
    if not path.exists():
        files.write_json(path, found.plain())
    return found


def _in_turn(cfg: RunConfig, reader: Reader) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """(task, form, row): the first row of each task, then the second of each ..."""
    columns = []
    for name in cfg.task.eval:
        form = tasks.get(name).form(cfg.protocol)
        columns.append([(name, form, row) for row in reader.reported(name)])
    return (entry for line in zip_longest(*columns) for entry in line if entry is not None)
