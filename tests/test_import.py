"""No run sees the checkout's root as a place of modules: `kernels/` there is none of Hugging Face's
`kernels`, however Python is started.

Run: python -m pytest tests/test_import.py
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
REPORT = """
import atexit, importlib.util, os

def report():
    spec = importlib.util.find_spec("kernels")
    with open(os.environ["REPORT"], "a") as file:
        file.write(f"{'moabench' in __import__('sys').modules} {spec and spec.origin}\\n")

atexit.register(report)
"""
"""Said at the end of every Python process: whether it has imported us, and where it finds `kernels`."""
WORKER = """
import joblib, moabench

def find(_):
    import importlib.util
    return importlib.util.find_spec("kernels")

found = joblib.Parallel(n_jobs=2)(joblib.delayed(find)(i) for i in range(2))
assert found == [None, None] or all(spec.origin for spec in found), found
"""
WAYS = {
    "run.py": ["run.py", "--help"],
    "run.py from elsewhere": [str(REPOSITORY / "run.py"), "--help"],
    "-m": ["-m", "moabench.analysis", "--help"],
    "-c": ["-c", "import moabench.methods"],
    "pytest": ["-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "tests/test_import.py"],
    "torchrun": ["-m", "torch.distributed.run", "--nproc-per-node", "1", "run.py", "--help"],
    "a worker": ["-c", WORKER],
}


@pytest.fixture(params=["without the real package", "with the real package"])
def installed(request, tmp_path) -> Path | None:
    """A folder on the search path, with a package `kernels` as Hugging Face's or without."""
    (tmp_path / "sitecustomize.py").write_text(REPORT)
    if request.param == "without the real package":
        return None
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("def get_kernel(*args, **kwargs): ...\n")
    return tmp_path / "kernels" / "__init__.py"


@pytest.mark.parametrize("way", WAYS)
def test_kernels_is_the_real_package_or_none(way, installed, tmp_path):
    if way == "a worker":
        pytest.importorskip("joblib")
    environment = os.environ | {
        "PYTHONPATH": str(tmp_path),
        "REPORT": str(tmp_path / "report"),
        "OMP_NUM_THREADS": "1",
    }
    cwd = tmp_path if way.endswith("elsewhere") else REPOSITORY
    done = subprocess.run(
        [sys.executable, *WAYS[way]], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    ours = [
        line.split()[1] for line in (tmp_path / "report").read_text().splitlines() if line.startswith("True")
    ]
    assert ours and set(ours) == {str(installed)}
