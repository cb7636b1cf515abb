"""Every part has an independent slow form, found by its name, and no form is left without its part.

Run: python -m pytest tests/methods/test_references.py
"""

from __future__ import annotations

import pytest
import references
from references.rules import MOMENTS

from moabench.methods import catalog
from moabench.methods.bank import Experts
from moabench.methods.loss import Loss
from moabench.methods.router import Router
from moabench.methods.rule import Rule

KINDS = {"routers": Router.kinds(), "experts": Experts.kinds(), "losses": Loss.kinds(), "rules": Rule.kinds()}
PARTS = {family: set(kinds) for family, kinds in KINDS.items()} | {"methods": set(catalog.names())}


@pytest.mark.parametrize(
    ("family", "name"), [(family, name) for family, names in PARTS.items() for name in sorted(names)]
)
def test_every_part_has_a_reference(family, name):
    references.of(family, name)


@pytest.mark.parametrize("family", references.FAMILIES)
def test_no_reference_is_left_over(family):
    assert not set(references.names(family)) - PARTS[family]


@pytest.mark.parametrize("kind", sorted(PARTS["experts"]))
def test_experts_are_written_for_a_place(kind):
    places = ("add_to_linear", "around_linear", "feed_forward", "in_attention")
    found = [place for place in places if hasattr(references.of("experts", kind), place)]
    assert found, f"references/experts/{kind}.py: expected a loop for a place, one of {', '.join(places)}"


@pytest.mark.parametrize("kind", sorted(PARTS["rules"]))
def test_rules_are_written_for_their_moments(kind):
    for moment in MOMENTS:
        defined = getattr(Rule.of_kind(kind, ""), moment) is not getattr(Rule, moment)
        assert defined == hasattr(references.of("rules", kind), moment), (
            f"references/rules/{kind}.py: {moment}"
        )


@pytest.mark.parametrize("name", sorted(PARTS["methods"]))
def test_mixtures_are_compared_as_a_whole(name):
    if catalog.parse(catalog.raw(name)).tuner == "mixture":
        assert references.of("methods", name).CASES, f"references/methods/{name}.py: expected a case"


def test_a_part_without_a_reference_says_what_to_write():
    with pytest.raises(
        AssertionError, match=r"expected tests/methods/references/routers/new\.py, written from"
    ):
        references.of("routers", "new")
