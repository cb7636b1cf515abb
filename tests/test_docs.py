"""The documentation names what is there: pages of methods, links, choices, modules, commands.

`make docs` builds the pages strictly; this is what it cannot see. Run: python -m pytest tests/test_docs.py
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from moabench.benchmarks import tasks
from moabench.benchmarks.config import overrides
from moabench.benchmarks.config.choices import groups
from moabench.methods import catalog

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
ROOMS = ("analysis", "benchmarks", "kernels", "methods", "tests", "conf")
PAGES = [
    *sorted(DOCS.rglob("*.md")),
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *(page for room in ROOMS for page in sorted((ROOT / room).rglob("*.md"))),
]
BLOCK = re.compile(r"^```.*?^```", re.M | re.S)
COMMAND = re.compile(r"(?:^|`|    )python run\.py ((?:[^\n`\\#]|\\\n)+)", re.M)
"""A command of the documentation: one line, or several ended by a backslash; its comment is left out."""


def by_name(pages):
    return pytest.mark.parametrize("page", pages, ids=[str(p.relative_to(ROOT)) for p in pages])


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as mkdocs makes them."""
    heads = re.findall(r"^#+ (.*)$", BLOCK.sub("", page.read_text(encoding="utf-8")), re.M)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", head).strip().lower()) for head in heads}


def commands() -> list[list[str]]:
    """The words of every `python run.py key=value ...` in the documentation."""
    found = set()
    for page in PAGES:
        for words in COMMAND.findall(page.read_text(encoding="utf-8")):
            words = shlex.split(words.replace("\\\n", " "))
            if not {"...", "--help", "memory", "runs", "--rerun"} & set(words) and "<" not in "".join(words):
                found.add(tuple(word for word in words if word != "-m"))
    return [list(words) for words in sorted(found)]


def test_every_method_has_its_page():
    assert {page.stem for page in (DOCS / "methods").glob("*.md")} - {"index"} == set(catalog.names())


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


@by_name(PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", BLOCK.sub("", page.read_text(encoding="utf-8"))):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{target}: no such file"
        assert not anchor or anchor in anchors(file), f"{target}: no such heading"


@by_name(PAGES)
def test_named_files_and_modules_exist(page):
    text = page.read_text(encoding="utf-8")
    for name in re.findall(r"\b(?:conf/[\w./]*\w|tests/[\w/]+\.\w+)\b(?![<*])", text):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"python -m (moabench[\w.]*\w)", text) if page.name != "CHANGELOG.md" else ():
        place = ROOT / Path(*name.split(".")[1:])
        assert place.with_suffix(".py").exists() or (place / "__main__.py").exists(), name


@by_name(PAGES)
def test_named_choices_exist(page):
    """`method=`, `task=`, `+experiment=` and the other groups, each choice of a sweep."""
    named = re.findall(r"(?<![\w./])(\w+)=\[?(\w[\w.,]*\w)", page.read_text(encoding="utf-8"))
    for key, choices in named:
        for choice in choices.split(","):
            if key == "task":
                tasks.resolve(choice)
            elif key in groups():
                assert choice in groups()[key], f"{key}={choice}"


def test_commands_compose():
    """Every key of every command is one, with a value that it takes; of a sweep the first choices."""
    for words in commands():
        first = [w.partition(",")[0] if re.fullmatch(r"[\w.]+=[^\[{('\"]*,.*", w) else w for w in words]
        first = [w for w in first if not w.startswith("hydra")]
        overrides.composed(tuple(w for w in first if "=choice(" not in w and "=tag(" not in w))


def test_what_code_cites_is_here():
    """`moa_soft.md` in a comment or docstring is a page of docs, or a file beside the code."""
    pages = {page.name for page in DOCS.rglob("*.md")} | {"README.md"}
    for room in ROOMS:
        for file in (ROOT / room).rglob("*"):
            if file.suffix not in (".py", ".yaml") or file == Path(__file__).resolve():
                continue
            for name in re.findall(r"\b(\w+\.md)\b", file.read_text(encoding="utf-8")):
                assert name in pages or (file.parent / name).exists(), f"{file.relative_to(ROOT)}: {name}"
