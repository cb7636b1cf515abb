"""Every promise of docs/promises.md names a test that there is."""

import re
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]


def test_every_promise_has_its_test():
    rows = [line for line in (REPOSITORY / "docs" / "promises.md").read_text().splitlines() if "|" in line]
    promises = [row for row in rows if not re.match(r"\|(---| what \| where| input | fault )", row)]
    assert len(promises) > 15
    for row in promises:
        named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", row)
        assert named, f"no test: {row}"
        for file, test in named:
            assert f"\ndef {test}(" in (REPOSITORY / file).read_text(), f"{file}::{test}"
