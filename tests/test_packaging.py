"""The wheel holds every module and every data file of the repository's packages, under the import name."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
FOLDERS = ("methods", "kernels", "benchmarks", "analysis", "conf")
DATA = (".py", ".yaml", ".json", ".safetensors", ".jinja", ".css", ".js", ".ipynb")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> set[str]:
    """Names in a wheel that is built from a copy of the tree, so that nothing is left in it."""
    pytest.importorskip("build", reason="building a wheel needs the package build")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in (*FOLDERS, "src", "pyproject.toml", "README.md", "LICENSE"):
        (source / name).symlink_to(REPOSITORY / name)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if "setuptools" in done.stdout + done.stderr and "Missing dependencies" in done.stdout + done.stderr:
        pytest.skip("building a wheel without isolation needs a newer setuptools here")
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = out.glob("*.whl")
    return set(zipfile.ZipFile(file).namelist())


def test_the_wheel_is_complete(wheel):
    wanted = {
        f"moabench/{path.relative_to(REPOSITORY).as_posix()}"
        for folder in FOLDERS
        for path in (REPOSITORY / folder).rglob("*")
        if path.suffix in DATA
        and "__pycache__" not in path.parts
        and not any(part.startswith(".") for part in path.parts[-3:])
    }
    assert len(wanted) > 50
    assert wanted - wheel == set()


def test_the_wheel_holds_nothing_else(wheel):
    assert {name.split("/")[0] for name in wheel if ".dist-info/" not in name} == {"moabench"}
    assert not any("__pycache__" in name or "/tests/" in name for name in wheel)


def test_kernels_is_no_regular_package():
    """transformers looks for the package `kernels` of Hugging Face; a regular package of ours in the working
    directory would shadow it."""
    assert not (REPOSITORY / "kernels" / "__init__.py").exists()
