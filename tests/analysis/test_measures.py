"""The list of measures: names, worse ends, and that docs/measures.md shows it as it is.

pytest tests/analysis/test_measures.py
"""

import math
from pathlib import Path

import pytest
import torch

from moabench.analysis.measures import catalog as measures

PAGE = Path(__file__).resolve().parents[2] / "docs" / "measures.md"


def test_the_page_has_the_list():
    assert measures.table() in PAGE.read_text(), (
        "python -m moabench.analysis.measures.catalog prints the list as it is now"
    )


def test_every_measure_has_a_definition():
    assert all(measure.function.__doc__ for measure in measures.MEASURES.values())


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
