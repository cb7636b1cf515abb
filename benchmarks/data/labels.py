"""Labels of training rows, for methods whose stages teach an expert for each label."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from moabench.benchmarks.data import mixes
from moabench.methods import catalog
from moabench.methods.catalog import Method
from moabench.methods.spec import ConfigError

if TYPE_CHECKING:
    from moabench.benchmarks.config.run import RunConfig
    from moabench.benchmarks.tasks.rows import Reader


def key_of(method: Method) -> str | None:
    """The key of a row that is its label, one of task, skill, domain; None where no stage reads labels."""
    return next((stage.label for stage in method.stages if stage.reads_labels), None)


def names(rows: Sequence[dict[str, Any]], key: str) -> tuple[str, ...]:
    """The labels of `rows`, sorted; their places are the numbers of their experts. Raises ConfigError for
    rows without one."""
    without = sum(row.get(key) is None for row in rows)
    if without:
        others = [k for k in ("task", "skill", "domain") if all(row.get(k) for row in rows)]
        fit = f"; they all have {', '.join(others)}" if others else ""
        raise ConfigError(
            f"stages: label={key!r}, but {without:,} of {len(rows):,} training rows have no {key}{fit}."
        )
    return tuple(sorted({row[key] for row in rows}))


def fitted(cfg: RunConfig, reader: Reader) -> RunConfig:
    """The config with as many experts as its training rows have labels, where the method has one for each; as
    it is for all other methods."""
    key = key_of(cfg.parsed_method)
    if key is None:
        return cfg
    found = names(mixes.training_rows(cfg.mix, cfg.task.eval, reader)[0], key)
    changes: dict[str, Any] = {"experts": {"n": len(found)}}
    changes |= (
        {"also": {m.name: dict(changes) for m in cfg.parsed_method.mixtures[1:]}}
        if cfg.method.get("also")
        else {}
    )
    return dataclasses.replace(cfg, method=catalog.override(cfg.method, changes))
