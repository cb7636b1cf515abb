"""One run from its config to its folder: evaluate the frozen base, attach the method, train, evaluate, record.

A finished run is answered from its folder without importing torch. Data and model folders are checked before anything heavy is
imported, so that a mistake is answered at once and leaves nothing behind.
"""

from __future__ import annotations

import os
import random
import shutil
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moabench.benchmarks import environment, files, loggers, runs, summary
from moabench.benchmarks.config import RunConfig, digest, run_hash
from moabench.benchmarks.files import RunError
from moabench.benchmarks.runs import RunFolder
from moabench.methods.spec import ConfigError


@dataclass(frozen=True)
class Outcome:
    """What `run` gives back."""

    folder: Path
    metrics: dict[str, Any]
    ran: bool
    """False: the run was finished before and its record was read."""


def run(cfg: RunConfig) -> Outcome:
    """Do the run, or find it done. Raises ConfigError for bad input, RunError and others for runs that fail."""
    from moabench.benchmarks.model import check_folder

    check_folder(cfg.model)
    inputs = environment.inputs(cfg)
    config_hash = run_hash(cfg, inputs)
    name = f"{cfg.task.name}-{cfg.parsed_method.name}-{cfg.model.name}-s{cfg.seed}"
    folder = RunFolder(cfg.runs_dir, name, config_hash)
    ran = False
    if folder.state() != "finished":
        with folder.claim() as state:
            if ran := state != "finished":
                _announce(cfg, folder, state)
                _execute(cfg, folder, inputs, resume=state == "interrupted")
    if not cfg.quiet:
        summary.show(folder.path, found=not ran)
    return Outcome(folder.path, folder.metrics(), ran)


def _announce(cfg: RunConfig, folder: RunFolder, state: runs.State) -> None:
    if not cfg.quiet:
        doing = {"interrupted": "resumes", "failed": "starts again (it failed before)"}.get(state, "starts")
        print(f"{folder.path} {doing}", file=sys.stderr, flush=True)


def _execute(cfg: RunConfig, folder: RunFolder, inputs: dict[str, Any], resume: bool) -> None:
    """Everything between claiming the folder and its being finished."""
    path = folder.path
    if not resume:
        shutil.rmtree(path / "checkpoints", ignore_errors=True)
    files.write_yaml(path / "config.yaml", cfg.to_dict())
    device = set_globals(cfg)
    files.write_json(path / "environment.json", environment.describe(cfg, folder.hash, inputs, device))
    logger = loggers.start(cfg, path, folder.hash)
    metrics = None
    try:
        metrics = _measure(cfg, path, inputs, device, logger, resume)
        files.write_json(path / "metrics.json", metrics)
        shutil.rmtree(path / "checkpoints", ignore_errors=True)
    except Exception as error:
        raise _explained(error, path) from error
    finally:
        logger.finish(metrics)


def _measure(cfg: RunConfig, path: Path, inputs: dict, device: str, logger: loggers.Logger, resume: bool) -> dict[str, Any]:
    """Evaluate the base, attach, train, evaluate; writes the tables and the adapter, returns the metrics."""
    from moabench import methods
    from moabench.benchmarks.data import load_rows
    from moabench.benchmarks.evaluation import evaluate
    from moabench.benchmarks.model import load_model
    from moabench.benchmarks.training import LiveLog, train

    rows = [dict(row, task=task) for task in cfg.task.train for row in load_rows(task, "train", cfg.data)]
    model, tokenizer = load_model(cfg.model, cfg.seed, device)
    base = _frozen_base(cfg, inputs, device, model, tokenizer)
    seed_everything(cfg.seed)  # the adapter's initialisation depends on nothing that happened before
    model = methods.attach(model, cfg.method)
    sizes = methods.param_count(model)
    metrics = {f"params/{part}": count for part, count in sizes.items()}
    history, routing = [], []
    if sizes["trainable"]:
        try:
            live = [LiveLog(logger.log)]
            trained = train(model, tokenizer, rows, cfg, path, resume=resume, progress=not cfg.quiet, callbacks=live)
        except ConfigError as error:  # a loss that is not finite: the run stays, with its reason
            raise RunError(str(error)) from error
        history, routing = [{"step": row["step"], **row} for row in trained.history], list(trained.routing)
        logger.log_history(history)
        metrics |= trained.metrics
        _save_adapter(cfg, path, inputs, model)
        evaluated = evaluate(model, tokenizer, cfg.task.eval, cfg, progress=not cfg.quiet)
        metrics |= evaluated.metrics
        samples, routing = evaluated.samples, routing + list(evaluated.routing)
    else:
        metrics |= base["metrics"]
        samples = base["samples"]
    metrics |= {f"base/{key.removeprefix('eval/')}": v for key, v in base["metrics"].items() if key.startswith("eval/")}
    for name, table in {"history": history, "routing": routing, "samples": samples}.items():
        files.write_parquet(path / f"{name}.parquet", table)
    return metrics


