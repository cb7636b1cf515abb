"""`python run.py method=moa_sparse task=arc`: train one method on one task and evaluate it. `--help` lists the choices."""

import sys

from moabench.benchmarks.cli import main

if __name__ == "__main__":
    sys.exit(main())
