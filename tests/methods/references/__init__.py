"""The slow, independent form of every part, in one file each: `references/<family>/<name>.py`.

Loops over tokens and experts in fp64, written from the method cards' equations. The tests find a part's file
by its name (`of`), so that no list names the parts. What each file must say stands in `__init__.py` of its
family; what it may leave out has its value there. llama.py is a whole model that asks them.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from types import ModuleType, SimpleNamespace

FAMILIES = ("routers", "experts", "losses", "rules", "methods")


def names(family: str) -> list[str]:
    """The parts of a family that have a reference."""
    package = importlib.import_module(f"{__name__}.{family}")
    return sorted(module.name for module in pkgutil.iter_modules(package.__path__))


@cache
def of(family: str, name: str) -> SimpleNamespace:
    """What the reference of a part says. Fails where there is none, or where it leaves out what it must
    say."""
    package = importlib.import_module(f"{__name__}.{family}")
    file = f"tests/methods/references/{family}/{name}.py"
    try:
        module = importlib.import_module(f"{__name__}.{family}.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"{__name__}.{family}.{name}":
            raise
        text = f"{family}/{name} has no reference: expected {file}, written from its card (docs/adding.md)."
        raise AssertionError(text) from None
    missing = [key for key in package.REQUIRED if not hasattr(module, key)]
    assert not missing, f"{file}: expected it to say {', '.join(missing)}; {package.__name__} explains them."
    return SimpleNamespace(**(_public(package) | _public(module)))


def _public(module: ModuleType) -> dict:
    return {key: value for key, value in vars(module).items() if not key.startswith("_")}
