"""Training one model on the rows of one run: batches, schedule, checkpoints, and what is reported at the
end."""

from __future__ import annotations

import json
import math
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm
from transformers import TrainerCallback, TrainingArguments

from moabench.benchmarks import tasks
from moabench.benchmarks.data import batches, cache, cuts, mixes
from moabench.benchmarks.data.batches import Example
from moabench.benchmarks.machine import processes
from moabench.benchmarks.observing import load_measures
from moabench.benchmarks.tasks.rows import is_instruction
from moabench.methods.spec import ConfigError

from .trainer import MixtureTrainer

if TYPE_CHECKING:
    from moabench.benchmarks.config.run import RunConfig
    from moabench.benchmarks.observing.probe import Probe
    from moabench.benchmarks.observing.training_log import TrainingLog

SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


@dataclass(frozen=True)
class TrainResult:
    """metrics: `train/...`, `memory/peak_bytes`, `load/train_...`, `routing/train_...`; history: a row a
    logged step; routing: a row an expert."""

    metrics: dict[str, float]
    history: list[dict[str, Any]]
    routing: list[dict[str, Any]]


def train(
    model,
    tokenizer,
    rows: list[dict],
    cfg: RunConfig,
    run_dir: Path,
    resume: bool,
    progress: bool,
    callbacks: Sequence[TrainerCallback] = (),
    skills: Sequence[str] = (),
    probe: Probe | None = None,
    key: str = "skill",
    length: float = 1.0,
    share: float = 1.0,
) -> TrainResult:
    """Trains what is trainable of `model`, in place; nothing happens where nothing is. skills: names in the
    order of their ids, which a row has under `key`. probe: measures while training goes on; its time is no
    training time. length: of this training, in units of the config's; share: of its steps, that `rows` are.

    Checkpoints go to run_dir/checkpoints; with `resume` the last one is continued, and the result equals an
    uninterrupted run's. Raises ConfigError for rows that cannot be trained on and for a loss that is not
    finite.
    """
    if not any(p.requires_grad for p in model.parameters()):
        return TrainResult({}, [], [])
    examples, cut = encode_rows(tokenizer, rows, cfg, skills, key, batches.positions(model))
    batches.check_ids(model, examples)
    folder = Path(run_dir) / "checkpoints"
    steps = _steps(cfg, len(examples), length, share)
    args = _arguments(model, cfg, steps, folder)
    lengths = [len(e.ids) for e in examples]
    order = batches.training_order(lengths, _step_size(cfg), steps, int(cfg.seed))
    with _as_it_was(model), _peak_memory(args.device) as peak:
        trainer = MixtureTrainer(
            model=model,
            args=args,
            train_dataset=[examples[i] for i in order],
            data_collator=partial(_collate, pad=tokenizer.pad_token_id or 0, loss=cfg.train.loss),
            callbacks=[_Progress(progress), *callbacks],
        )
        if cfg.shard:
            trainer.model_wrapped = processes.wrapped(model)
        if probe is not None:
            trainer.add_callback(Probing(probe, trainer.tally, folder / "probe.pt", resume))
        trainer.tally.start()
        trainer.train(resume_from_checkpoint=_last_checkpoint(folder) if resume else None)
    # Columns in an order of their own: those of a resumed run come from a file that sorts them.
    history = [
        {k: row[k] for k in sorted(row) if k != "epoch"}
        for row in trainer.state.log_history
        if "loss/total" in row
    ]
    metrics = _summary(history, trainer.tally) | peak | {"train/steps": steps} | cut
    metrics |= {
        "train/batch_size": cfg.train.batch_size,
        "train/accumulation": cfg.train.accumulation,
    }  # with train.halve not the config's
    return TrainResult(
        metrics, history, load_measures.rows(trainer.tally.load, "train", f"{cfg.mix.name}@{cfg.data.source}")
    )