def _frozen_base(cfg: RunConfig, inputs: dict, device: str, model: Any, tokenizer: Any) -> dict[str, Any]:
    """Metrics and samples of the base as it is: measured once for each model, data, tasks and way of evaluating, then read."""
    from moabench.benchmarks.evaluation import evaluate

    plain = cfg.to_dict()
    shared = {
        "model": plain["model"],
        "weights": inputs["model"],
        "data": {key: value for key, value in plain["data"].items() if key != "train_limit"},
        "rows": {key: value for key, value in inputs["data"].items() if not key.endswith("/train")},
        "tasks": cfg.task.eval,
        "seed": cfg.seed if cfg.model.kind == "random" else None,
        "device": device,
        "batch": cfg.train.eval_batch_size,
    }
    file = Path(cfg.runs_dir).expanduser() / ".base" / f"{cfg.model.name}-{digest(shared)[:16]}.json"
    known = files.read_json(file)
    if known is None:
        result = evaluate(model, tokenizer, cfg.task.eval, cfg, progress=not cfg.quiet)
        known = {"metrics": result.metrics, "samples": result.samples}
        files.write_json(file, known)
    return known


def set_globals(cfg: RunConfig) -> str:
    """Seeds, threads and determinism, set anew for every run since sweeps reuse processes; returns the device."""
    import torch
    import transformers

    seed_everything(cfg.seed)
    torch.set_num_threads(cfg.threads or int(os.environ.get("OMP_NUM_THREADS") or _cores()))
    torch.set_default_dtype(torch.float32)
    torch.set_grad_enabled(True)
    torch.backends.cudnn.benchmark = False
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that costs a pass over every new tensor
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft")  # between libraries, not for the user
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    device = cfg.device
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if not available[device.partition(":")[0]]:
        there = ", ".join(name for name, present in available.items() if present)
        raise ConfigError(f"device={device!r}: not present on this machine. There: {there}.")
    return device


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch on every device."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _explained(error: Exception, path: Path) -> Exception:
    """The error as it is, but a full disk or memory by its plain name, whichever library met it."""
    text = " ".join(str(error).split())
    if isinstance(error, ConfigError | RunError):
        return error
    if isinstance(error, OSError) and error.errno in files.ADVICE:
        return files.storage_error(error, error.filename or path)
    # safetensors, torch.save and pyarrow each have their own words for ENOSPC; torch's does not even say so.
    if "No space left on device" in text or "os error 28" in text or "inline_container" in text or shutil.disk_usage(path).free == 0:
        return files.StorageError(f"cannot write {path}: the disk is full; free space or choose another runs_dir.")
    if isinstance(error, MemoryError) or "out of memory" in text.lower():
        return RunError(f"out of memory ({text[:200]}). Expected less: a smaller train.batch_size with more train.accumulation.")
    return error


# ---- adapters


def _save_adapter(cfg: RunConfig, path: Path, inputs: dict[str, Any], model: Any) -> None:
    """`adapter/`: what PEFT writes (for method=full the whole model), and in base.json what it was made for."""

    def fill(folder: Path) -> None:
        model.save_pretrained(str(folder))
        config = folder / "adapter_config.json"
        if config.exists():  # PEFT notes the place the base was read from; outside this machine only its name means something
            origin = {"base_model_name_or_path": cfg.model.path or f"moabench:{cfg.model.name}"}
            files.write_json(config, files.read_json(config) | origin)
        card = {"name": cfg.model.name, "path": cfg.model.path, "revision": cfg.model.revision, "fingerprint": inputs["model"]}
        files.write_json(folder / "base.json", card | {"sizes": base_sizes(model)})

    files.write_folder(path / "adapter", fill)


SIZES = (
    "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size",
)  # fmt: skip
"""What an adapter needs its base to agree with, as transformers' configs call it."""


def base_sizes(model: Any) -> dict[str, Any]:
    """The `SIZES` of a model."""
    return {key: getattr(model.config, key, None) for key in SIZES}


def load_adapter(model: Any, folder: str | Path) -> Any:
    """`model` with the trained adapter of a run (`<run>/adapter`). Raises ConfigError if it was made for another base."""
    folder = Path(folder)
    if not (folder / "adapter_config.json").is_file():
        raise ConfigError(f"adapter={str(folder)!r}: no adapter_config.json in it; expected the adapter/ folder of a finished run.")
    card: Mapping[str, Any] = files.read_json(folder / "base.json") or {}
    sizes = base_sizes(model)
    for key, value in (card.get("sizes") or {}).items():
        if sizes[key] != value:
            made_for = f"made for {card.get('name')} with {key}={value}"
            raise ConfigError(f"adapter={str(folder)!r}: {made_for}, but this base has {key}={sizes[key]}. Expected the same base.")
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(model, str(folder))
    except (RuntimeError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"adapter={str(folder)!r}: does not fit this base ({reason}). Expected the base it was made for.") from error
