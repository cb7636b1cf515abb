"""The command line: `moabench ...` and `python run.py ...` are the same.

Exit codes: 0 done, 1 a run failed, 2 a config error, 130 interrupted. Errors are one line on stderr;
`traceback=true` shows more.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from moabench.benchmarks import tasks
from moabench.benchmarks.config.choices import CONF, groups
from moabench.benchmarks.config.overrides import nested, one_line, prepare, tunes
from moabench.benchmarks.config.run import RunConfig, keys
from moabench.benchmarks.machine import processes
from moabench.benchmarks.machine.files import RunError, storage_error
from moabench.benchmarks.machine.terminal import shown
from moabench.methods.spec import ConfigError

USAGE = """\
Train one mixture-of-adapters method on one task, evaluate it, and keep everything about it in a run folder.

usage: {prog} [group=choice ...] [key=value ...]
       {prog} -m group=choice1,choice2 ... key=value1,value2 ...     (a sweep: every combination)

examples:
  {prog}                                                     {defaults}
  {prog} method=lora task=arc_easy train.steps=100 seed=1
  {prog} method=moa_sparse method.router.gamma_max=0.8 train.lr=1e-3
  {prog} method=molora method.router.kind=topk method.router.k=2
  {prog} method=moa_soft task=commonsense
  {prog} method=mixlora task=[arc,gsm8k] protocol=generate data=local data.root=../datasets
  {prog} model.path=path/or/hub-id train=paper data=hub
  {prog} -m method=none,lora,moa_soft,moa_sparse seed=0,1,2 quiet=true
  {prog} +experiment=equal_budget                            a committed study, a file of conf/experiment
  {prog} runs ls                                             what was run: also show, diff, rm, retry, rerun
  {prog} memory method=moa_soft model=llama3.1_8b train=paper   the memory that a training step needs
  {prog} method=molora budget=lora_r37                       as many trainable parameters as LoRA of that rank

choices (each is a file conf/<group>/<choice>.yaml):
{choices}

tasks (each is a file in benchmarks/tasks/), and suites of them:
{tasks}

keys of the defaults (`{prog} --cfg job` prints the composed config with your overrides):
{keys}

A finished run is found again and answered from disk; an interrupted one resumes.
Other flags are Hydra's: {prog} --hydra-help
"""

_SWEEP_FAILURES: list[int] = []
"""Exit codes of the failed jobs of this process: Hydra drops what a job of a sweep returns, or a sweeper
reads it."""


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's own arguments); returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] in (["runs"], ["--rerun"]):
        return _command("runs", ["rerun", *argv[1:]] if argv[0] == "--rerun" else argv[1:])
    if argv[:1] == ["memory"]:
        return _command("memory", argv[1:])
    if "--help" in argv or "-h" in argv:
        print(help_text())
        return 0
    if threading.current_thread() is threading.main_thread():
        interrupts = Interrupts()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, interrupts)
    _SWEEP_FAILURES.clear()
    show = "traceback=true" in (arg.lstrip("+").lower() for arg in argv)
    started = time.time()
    try:
        _compose_and_run(prepare(argv))
        processes.leave()
        if tunes(argv):
            _say_best(argv, started)
        return max(_SWEEP_FAILURES, default=0)
    except KeyboardInterrupt:
        _close_bars()
        print("interrupted; the same command resumes the run", file=sys.stderr)
        return 130
    except Exception as error:
        if type(error).__name__ in ("TerminatedWorkerError", "BrokenProcessPool"):
            error = _worker_gone(argv, started)
        if isinstance(error, OSError) and error.errno:  # Hydra's own record of a sweep could not be written
            error = storage_error(error, error.filename or "the runs_dir")
        return report(error, show)


def _command(module: str, argv: list[str]) -> int:
    """A command of its own module: `runs`, `memory`."""
    try:
        return importlib.import_module(f"moabench.benchmarks.command.{module}").main(argv)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        return report(error, show_traceback=False)


def _compose_and_run(argv: list[str]) -> None:
    import hydra

    register_resolvers()

    # Hydra then raises its errors instead of printing several lines and leaving.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    os.environ["MOABENCH_MAIN"] = str(os.getpid())
    # OpenMP reads this when torch loads it. Its default, spinning, made steps 2 to 3 times slower on a
    # machine that others use too.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if tunes(argv):
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
    saved, sys.argv = sys.argv, [sys.argv[0] or "moabench", *argv]
    try:
        hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(job)()
    finally:
        sys.argv = saved


def register_resolvers() -> None:
    """`${variants:}` in an experiment: all of its variants, as choices of a sweep."""
    from omegaconf import OmegaConf

    OmegaConf.register_new_resolver(
        "variants", lambda *, _root_: ",".join(_root_.experiment.variants), replace=True
    )


def _runs_dir(argv: list[str]) -> Path:
    given = (arg.partition("=")[2] for arg in argv if arg.startswith("runs_dir="))
    return Path(next(given, RunConfig.runs_dir)).expanduser()


def _worker_gone(argv: list[str], started: float) -> RunError:
    """A worker of a launcher was killed, and with it the sweep: what ran, and how to go on."""
    from moabench.benchmarks.run.folder import find, status_of

    since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started))
    found = [(path.name, status_of(path)) for path in find(_runs_dir(argv))]
    ran = [
        name for name, status in found if status["state"] == "running" and status.get("started", "") >= since
    ]
    return RunError(
        "a worker was killed (by the kernel, where the memory did not do) while these ran: "
        f"{', '.join(ran) or 'none'}. The same command goes on: what is finished is found, the others "
        "resume; fewer hydra.launcher.n_jobs need less memory."
    )


def _say_best(argv: list[str], started: float) -> None:
    """The outcome of a search, from the file in which Optuna's sweeper leaves it."""
    import yaml

    for file in sorted(_runs_dir(argv).glob(".sweeps/*/optimization_results.yaml")):
        if file.stat().st_mtime >= started:
            best = yaml.safe_load(file.read_text())
            words = " ".join(f"{key.lstrip('+')}={value}" for key, value in best["best_params"].items())
            print(
                f"\nbest: {words}   {100 * best['best_value']:.1f} % on the held-out rows; without "
                "data.held_out the same is reported"
            )


