"""The sizes of a method's experts (rank, bottleneck width, prompt length), and a method with others."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from . import catalog
from .catalog import Method

Size = int | tuple[int, ...]


@dataclass(frozen=True)
class Dial:
    """The size of the experts of one bank: an option, where it stands in the method's data, its value
    there."""

    keys: tuple[str, ...]
    bank: Any  # an Experts
    label: str

    @property
    def size(self) -> Size:
        return getattr(self.bank, self.bank.size)

    def at(self, scale: float) -> Size:
        """The size times `scale`, rounded down, at least 1."""
        return (
            tuple(_down(part * scale) for part in self.size)
            if isinstance(self.size, tuple)
            else _down(self.size * scale)
        )

    def next(self, scale: float) -> float:
        """The least scale above `scale` at which the size is larger."""
        parts = self.size if isinstance(self.size, tuple) else (self.size,)
        return min(max(2, int(part * scale + 1e-9) + 1) / part for part in parts)

    def changes(self, size: Size) -> dict[str, Any]:
        """What to override in the method's data."""
        options: dict[str, Any] = {self.bank.size: list(size) if isinstance(size, tuple) else size}
        if hasattr(self.bank, "alpha") and not self.bank.rslora:
            options["alpha"] = self.bank.alpha * total(size) / total(self.size)
        for key in reversed(self.keys):
            options = {key: options}
        return options


@functools.cache
def sized() -> list[str]:
    """The shipped methods that have a size."""
    return [name for name in catalog.names() if dials(catalog.parse(catalog.raw(name)))]


def _down(value: float) -> int:
    return max(1, int(value + 1e-9))


def total(size: Size) -> int:
    return sum(size) if isinstance(size, tuple) else size


def dials(method: Method) -> list[Dial]:
    """The sizes that a budget may change."""
    found = []
    for mixture in method.mixtures:
        head = ("experts",) if mixture.name == "main" else ("also", mixture.name, "experts")
        alone = "kind" in _at(method.data, head)
        for name, bank in mixture.banks.items():
            found.append(Dial(head if alone else (*head, name), bank, f"{name} {bank.size}"))
    return found


def _at(data: Mapping[str, Any], keys: tuple[str, ...]) -> Mapping[str, Any]:
    for key in keys:
        data = data.get(key) or {}
    return data


def of_rank(data: dict[str, Any], rank: int | None) -> dict[str, Any]:
    """`data` with all sizes scaled as the first one, a rank, goes to `rank`."""
    found = dials(catalog.parse(data))
    return data if rank is None else scaled(data, {d: d.at(rank / found[0].size) for d in found})


def scaled(data: Mapping[str, Any], sizes: Mapping[Dial, Size]) -> dict[str, Any]:
    for dial, size in sizes.items():
        data = catalog.override(data, dial.changes(size))
    return dict(data)
