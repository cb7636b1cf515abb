"""MoABench. The package's rooms are the folders methods, kernels, benchmarks, analysis and conf of the
repository, linked here.

In a checkout its root must not be searched for modules: `kernels/` there would be taken for Hugging Face's
package `kernels` by whoever looks for that one (transformers, bitsandbytes). Python puts the root there by
itself for `python run.py`, `python -m`, pytest and their child processes; every one of them imports this
package before any of those.
"""

import os
import sys

_ROOT = os.path.realpath(os.path.join(os.path.dirname(__file__), "..", ".."))


def _hide_root() -> None:
    """Take the checkout's root off the module search path; an installed package has none, and nothing is
    done."""
    if os.path.isfile(os.path.join(_ROOT, "run.py")) and os.path.isdir(os.path.join(_ROOT, "kernels")):
        sys.path[:] = [entry for entry in sys.path if os.path.realpath(entry or os.getcwd()) != _ROOT]


_hide_root()
