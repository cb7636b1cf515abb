"""A folder of synthetic runs, shared by the tests of tables, plots and reports."""

from pathlib import Path

import pytest
from synthetic import write_run


@pytest.fixture(scope="session")
def runs_dir(tmp_path_factory) -> Path:
    """Two methods that differ, one that equals the first, three seeds each; one run that failed and one cut
    off."""
    folder = tmp_path_factory.mktemp("runs")
    for seed in range(3):
        write_run(folder, "lora", seed, chance=0.55)
        write_run(folder, "molora", seed, chance=0.85, trainable=1500)
        write_run(folder, "mixlora", seed, chance=0.55, train__lr=1e-3)
    write_run(folder, "dora", 0, state="failed", reason="RunError: out of memory (20 GB). Expected less.")
    write_run(folder, "rslora", 0, state="running")
    return folder
