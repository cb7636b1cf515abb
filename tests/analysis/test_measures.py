"""Measures as they are declared: names, worse ends, that docs/measures.md shows the list as it is, and that
readers name no other.

pytest tests/analysis/test_measures.py
"""

import math
from pathlib import Path

import pytest
import torch

from moabench.analysis import tables
from moabench.analysis.measures import base
from moabench.analysis.measures import catalog as measures
from moabench.analysis.plots import curves
from moabench.benchmarks.run import summary

PAGE = Path(__file__).resolve().parents[2] / "docs" / "measures.md"


def test_the_page_has_the_list():
    assert measures.table() in PAGE.read_text(), (
        "python -m moabench.analysis.measures.catalog prints the list as it is now"
    )


def test_every_measure_has_a_definition():
    assert all(measure.function.__doc__ for measure in measures.MEASURES.values())
    assert list(measures.MEASURES) == sorted(measures.MEASURES)


def test_a_measure_is_one_function_with_its_metadata_above_it(monkeypatch):
    """A further measure of what a reader has is found without another edit; a name has one function."""
    monkeypatch.setattr(base, "DECLARED", declared := dict(base.DECLARED))
    before = base.measured(share=torch.full((2, 4), 0.25))

    @base.reported("load/least", "low", of="share")
    def least(share):
        """`min_e f_e`."""
        return share.amin(-1)

    found = base.measured(share=torch.full((2, 4), 0.25), other=None)
    assert list(found) == [*before, "load/least"] and found["load/least"].tolist() == [0.25, 0.25]
    assert declared["load/least"].worst == "low"
    assert "load/least" not in base.measured(tokens=torch.ones(2))
    with pytest.raises(ValueError, match="load/least: declared twice"):
        base.reported("load/least")(least)


def test_what_tables_plots_and_summaries_show_is_a_measure():
    """Names that readers without torch spell out; `loss/...` alone is none, and no picture of collapse rests
    on an auxiliary loss, which calls layers even that have collapsed onto different experts."""
    headlines = {name for headline in base.HEADLINES.values() for name in headline.measures}
    shown = {*headlines, *curves.LOAD, *curves.COLLAPSE, *(f"load/{name}" for name in summary.LOAD)}
    assert shown <= measures.MEASURES.keys()
    assert summary.COLLAPSE.keys() | tables.HEADLINE.keys() <= base.HEADLINES.keys()


def test_the_worst_site_is_at_the_worse_end():
    values = torch.tensor([0.2, 0.9, math.nan])
    assert measures.over_sites("load/max_vio", values) == pytest.approx(
        {"load/max_vio": 0.55, "load/max_vio_worst": 0.9}
    )
    assert measures.over_sites("load/effective_experts", values)[
        "load/effective_experts_worst"
    ] == pytest.approx(0.2)
    assert measures.over_sites("load/mean_active", values) == pytest.approx({"load/mean_active": 0.55})
    assert measures.over_sites("load/max_vio", torch.tensor([math.nan])) == {}