def job(composed: Any) -> float | None:
    """One run, as Hydra calls it; its mean accuracy, for sweepers that search. In a sweep a failure is
    reported and the other jobs go on."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode
    from omegaconf import OmegaConf

    sweep = HydraConfig.get().mode == RunMode.MULTIRUN
    overrides = OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)
    show = composed.get("traceback") is True
    try:
        data = OmegaConf.to_container(composed, resolve=True)
        show = data.get("traceback") is True
        grid = HydraConfig.get().sweeper.get("params") or {}  # of a study's file, not typed
        typed = [text for text in overrides if text.partition("=")[0] not in grid]
        cfg = RunConfig.from_composed(data, overrides).trusting(keys(typed))
        if sweep and not cfg.quiet and processes.rank() == 0:
            print(
                f"\n[{HydraConfig.get().job.num}] {' '.join(text.lstrip('+') for text in overrides)}",
                flush=True,
            )
        from moabench.benchmarks.run import summary
        from moabench.benchmarks.run.run import run

        return summary.accuracy(run(cfg, again=cfg.retry or not sweep).metrics)
    except Exception as error:
        _SWEEP_FAILURES.append(report(error, show, label=f"[{HydraConfig.get().job.num}] " if sweep else ""))
        if processes.count() > 1:
            raise SystemExit(
                _SWEEP_FAILURES[-1]
            ) from None  # the others wait for this one, and torchrun ends them
        if os.environ.get("MOABENCH_MAIN") != str(os.getpid()):
            # A worker process of a launcher: only an exception, one that pickles, tells the parent that the
            # job failed.
            raise Reported(_SWEEP_FAILURES[-1]) from None
        return None


class Reported(Exception):
    """A failure whose message was already printed by the process in which it happened; carries the exit
    code."""


def report(error: Exception, show_traceback: bool, label: str = "") -> int:
    """Print `error` as one line on stderr, below its traceback if asked for; returns the exit code."""
    if isinstance(error, Reported):
        return error.args[0]
    _close_bars()
    if show_traceback:
        traceback.print_exception(error, file=sys.stderr)
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    config_error = isinstance(error, ConfigError | HydraException | OmegaConfBaseException)
    name = "" if config_error or isinstance(error, RunError) else f"{type(error).__name__}: "
    print(shown(f"{label}error: {name}{one_line(error)}"), file=sys.stderr, flush=True)
    return 2 if config_error else 1


def _close_bars() -> None:
    """End the line of a progress bar that an error cut short, so that the message has its own."""
    if tqdm := sys.modules.get("tqdm"):
        for bar in list(getattr(tqdm.tqdm, "_instances", ())):
            bar.close()


def help_text() -> str:
    """What `--help` prints: the choices are read from the folders of conf/."""
    known, prog = groups(), os.path.basename(sys.argv[0]) or "moabench"
    prog = f"python {prog}" if prog.endswith(".py") else prog
    choices = "\n".join(_wrapped(f"  {group:<8}", names) for group, names in known.items())
    keys = "\n".join(_wrapped(f"  {prefix:<8}", names) for prefix, names in _keys().items())
    return USAGE.format(prog=prog, choices=choices, tasks=_tasks(), keys=keys, defaults=_defaults())


def _tasks() -> str:
    """Every task, and every suite with what it holds."""
    suites = [_wrapped(f"  {name:<12}", list(members)) for name, members in sorted(tasks.suites().items())]
    return "\n".join([_wrapped(f"  {'task':<12}", tasks.names()), *suites])


def _keys() -> dict[str, list[str]]:
    """Dotted keys by section."""
    sections: dict[str, list[str]] = {"": []}
    for f in dataclasses.fields(RunConfig):
        cls = nested(RunConfig, f.name)
        if cls is not None:
            sections[f"{f.name}."] = [g.name for g in dataclasses.fields(cls)]
        elif f.name != "method":
            sections[""].append(f.name)
    return sections


def _defaults() -> str:
    """The default choices, as one would type them."""
    import yaml

    chosen = yaml.safe_load((CONF / "config.yaml").read_text())
    groups = {
        group: choice
        for entry in chosen["defaults"]
        if isinstance(entry, dict)
        for group, choice in entry.items()
    }
    return f"method={groups['method']} task={chosen['task']} model={groups['model']}"


def _wrapped(head: str, names: list[str], width: int = 110) -> str:
    import textwrap

    return textwrap.fill(
        ", ".join(names),
        width,
        initial_indent=head,
        subsequent_indent=" " * len(head),
        break_on_hyphens=False,
    )


class Interrupts:
    """What Ctrl-C does, and SIGTERM (a scheduler's preemption): the first ends the run, recorded as
    interrupted and resumable; further ones do not disturb that, until the third leaves at once. Never a
    traceback."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, signum: int, frame: Any) -> None:
        self.count += 1
        if self.count == 1:
            raise KeyboardInterrupt
        if self.count > 2:
            os._exit(130)
        os.write(2, b"stopping; once more leaves at once\n")
