"""One run from its config to its folder: evaluate the frozen base, attach the method, train, evaluate,
record.

A finished run is answered from its folder without importing torch. Data and model folders are checked before
anything heavy is imported, so that a mistake is answered at once and leaves nothing behind.
"""

from __future__ import annotations

import dataclasses
import gc
import logging
import os
import random
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moabench.benchmarks.config.run import LoggerConfig, RunConfig, digest, run_hash
from moabench.benchmarks.fairness import budget, tuning
from moabench.benchmarks.machine import devices, environment, files, processes
from moabench.benchmarks.machine.files import RunError
from moabench.methods.spec import ConfigError

from . import folder as runs
from . import loggers, summary
from .folder import RunFolder


class OutOfMemory(RunError):
    """The run needs more memory than there is; recorded by this name, and a sweep goes on."""

    training = False
    """Met in training, not in evaluation."""


@dataclass(frozen=True)
class Outcome:
    """What `run` gives back."""

    folder: Path
    metrics: dict[str, Any]
    ran: bool
    """False: the run was finished before and its record was read."""


def run(cfg: RunConfig, again: bool = True) -> Outcome:
    """Do the run, or find it done. Raises ConfigError for bad input, RunError and others for runs that fail.

    again: one that failed before starts anew; otherwise RunError with its reason.
    """
    from moabench.benchmarks.bases.loading import check_folder

    # Before PEFT imports it: it says there that a faster CPU kernel cannot be had, and later, in every step,
    # that 8-bit products are in half precision.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    check_folder(cfg.model)
    processes.start(cfg)
    with processes.first_alone():  # who keeps the solution for the others
        cfg, solution = budget.apply(cfg)
    inputs = environment.inputs(cfg)
    config_hash = run_hash(cfg, inputs)
    name = f"{cfg.task.name}-{cfg.parsed_method.name}-{cfg.model.name}-s{cfg.seed}"
    folder = RunFolder(cfg.runs_dir, name, config_hash)
    if processes.rank() > 0:
        return _follow(cfg, folder, inputs)
    ran = False
    if folder.state() == "failed" and not again:
        reason = folder.status().get("reason", "no reason known")
        raise RunError(
            f"{folder.path} failed before and is passed over ({reason}); retry=true starts it again."
        )
    if folder.state() != "finished":
        with folder.claim() as state:
            if ran := state != "finished":
                processes.told(state)
                _announce(cfg, folder, state)
                if solution is not None and not cfg.quiet:
                    print(solution.words, file=sys.stderr)
                _execute(cfg, folder, inputs, solution, resume=state == "interrupted")
    if not ran:
        processes.told("finished")
    if not cfg.quiet:
        summary.show(folder.path, found=not ran)
    return Outcome(folder.path, folder.metrics(), ran)


def _follow(cfg: RunConfig, folder: RunFolder, inputs: dict[str, Any]) -> Outcome:
    """What the processes beside the first one do: the same, but what they write is thrown away."""
    state = processes.told()
    if state == "finished":
        return Outcome(folder.path, folder.metrics(), ran=False)
    cfg = dataclasses.replace(cfg, quiet=True, logger=LoggerConfig(kind="none"))
    device = set_globals(cfg)
    cfg, _ = _tuned(cfg, folder.path)
    with tempfile.TemporaryDirectory() as scratch:
        logger = loggers.start(cfg, Path(scratch), folder.hash)
        metrics = _measure(
            cfg, Path(scratch), folder.path, inputs, device, logger, resume=state == "interrupted"
        )
    return Outcome(folder.path, metrics, ran=True)


def _announce(cfg: RunConfig, folder: RunFolder, state: runs.State) -> None:
    if not cfg.quiet:
        doing = {"interrupted": "resumes", "failed": "starts again (it failed before)"}.get(state, "starts")
        print(f"{folder.path} {doing}", file=sys.stderr, flush=True)


