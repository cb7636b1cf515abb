"""What several processes cannot do, or one alone."""

from __future__ import annotations

import os

from moabench.benchmarks.config.run import RunConfig
from moabench.benchmarks.machine import processes
from moabench.methods.spec import ConfigError


def check(cfg: RunConfig) -> None:
    """Raises ConfigError for a config that this number of processes cannot run."""
    _check_shard(cfg)
    if processes.count() > 1 and cfg.train.halve:
        raise ConfigError(
            "train.halve=true: expected false in a run of several processes; the others would wait for the "
            "one that starts anew."
        )


def _check_shard(cfg: RunConfig) -> None:
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true"):
        raise ConfigError(
            "accelerate launch --use_fsdp: expected shard=true on this command line instead, and no "
            "--use_fsdp."
        )
    if not cfg.shard:
        return
    if processes.count() == 1:
        raise ConfigError(
            "shard=true: expected several processes, as of torchrun --nproc-per-node 2 run.py ...; "
            "this one is alone."
        )
    if cfg.model.quantize:
        raise ConfigError(
            f"shard=true: expected model.quantize=null, not {cfg.model.quantize}; a quantised base is "
            "held whole."
        )
    method = cfg.parsed_method
    if method.tuner == "full" or method.dora:
        why = "trains the base itself" if method.tuner == "full" else "needs the norms of whole weights"
        raise ConfigError(f"shard=true: expected another method than {method.name}, which {why}.")