def encode_rows(
    tokenizer,
    rows: list[dict],
    cfg: RunConfig,
    skills: Sequence[str] = (),
    key: str = "skill",
    positions: int | None = None,
) -> tuple[list[Example], dict[str, int]]:
    """Rows as prompt, right answer and end token, at most `train.max_length` tokens, and no more than the
    `positions` of the model; and as metrics how many were longer, and how many of those are left out because
    their answer leaves nothing of the question. Raises ConfigError for more than `data.allow_cut`."""
    if not rows:
        raise ConfigError("training rows: none, expected at least one.")
    pairs = [_texts(row, cfg.protocol) for row in rows]
    whole = cache.encoded(
        Path(cfg.runs_dir).expanduser() / ".cache", tokenizer, pairs, eos=True, encode=batches.encode
    )
    length = min(cfg.train.max_length, positions or cfg.train.max_length)
    cut = sum(len(e.ids) > length for e in whole)
    longest = max(len(e.ids) for e in whole)
    remedy = f"train.max_length={longest}" if longest <= (positions or longest) else "a model that reads more"
    cuts.check_share(cut, len(rows), cfg.data.allow_cut, "training texts", length, remedy)
    number = {name: i for i, name in enumerate(skills)}
    examples = []
    for e, row, (prompt, _) in zip(whole, rows, pairs, strict=True):
        last = replace(e.last(length), skill=number.get(row.get(key), -1))
        if len(e.ids) <= length or not cuts.question_is_lost(tokenizer, row, prompt, last):
            examples.append(last)
    if not examples:
        raise ConfigError(
            f"train.max_length={cfg.train.max_length}: nothing of any question is left beside its answer in "
            f"{length} tokens; expected {longest}."
        )
    return examples, {"train/cut_examples": cut, "train/left_out": len(rows) - len(examples)}


def _texts(row: dict, protocol: str) -> tuple[str, str]:
    """(prompt, answer) of a row in the form in which its task is evaluated; an instruction row brings its own
    text."""
    if is_instruction(row):
        return mixes.pair(row)
    form = tasks.get(row["task"], "mix.parts").form(protocol)
    return form.prompt(row), form.answer(row)


def _collate(examples: Sequence[Example], pad: int, loss: str) -> dict[str, Any]:
    """A batch whose labels are the answers (loss=response) or every token (loss=whole); prompts stay marked
    as prompts."""
    batch = batches.collate(examples, pad)
    if loss == "whole":
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        batch["kept"] = batch["input_ids"].shape[1]
    return batch


def _step_size(cfg: RunConfig) -> int:
    """Sequences per optimiser step, over all processes of a torchrun."""
    return cfg.train.batch_size * cfg.train.accumulation * processes.count()


def _steps(cfg: RunConfig, examples: int, length: float, share: float) -> int:
    if cfg.train.steps:
        return max(1, round(cfg.train.steps * length * share))
    return max(1, math.ceil(cfg.train.epochs * length * examples / _step_size(cfg)))


def _arguments(model, cfg: RunConfig, steps: int, folder: Path) -> TrainingArguments:
    t, device = cfg.train, next(model.parameters()).device
    if device.type == "cuda":
        torch.cuda.set_device(device)
    adapter = getattr(model, "peft_config", None) is not None
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=t.batch_size,
        gradient_accumulation_steps=t.accumulation,
        learning_rate=t.lr if adapter else t.lr_full,
        warmup_steps=t.warmup,
        lr_scheduler_type=SCHEDULES[t.schedule],
        weight_decay=t.weight_decay,
        adam_beta1=t.beta1,
        adam_beta2=t.beta2,
        max_grad_norm=t.max_grad_norm,
        activation_checkpointing=t.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False} if t.gradient_checkpointing else None,
        logging_steps=t.log_every,
        # it hides a NaN behind the mean of earlier losses, and synchronises every step
        logging_nan_inf_filter=False,
        save_steps=t.save_every,
        save_total_limit=1,
        seed=int(cfg.seed),
        use_cpu=device.type == "cpu",
        # an untrained threshold head and an adapter behind a zero gate have no gradient
        ddp_find_unused_parameters=True,
        dataloader_pin_memory=device.type == "cuda",
        disable_tqdm=True,
        report_to="none",
    )
    if (args.device.type, args.device.index or 0) != (device.type, device.index or 0):
        raise ConfigError(
            f"device={device}: the Trainer takes {args.device}; expected CUDA_VISIBLE_DEVICES={device.index} "
            "and device=cuda."
        )
    args._n_gpu = min(1, args.n_gpu)  # one GPU a process: the Trainer would wrap the model in DataParallel
    return args


