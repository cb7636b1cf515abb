"""A stand-in for a heavy module that is imported at its first use, so that options are validated without
it."""

from __future__ import annotations

import importlib
from typing import Any


class Lazy:
    """`torch = Lazy("torch")` behaves like the module; the first attribute access imports it."""

    def __init__(self, name: str) -> None:
        self.__dict__["_name"] = name

    def __getattr__(self, attribute: str) -> Any:
        value = getattr(importlib.import_module(self._name), attribute)
        self.__dict__[attribute] = value  # the next access is a plain dictionary look-up
        return value