def _execute(
    cfg: RunConfig, folder: RunFolder, inputs: dict[str, Any], solution: budget.Solution | None, resume: bool
) -> None:
    """Everything between claiming the folder and its being finished."""
    from moabench.kernels import backend

    path = folder.path
    if not resume:
        files.remove_folder(path / "checkpoints")
    files.write_yaml(path / "config.yaml", cfg.to_dict())
    device = set_globals(cfg)
    if not cfg.quiet:
        print(f"device {device}, kernels {backend.describe(device)}", file=sys.stderr)
    described = environment.describe(cfg, folder.hash, inputs, device)
    files.write_json(path / "environment.json", described)
    if described["code"]["dirty"]:
        files.write_text(path / "code.diff", environment.code_diff())
    cfg, found = _tuned(cfg, path)
    logger = loggers.start(cfg, path, folder.hash)
    metrics = None
    try:
        metrics = _fitting(cfg, path, inputs, device, logger, resume) | found
        if solution is not None and cfg.budget.match == "params":  # what is reached is params/trainable
            metrics["budget/target"] = solution.target
        files.write_json(path / "metrics.json", metrics)
        if cfg.keep != "all":
            files.remove_folder(path / "checkpoints")
    except Exception as error:
        raise _explained(error, path) from error
    finally:
        logger.finish(metrics)


def _tuned(cfg: RunConfig, path: Path) -> tuple[RunConfig, dict[str, Any]]:
    """`cfg` with the best rate of its grid, if it has one, and metrics of the tuning. config.yaml keeps the
    grid; the choice is in tuning.json."""
    if not cfg.train.lr_grid or cfg.parsed_method.tuner == "none":
        return cfg, {}
    found = tuning.tuned(cfg, path)
    set_globals(cfg)  # as if there had been no trials
    return found


def _fitting(
    cfg: RunConfig, path: Path, inputs: dict, device: str, logger: loggers.Logger, resume: bool
) -> dict[str, Any]:
    """As `_measure`; with train.halve again, from the last checkpoint, with smaller passes while memory does
    not do."""
    import torch

    while True:
        try:
            return _measure(cfg, path, path, inputs, device, logger, resume)
        except Exception as error:
            explained = _explained(error, path)
            smaller = (
                _halved(cfg, explained.training)
                if cfg.train.halve and isinstance(explained, OutOfMemory)
                else None
            )
            if smaller is None:
                raise
            del explained
        # Outside of the handler: its traceback holds the frames, and these hold what filled the memory.
        gc.collect()
        if device.startswith("cuda"):
            torch.cuda.empty_cache()
        keys = ("batch_size", "accumulation", "eval_batch_size")
        was, now = ([getattr(c.train, key) for key in keys] for c in (cfg, smaller))
        changed = [
            f"train.{key}={new} (was {old})"
            for key, old, new in zip(keys, was, now, strict=True)
            if old != new
        ]
        print(f"out of memory; goes on with {', '.join(changed)}", file=sys.stderr)
        set_globals(cfg)
        cfg, resume = smaller, True