def _last_checkpoint(folder: Path) -> str | None:
    """The newest whole checkpoint. Its state file is written last, so a folder where that is missing or cut
    short was interrupted."""
    whole = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json") if _is_json(path)]
    return str(max(whole, key=lambda path: int(path.name.rpartition("-")[2]))) if whole else None


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return True


def _summary(history: list[dict[str, Any]], tally) -> dict[str, float]:
    """Losses are means over the last tenth of the logged rows (at least one), since one window is noisy."""
    last = history[-max(1, len(history) // 10) :]
    losses = {
        key.removeprefix("loss/"): sum(row[key] for row in last) / len(last)
        for key in last[-1]
        if key.startswith("loss/")
    }
    return (
        {f"train/loss_{name}": value for name, value in losses.items()}
        | {
            "train/seconds": tally.seconds,
            "train/tokens": tally.tokens,
            "train/tokens_per_second": tally.tokens / tally.seconds,
        }
        | {
            name.replace("/", "/train_", 1): value
            for name, value in load_measures.measures(tally.load).items()
        }
    )


class _Progress(TrainerCallback):
    """The one progress bar; also asks for a log row at the last step, which `logging_steps` may miss."""

    def __init__(self, show: bool):
        self.show, self.bar = show, None

    def on_train_begin(self, args, state, control, **kwargs):
        self.bar = tqdm(
            total=state.max_steps, initial=state.global_step, desc="train", unit="step", disable=not self.show
        )

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update()
        control.should_log |= state.global_step == state.max_steps

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss/task" in logs:
            self.bar.set_postfix(
                {key.removeprefix("loss/"): f"{v:.3f}" for key, v in logs.items() if key.startswith("loss/")}
            )

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()


class Probing(TrainerCallback):
    """Measures at the probe's steps, and keeps what was found beside the checkpoints."""

    def __init__(self, probe: Probe, tally: TrainingLog, path: Path, resume: bool):
        self.probe, self.tally, self.path, self.resume = probe, tally, path, resume

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 0:
            self._measure(model, state)
        elif self.resume:
            self.probe.load(self.path, state.global_step)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step in self.probe.steps(state.max_steps):
            self._measure(model, state)

    def _measure(self, model, state) -> None:
        start = time.perf_counter()
        self.probe.measure(model, state.global_step)
        if state.is_world_process_zero:
            self.probe.save(self.path)
        self.tally.pause(time.perf_counter() - start)


class LiveLog(TrainerCallback):
    """Hands each logged row to `log(step, row)` while training goes on."""

    def __init__(self, log: Callable[[int, dict[str, Any]], None]):
        self.log = log

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss/task" in logs:
            self.log(state.global_step, logs)


@contextmanager
def _as_it_was(model) -> Iterator[None]:
    """Evaluation mode afterwards, and the KV cache that the Trainer switches off in the model's config as
    before."""
    cache = getattr(model.config, "use_cache", None)
    try:
        yield
    finally:
        model.config.use_cache = cache
        model.eval()


@contextmanager
def _peak_memory(device: torch.device) -> Iterator[dict[str, float]]:
    """Fills "memory/peak_bytes" on exit: allocated on a GPU, else resident in RAM (of the whole process with
    libraries)."""
    found: dict[str, float] = {}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        _reset_resident_peak()
    yield found
    found["memory/peak_bytes"] = (
        torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _resident_peak()
    )


def _reset_resident_peak() -> None:
    """Linux forgets the peak when asked; elsewhere the peak since the process began is reported."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _resident_peak() -> int:
    try:
        status = Path("/proc/self/status").read_text()
        return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) * 1024
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
