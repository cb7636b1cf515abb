"""`python -m moabench.analysis <what> runs/ ...`: tables, plots, a report, and W&B from run folders.

Exit codes: 0 done, 2 a mistake in what was asked for, 1 anything else. Errors are one line on stderr.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from moabench.benchmarks.machine.files import RunError, write_text
from moabench.benchmarks.machine.terminal import shown
from moabench.methods.spec import ConfigError, nearest

WHAT = ("table", "ablation", "published", "plots", "report", "push")


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the command line asks for; returns the exit code."""
    try:
        given = _parser().parse_args(argv)
        given.do(given)
        return 0
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        name = "" if isinstance(error, ConfigError | RunError) else f"{type(error).__name__}: "
        print(f"error: {name}{shown(' '.join(str(error).split()))}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1


class _Parser(argparse.ArgumentParser):
    """Mistakes as ConfigError, in the words of the rest of the project."""

    def error(self, message: str) -> None:
        raise ConfigError(f"{message}. `{self.prog} --help` shows what there is.")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m moabench.analysis", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(metavar="{" + ",".join(WHAT) + "}", required=True, parser_class=_Parser)
    table = _command(
        commands, "table", _table, "leaderboard: accuracy with intervals, cost, the five measures, remarks"
    )
    _printing(table)
    table.add_argument("--sort", metavar="COLUMN", help="order of the rows (default: mean accuracy)")
    table.add_argument("--comparisons", action="store_true", help="also every pair of entries with its test")
    table.add_argument("--commands", action="store_true", help="also the command that makes each row again")
    ablation = _command(commands, "ablation", _ablation, "one factor at a time against a control")
    _printing(ablation)
    ablation.add_argument("--control", required=True, help="label or method of the entry to compare with")
    published = _command(commands, "published", _published, "published results beside ours")
    _printing(published)
    published.add_argument(
        "--results",
        required=True,
        metavar="CSV",
        help="published results, one a row (columns: moabench.analysis.published)",
    )
    published.add_argument(
        "--name",
        action="append",
        default=[],
        metavar="THEIRS=OURS",
        help="a method that the paper calls otherwise",
    )
    published.add_argument(
        "--across",
        action="append",
        default=[],
        metavar="WHAT",
        help="join although this differs: 'base model', 'protocol'",
    )
    plots = _command(commands, "plots", _plots, "every plot, as files")
    plots.add_argument("-o", "--out", default="plots", metavar="FOLDER", help="(default: plots)")
    plots.add_argument("--format", default="pdf", choices=("pdf", "png", "svg"), help="(default: pdf)")
    plots.add_argument(
        "--text", help="also which expert acts on which token of this text, by a run of each mixture"
    )
    report = _command(commands, "report", _report, "one self-contained HTML file")
    report.add_argument("-o", "--out", default="report.html", metavar="FILE", help="(default: report.html)")
    report.add_argument("--results", metavar="CSV", help="published results to show beside ours")
    push = _command(commands, "push", _push, "send finished offline runs to W&B, once each")
    push.add_argument("--dry-run", action="store_true", help="say what would be sent")
    push.add_argument("--workers", type=int, default=4, help="runs sent at a time (default: 4)")
    return parser


def _command(
    commands: argparse._SubParsersAction, name: str, do: Callable, about: str
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=about, description=about)
    parser.set_defaults(do=do)
    parser.add_argument("runs", nargs="+", metavar="RUNS", help="folders of run folders, or run folders")
    parser.add_argument(
        "--where",
        metavar="QUERY",
        help="only runs for which this holds: 'method == \"lora\" and `train.steps` > 100'",
    )
    return parser


def _printing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--format", default="terminal", help="terminal, markdown, latex or csv (default: terminal)"
    )
    parser.add_argument("-o", "--out", metavar="FILE", help="write to a file instead of the terminal")


def _study(given: argparse.Namespace):
    from moabench.benchmarks.run.reading import load

    study = load(*given.runs)
    study = study.where(given.where) if given.where else study
    if study.runs.empty:
        raise ConfigError(
            f"where={given.where!r}: no run is left."
            if given.where
            else "no run could be read: " + "; ".join(study.notes())
        )
    return study


def _problems(study):
    from .comparing import problems

    found = [problem for problem in problems(study) if problem.finished]
    if not found:
        raise ConfigError(f"no run is finished: {'; '.join(study.notes())}.")
    return found


def _show(given: argparse.Namespace, tables: list, study, more: str = "") -> None:
    from .rendering import render

    text = render(tables, given.format, styled=sys.stdout.isatty() and not given.out) + more
    if given.out:
        write_text(Path(given.out), text)
        print(given.out)
    else:
        print(text, end="")
    for note in study.notes():
        print(shown(note), file=sys.stderr)


def _table(given: argparse.Namespace) -> None:
    from .tables import comparisons, inventory, leaderboard

    study, tables = _study(given), []
    found = _problems(study)
    for problem in found:
        pairs = problem.pairs()
        table = leaderboard(problem, pairs)
        tables.append(table.sorted_by(given.sort) if given.sort else table)
        tables += [comparisons(problem, pairs)] if given.comparisons else []
    lost = inventory(study)
    tables += [lost] if lost.rows and given.format != "csv" else []
    _show(given, tables, study, _commands(found) if given.commands else "")


def _commands(found: list) -> str:
    from moabench.benchmarks.command.again import command

    lines = []
    for problem in found:
        for entry in problem.finished:
            known = command(entry.config, entry.runs["seed"])
            none = "no command of this version composes its config.yaml"
            lines += [shown(f"{entry.label}:"), shown(f"  {known or none}")]
    return "\n" + "\n".join(lines) + "\n"


def _ablation(given: argparse.Namespace) -> None:
    from .tables import ablation

    study = _study(given)
    found = [
        problem
        for problem in _problems(study)
        if any(given.control in (e.label, e.method) for e in problem.entries)
    ]
    if not found:
        labels = {
            name for problem in _problems(study) for e in problem.entries for name in (e.label, e.method)
        }
        raise ConfigError(f"control={given.control!r}: no such entry.{nearest(given.control, labels)}")
    _show(given, [ablation(problem, problem.entry(given.control)) for problem in found], study)


def _published(given: argparse.Namespace) -> None:
    from .published import published, read

    names = {}
    for pair in given.name:
        theirs, equals, ours = pair.rpartition("=")
        if not equals:
            raise ConfigError(f"name={pair!r}: expected THEIRS=OURS, as 'MoE-LoRA top-2=moe_lora_topk'.")
        names[theirs] = ours
    results, study = read(given.results), _study(given)
    _show(
        given,
        [published(problem, results, names, tuple(given.across)) for problem in _problems(study)],
        study,
    )


def _plots(given: argparse.Namespace) -> None:
    from .plots import figures, save, token_plots

    study = _study(given)
    for problem in _problems(study):
        for file in save(figures(problem), Path(given.out), given.format):
            print(file)
        if given.text:
            for file in save(token_plots(problem, given.text), Path(given.out), given.format):
                print(file)


def _report(given: argparse.Namespace) -> None:
    from .published import read
    from .report import report

    results = read(given.results) if given.results else None
    write_text(Path(given.out), report(_study(given), results))
    print(given.out)


def _push(given: argparse.Namespace) -> None:
    from .push import push

    push(_study(given), dry_run=given.dry_run, workers=given.workers)