def _halved(cfg: RunConfig, training: bool) -> RunConfig | None:
    """With passes of half the size (an odd one goes down by its least divisor), in training as many sequences
    in a step; None where they are of one sequence."""
    t = cfg.train
    size = t.batch_size if training else t.eval_batch_size
    factor = next((k for k in range(2, size + 1) if size % k == 0), None)
    if factor is None:
        return None
    smaller = (
        {"batch_size": size // factor, "accumulation": t.accumulation * factor}
        if training
        else {"eval_batch_size": size // factor}
    )
    return dataclasses.replace(cfg, train=dataclasses.replace(t, **smaller))


def _measure(
    cfg: RunConfig,
    path: Path,
    checkpoints: Path,
    inputs: dict,
    device: str,
    logger: loggers.Logger,
    resume: bool,
) -> dict[str, Any]:
    """Evaluate the base, attach, train, evaluate; writes the tables and the adapter to `path`, returns the
    metrics."""
    from moabench import methods
    from moabench.analysis.measures.catalog import headlines
    from moabench.benchmarks.bases.loading import load_model
    from moabench.benchmarks.evaluation import forgetting
    from moabench.benchmarks.observing.probe import Probe
    from moabench.benchmarks.training.train import LiveLog, train

    trains = cfg.parsed_method.tuner != "none"
    held_out = forgetting.held_out_texts(cfg)
    rows, skills, metrics = _training_rows(cfg, path) if trains else ([], (), {})
    model, tokenizer = load_model(cfg.model, cfg.seed, "cpu" if cfg.shard else device)
    if cfg.shard:
        processes.shard(model, device)
    base = _frozen_base(cfg, inputs, device, model, tokenizer, held_out)
    probe = (
        Probe(cfg, model, tokenizer, skills) if trains and cfg.probe.times else None
    )  # sees the frozen model
    seed_everything(cfg.seed)  # the adapter's initialisation depends on nothing that happened before
    model = methods.attach(model, cfg.method)
    metrics |= {f"params/{part}": count for part, count in methods.param_count(model).items()}
    history, routing, matrices = [], [], []
    if trains:
        try:
            options = {
                "progress": not cfg.quiet,
                "callbacks": [LiveLog(logger.log)],
                "skills": skills,
                "probe": probe,
            }
            trained = train(model, tokenizer, rows, cfg, checkpoints, resume=resume, **options)
        except ConfigError as error:  # a loss that is not finite: the run stays, with its reason
            raise RunError(str(error)) from error
        except Exception as error:
            explained = _explained(error, path)
            if isinstance(explained, OutOfMemory):
                explained.training = True
                raise explained from error
            raise
        history, routing = [{"step": row["step"], **row} for row in trained.history], list(trained.routing)
        logger.log_history(history)
        metrics |= trained.metrics
        if cfg.keep != "none":
            _save_adapter(cfg, path, inputs, model)
        found = _evaluated(cfg, model, tokenizer, held_out, skills)
        routing += found["routing"]
        matrices = [row | {"step": trained.metrics.get("train/steps", 0)} for row in found["matrices"]]
    else:
        found = base
    metrics |= found["metrics"]
    metrics |= {
        f"base/{key.removeprefix('eval/')}": v
        for key, v in base["metrics"].items()
        if key.startswith("eval/")
    }
    if held_out:
        metrics |= forgetting.change(base["metrics"], found["metrics"])
    if probe is not None:
        probe.finish()
        metrics |= probe.metrics()
        files.write_json(path / "probe.json", probe.record())
    metrics |= headlines(metrics, cfg.parsed_method.heterogeneous)
    tables = {"history": history, "routing": routing, "samples": found["samples"], "matrices": matrices}
    tables |= (
        {"probes": probe.rows, "matrices": [*probe.matrices, *matrices]}
        if probe is not None
        else {"probes": []}
    )
    for name, table in tables.items():
        files.write_parquet(path / f"{name}.parquet", table)
    files.write_json(path / "protocol.json", _protocols(cfg))
    return metrics


def _training_rows(cfg: RunConfig, path: Path) -> tuple[list[dict], tuple[str, ...], dict[str, Any]]:
    """Rows to train on, the names of the true skills in the order of their ids, and metrics; `data.json` and
    `leakage.json` say how the rows were made and which of them are evaluated too. Raises ConfigError with
    leakage=refuse."""
    from moabench.benchmarks import tasks
    from moabench.benchmarks.data import mixes
    from moabench.benchmarks.fairness import leakage
    from moabench.benchmarks.tasks.rows import is_held_out, reported_rows

    rows, record = mixes.training_rows(
        cfg.mix, cfg.task.eval, cfg.data, seed=0
    )  # one data set for all seeds of a study
    for name in dict.fromkeys(row["task"] for row in rows if "instruction" not in row):
        if reason := tasks.get(name).unavailable(cfg.data.source, cfg.protocol):
            raise ConfigError(
                f"mix={cfg.mix.name} trains on {name} with data.source={cfg.data.source}, "
                f"protocol={cfg.protocol}: {reason}."
            )
    if cfg.data.held_out:
        rows = [row for row in rows if not is_held_out(row)]
    evaluated = [row for task in cfg.task.eval for row in reported_rows(task, cfg.data)]
    # The built-in world is made of templates, where two facts differ in a word or two: nearness means nothing
    # there.
    report = leakage.check(rows, evaluated, near=cfg.data.source != "builtin" or cfg.mix.file is not None)
    kept = leakage.apply(report, rows, cfg.leakage)
    files.write_json(path / "data.json", record | {"rows": len(kept)})
    files.write_json(path / "leakage.json", report.record(cfg.leakage))
    if not cfg.quiet:
        for line in _notes(cfg, record, report):
            print(line, file=sys.stderr)
    skills = tuple(sorted({row["skill"] for row in (*kept, *evaluated) if row.get("skill")}))
    return (
        kept,
        skills,
        {
            "train/rows": len(kept),
            "leakage/rows": len(report.leaked),
            "leakage/dropped": len(rows) - len(kept),
        },
    )


def _notes(cfg: RunConfig, record: dict[str, Any], report: Any) -> Iterator[str]:
    """What a user must know about the training rows: tasks without any, files that differ from the published
    ones, leaked rows."""
    if record["without_train_split"]:
        yield (
            f"no train split with data.source={cfg.data.source}, so not trained on: "
            f"{', '.join(record['without_train_split'])}"
        )
    for difference in record.get("instructions", {}).get("differs", []):
        yield f"mix={cfg.mix.name}: {difference}"
    if report.leaked:
        done = {"drop": "dropped", "mark": "kept (leakage=mark)"}[cfg.leakage]
        yield (
            f"{len(report.leaked):,} of {report.train_rows:,} training rows are evaluated too, {done}; "
            "leakage.json lists them"
        )


def _protocols(cfg: RunConfig) -> dict[str, Any]:
    """How each task was put and read: protocol, prompt template, extraction, the tokens that the loss is
    taken on, task version."""
    from moabench.benchmarks import tasks

    found = {}
    for name in cfg.task.eval:
        task = tasks.get(name)
        form = task.form(cfg.protocol)
        about = {"loss": cfg.train.loss, "split": task.split, "version": task.facts["version"]}
        if form.extraction:
            about["max_new_tokens"] = task.tokens(cfg.data.source)
        found[tasks.title(name, cfg.data.title, form.protocol)] = form.names | about
    return found


def _evaluated(
    cfg: RunConfig, model: Any, tokenizer: Any, held_out: list[str], skills: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Metrics, samples and routing of the model as it is now."""
    from moabench.benchmarks.evaluation import forgetting
    from moabench.benchmarks.evaluation.evaluate import evaluate

    result = evaluate(model, tokenizer, cfg.task.eval, cfg, progress=not cfg.quiet, skills=skills)
    metrics = dict(result.metrics)
    if held_out:
        loss = forgetting.text_loss(
            model, tokenizer, held_out, cfg.train.eval_batch_size, progress=not cfg.quiet
        )
        metrics |= {f"forgetting/{key}": value for key, value in loss.items()}
    return {
        "metrics": metrics,
        "samples": result.samples,
        "routing": list(result.routing),
        "matrices": list(result.matrices),
    }


def _frozen_base(
    cfg: RunConfig, inputs: dict, device: str, model: Any, tokenizer: Any, held_out: list[str]
) -> dict[str, Any]:
    """Metrics and samples of the base as it is: measured once for each model, data, tasks and way of
    evaluating, then read."""
    plain = cfg.to_dict()
    shared = {
        "model": plain["model"],
        "weights": inputs["model"],
        "data": {key: value for key, value in plain["data"].items() if key != "train_limit"},
        "rows": inputs["evaluation"],
        "tasks": cfg.task.eval,
        "protocol": cfg.protocol,
        "held_out": held_out,
        "seed": cfg.seed if cfg.model.kind == "random" else None,
        "device": device,
        "batch": cfg.train.eval_batch_size,
    }
    file = Path(cfg.runs_dir).expanduser() / ".base" / f"{cfg.model.name}-{digest(shared)[:16]}.json"
    known = files.read_json(file)
    if known is None:
        known = _evaluated(cfg, model, tokenizer, held_out)
        files.write_json(file, known)
    return known


def set_globals(cfg: RunConfig) -> str:
    """Seeds, threads and determinism, set anew for every run since sweeps reuse processes; returns the
    device."""
    import torch
    import transformers

    from moabench.kernels import backend

    seed_everything(cfg.seed)
    torch.set_num_threads(cfg.threads or int(os.environ.get("OMP_NUM_THREADS") or _cores()))
    torch.set_default_dtype(torch.float32)
    torch.set_grad_enabled(True)
    torch.backends.cudnn.benchmark = False
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = (
        False  # a debugging aid that costs a pass over every new tensor
    )
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings(
        "ignore", category=FutureWarning, module="transformers|peft"
    )  # between libraries, not for the user
    # `cache`, its new name, is refused before transformers 5.24.
    warnings.filterwarnings("ignore", category=FutureWarning, message="`past_key_values` is deprecated")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    device = cfg.device
    if device in ("auto", "cuda") and processes.count() == 1:
        devices.take_gpu()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and processes.count() > 1:
        device = processes.device(device)
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if not available[device.partition(":")[0]]:
        there = ", ".join(name for name, present in available.items() if present)
        raise ConfigError(f"device={device!r}: not present on this machine. There: {there}.")
    try:
        backend.select(cfg.backend)
        backend.triton_for(torch.empty(0, dtype=getattr(torch, cfg.model.dtype), device=device))
    except RuntimeError as error:
        raise ConfigError(str(error)) from error
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
    if (
        "No space left on device" in text
        or "os error 28" in text
        or "inline_container" in text
        or shutil.disk_usage(path).free == 0
    ):
        return files.StorageError(
            f"cannot write {path}: the disk is full; free space or choose another runs_dir."
        )
    # The CPU's allocator has words of its own.
    if isinstance(error, MemoryError) or any(
        words in text.lower() for words in ("out of memory", "can't allocate memory")
    ):
        hint = (
            "a smaller train.batch_size with more train.accumulation, or train.halve=true, which finds them"
        )
        return OutOfMemory(f"out of memory ({text[:200]}). Expected less: {hint}.")
    return error


# ---- adapters


def _save_adapter(cfg: RunConfig, path: Path, inputs: dict[str, Any], model: Any) -> None:
    """`adapter/`: what PEFT writes (for method=full the whole model), and in base.json what it was made
    for."""

    def fill(folder: Path) -> None:
        model.save_pretrained(str(folder))
        config = folder / "adapter_config.json"
        if (
            config.exists()
        ):  # PEFT notes the place the base was read from; outside this machine only its name means something
            origin = {"base_model_name_or_path": cfg.model.path or f"moabench:{cfg.model.name}"}
            files.write_json(config, files.read_json(config) | origin)
        card = {
            "name": cfg.model.name,
            "path": cfg.model.path,
            "revision": cfg.model.revision,
            "fingerprint": inputs["model"],
        }
        files.write_json(folder / "base.json", card | {"sizes": base_sizes(model)})

    files.write_folder(path / "adapter", fill)


SIZES = (
    "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "vocab_size",
)  # fmt: skip
"""What an adapter needs its base to agree with, as transformers' configs call it."""


def base_sizes(model: Any) -> dict[str, Any]:
    """The `SIZES` of a model."""
    return {key: getattr(model.config, key, None) for key in SIZES}


def load_adapter(model: Any, folder: str | Path) -> Any:
    """`model` with the trained adapter of a run (`<run>/adapter`). Raises ConfigError if it was made for
    another base."""
    folder = Path(folder)
    if not (folder / "adapter_config.json").is_file():
        raise ConfigError(
            f"adapter={str(folder)!r}: no adapter_config.json in it; expected the adapter/ folder of "
            "a finished run."
        )
    card: Mapping[str, Any] = files.read_json(folder / "base.json") or {}
    sizes = base_sizes(model)
    for key, value in (card.get("sizes") or {}).items():
        if sizes[key] != value:
            made_for = f"made for {card.get('name')} with {key}={value}"
            raise ConfigError(
                f"adapter={str(folder)!r}: {made_for}, but this base has {key}={sizes[key]}. Expected "
                "the same base."
            )
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(model, str(folder))
    except (RuntimeError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"adapter={str(folder)!r}: does not fit this base ({reason}). Expected the base it was made for."
        ) from error
