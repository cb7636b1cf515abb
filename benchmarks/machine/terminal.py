"""Text of others (names, reasons, metrics of run folders) on a terminal."""

from __future__ import annotations


def shown(text: object) -> str:
    """One line in which nothing is left that a terminal obeys: control characters, escape sequences, marks
    that turn the writing round, and halves of surrogate pairs stand as `\\x1b`."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
