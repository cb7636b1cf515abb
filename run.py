"""`python run.py method=moa_sparse task=arc`: train one method on one task and evaluate it. `--help` lists
the choices."""

import sys
from pathlib import Path

# This checkout's own code, and not its root, in which `kernels/` would be taken for a package of that name.
sys.path[0] = str(Path(__file__).resolve().parent / "src")

from moabench.benchmarks.command.cli import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
