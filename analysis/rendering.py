"""One table, four ways to print it: terminal, Markdown, LaTeX (booktabs), CSV. The HTML report uses the same
cells."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moabench.benchmarks.machine.terminal import shown
from moabench.methods.spec import ConfigError, nearest

from .comparing import number
from .statistics import Interval


@dataclass(frozen=True)
class Column:
    """`form`: how its values are written, a key of `FORMS`."""

    key: str
    title: str
    form: str = "text"


@dataclass(frozen=True)
class Table:
    """Rows map column keys to values; None and NaN are empty cells. `best` and `tied`: (row, key) of the
    cells to be marked."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[Mapping[str, Any], ...]
    notes: tuple[str, ...] = ()
    best: frozenset[tuple[int, str]] = field(default_factory=frozenset)
    tied: frozenset[tuple[int, str]] = field(default_factory=frozenset)

    def cells(self) -> list[list[str]]:
        """What stands in each cell."""
        return [[text(row.get(column.key), column.form) for column in self.columns] for row in self.rows]

    def shown(self) -> Table:
        """Without columns that no row fills."""
        kept = tuple(c for c in self.columns if any(text(row.get(c.key), c.form) for row in self.rows))
        return Table(self.title, kept, self.rows, self.notes, self.best, self.tied)

    def _repr_markdown_(self) -> str:
        """What a notebook shows."""
        return markdown(self.shown())

    def sorted_by(self, key: str) -> Table:
        """Rows by a column: text and sizes ascending, scores descending, empty cells last. Raises ConfigError
        for an unknown column."""
        column = next((c for c in self.columns if key in (c.key, c.title)), None)
        if column is None:
            raise ConfigError(f"sort={key!r}: no such column.{nearest(key, [c.key for c in self.columns])}")
        order = sorted(range(len(self.rows)), key=lambda i: _rank(self.rows[i].get(column.key), column.form))
        place = {old: new for new, old in enumerate(order)}
        marks = [frozenset((place[row], k) for row, k in cells) for cells in (self.best, self.tied)]
        return Table(self.title, self.columns, tuple(self.rows[i] for i in order), self.notes, *marks)


def _share(value: float | Interval) -> str:
    value, low, high = value if isinstance(value, tuple) else (value, math.nan, math.nan)
    return f"{100 * value:.1f}" + ("" if math.isnan(high) else f" ± {50 * (high - low):.1f}")


def _points(value: float | Interval) -> str:
    value, low, high = value if isinstance(value, tuple) else (value, math.nan, math.nan)
    return f"{100 * value:+.1f}" + ("" if math.isnan(low) else f" [{100 * low:+.1f}, {100 * high:+.1f}]")


FORMS: dict[str, Callable[[Any], str]] = {
    "text": shown,
    "share": _share,  # 0.613 -> 61.3; with its interval 61.3 ± 1.2
    "points": _points,  # a difference: +1.2 [-0.4, +2.8]
    "count": lambda value: f"{value:,.0f}",
    "number": lambda value: f"{value:.3g}",
    "milliseconds": lambda value: f"{1e3 * value:.3g}",
    "megabytes": lambda value: f"{value / 1e6:,.0f}",
    "p": number,
}
"""How a value is written."""

SCORES = {"share", "points"}
"""Forms of which more is better."""


PROSE = {"remarks", "apart", "reason", "value"}
"""Columns whose text may go over several lines."""


def text(value: Any, form: str) -> str:
    """A value as it stands in a cell; nothing for what is missing."""
    if value is None or (
        isinstance(value, float | Interval) and math.isnan(value[0] if isinstance(value, tuple) else value)
    ):
        return ""
    return FORMS[form](value)


def plain_value(value: Any) -> Any:
    """What a cell sorts by."""
    return value.value if isinstance(value, Interval) else value


def terminal(table: Table, styled: bool = False) -> str:
    """As wide as its content; `styled`: bold and underlined by the terminal's own means."""
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    drawn = RichTable(
        title=Text(shown(table.title), style="table.title"),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for column in table.columns:
        prose = column.key in PROSE
        justify = "left" if column.form == "text" else "right"
        drawn.add_column(
            Text(shown(column.title)),
            justify=justify,
            no_wrap=not prose,
            overflow="fold",
            max_width=50 if prose else None,
        )
    for i, cells in enumerate(table.cells()):
        drawn.add_row(
            *(Text(cell, style=_marked(table, i, j, "bold", "underline", "")) for j, cell in enumerate(cells))
        )
    file = io.StringIO()
    console = Console(file=file, width=1000, highlight=False, force_terminal=styled)
    console.print(drawn)
    for note in table.notes:
        console.print(shown(note), style="dim", markup=False, soft_wrap=True)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines()) + "\n"


