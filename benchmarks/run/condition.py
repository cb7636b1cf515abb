"""Conditions on columns of a table, as `--where` takes them: comparisons and arithmetic of columns and plain
values, joined by and, or, not. No call, no attribute, no index, no variable: nothing of it is ever run but
that."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable

import pandas as pd

from moabench.methods.spec import ConfigError, nearest

QUOTED = re.compile(r"""("[^"]*"|'[^']*')|`([^`]*)`""")

NODES = (
    ast.Expression, ast.BoolOp, ast.And, ast.Or, ast.UnaryOp, ast.Not, ast.USub, ast.Invert, ast.Compare,
    ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.In, ast.NotIn, ast.BinOp, ast.BitAnd, ast.BitOr,
    ast.Add, ast.Sub, ast.Div, ast.List, ast.Tuple, ast.Load, ast.Name, ast.Constant,
)  # fmt: skip
"""What a condition is made of. No product: that of a text and a number is a long text."""

LONGEST = 1000
"""Letters of a condition."""


def kept(table: pd.DataFrame, condition: str) -> pd.DataFrame:
    """The rows for which `condition` holds; a column whose name is no word stands in backticks. Raises
    ConfigError."""
    try:
        used = _columns(condition, table.columns)
        found = table.query(condition) if used else None
    except ConfigError:
        raise
    except Exception as error:  # of a comparison of text with a number, and the like
        raise _wrong(condition, " ".join(str(error).split())) from error
    if found is None:
        raise _wrong(condition, "it names no column")
    return found


def _columns(condition: str, columns: Iterable[str]) -> set[str]:
    """The columns that a condition reads. Raises ConfigError for anything else in it."""
    names: dict[str, str] = {}

    def placed(match: re.Match) -> str:
        if match[1] is not None:
            return match[1]
        names[f"_column{len(names)}_"] = match[2]
        return list(names)[-1]

    if len(condition) > LONGEST:
        raise _wrong(condition[:50], f"longer than {LONGEST} letters")
    try:
        nodes = list(ast.walk(ast.parse(QUOTED.sub(placed, condition).strip(), mode="eval")))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise _wrong(condition, getattr(error, "msg", str(error))) from error
    for node in nodes:
        if not isinstance(node, NODES):
            raise _wrong(condition, f"{type(node).__name__} is no part of a condition")
    used = {names.get(node.id, node.id) for node in nodes if isinstance(node, ast.Name)}
    known = {str(column) for column in columns}
    for name in sorted(used - known):
        raise _wrong(condition, f"no column {name!r}", nearest(name, known))
    return used


def _wrong(condition: str, why: str, near: str = "") -> ConfigError:
    return ConfigError(f"where={condition!r}: {why}. Expected a condition on columns of the runs.{near}")