def markdown(table: Table) -> str:
    """GitHub's tables; best in bold, ties underlined."""
    lines = [f"**{_md(table.title)}**", ""] if table.title else []
    lines.append("| " + " | ".join(_md(c.title) for c in table.columns) + " |")
    lines.append("|" + "|".join("---" if c.form == "text" else "---:" for c in table.columns) + "|")
    for i, cells in enumerate(table.cells()):
        marked = [
            _marked(table, i, j, "**{}**", "<u>{}</u>").format(_md(cell)) if cell else cell
            for j, cell in enumerate(cells)
        ]
        lines.append("| " + " | ".join(marked) + " |")
    return "\n".join([*lines, "", *(f"{_md(note)}\n" for note in table.notes)]).rstrip() + "\n"


def latex(table: Table) -> str:
    """A `table` environment for booktabs; best in bold, ties underlined, notes in the caption."""
    spec = "".join("l" if c.form == "text" else "r" for c in table.columns)
    rows = []
    for i, cells in enumerate(table.cells()):
        marked = [
            _marked(table, i, j, "\\textbf{{{}}}", "\\underline{{{}}}").format(_tex(cell)) if cell else cell
            for j, cell in enumerate(cells)
        ]
        rows.append(" & ".join(marked) + r" \\")
    head = " & ".join(_tex(c.title) for c in table.columns) + r" \\"
    caption = _tex(" ".join([f"{table.title}.", *table.notes]))
    body = [r"\toprule", head, r"\midrule", *rows, r"\bottomrule"]
    lines = [
        r"\begin{table}",
        r"  \centering",
        f"  \\caption{{{caption}}}",
        f"  \\begin{{tabular}}{{{spec}}}",
    ]
    return "\n".join([*lines, *(f"    {line}" for line in body), r"  \end{tabular}", r"\end{table}", ""])


def as_csv(table: Table) -> str:
    """Plain values, shares as 0..1; an interval is three columns: value, low, high."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    wide = {c.key for c in table.columns if any(isinstance(row.get(c.key), Interval) for row in table.rows)}
    writer.writerow(
        [
            _csv(name)
            for c in table.columns
            for name in ((c.key, f"{c.key}_low", f"{c.key}_high") if c.key in wide else (c.key,))
        ]
    )
    for row in table.rows:
        line: list[Any] = []
        for column in table.columns:
            value = row.get(column.key)
            parts = (
                (value if isinstance(value, Interval) else (value, None, None))
                if column.key in wide
                else (value,)
            )
            line += [_csv(part) for part in parts]
        writer.writerow(line)
    return file.getvalue()


FORMATS: dict[str, Callable[..., str]] = {
    "terminal": terminal,
    "markdown": markdown,
    "latex": latex,
    "csv": as_csv,
}
"""Name -> how a table is printed."""


def render(tables: Sequence[Table], form: str, styled: bool = False) -> str:
    """Tables one after the other; `styled`: for a terminal that shows bold and underlined. Raises ConfigError
    for an unknown format."""
    if form not in FORMATS:
        raise ConfigError(f"format={form!r}: no such format.{nearest(form, FORMATS)}")
    if form == "csv":
        return "\n".join(map(as_csv, tables))
    options = {"styled": styled} if form == "terminal" else {}
    return "\n".join(FORMATS[form](table.shown(), **options) for table in tables)


def _marked(table: Table, row: int, column: int, bold: str, under: str, plain: str = "{}") -> str:
    place = (row, table.columns[column].key)
    return bold if place in table.best else under if place in table.tied else plain


def _rank(value: Any, form: str) -> tuple:
    value = plain_value(value)
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return (1, 0)
    return (0, value) if isinstance(value, str) else (0, -value if form in SCORES else value)


def _md(text: str) -> str:
    """Text in a cell of GitHub's tables. A bar after a backslash ends the cell all the same in some readers,
    so that it is written as HTML does where one stands before it."""
    text = shown(text).replace("<", "&lt;").replace("`", "\\`")
    return text.replace("\\|", "\\\\&#124;").replace("|", "\\|")


def _csv(value: Any) -> Any:
    """A spreadsheet takes text that begins so for a formula, and runs it."""
    if isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, str):
        return ("'" if value.startswith(("=", "+", "-", "@", "\t", "\r")) else "") + shown(value)
    return value


TEX = {char: f"\\{char}" for char in "&%$#_{}"} | {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$",
    "<": r"$<$", ">": r"$>$",
}  # fmt: skip
"""Characters that LaTeX reads otherwise."""


def _tex(cell: str) -> str:
    return "".join(TEX.get(char, char) for char in shown(cell))
