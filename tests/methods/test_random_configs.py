"""Any config: it trains a step on a tiny model with finite losses and gradients, or it stops with one clear
error. Nothing else.

The parts and their options are found from their dataclasses, so a new part is drawn too. In CI a few hundred
configs; `MOABENCH_CONFIGS=5000 python -m pytest tests/methods/test_random_configs.py` draws more.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import types
import typing
from typing import Any, Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import answer_only, base, batch
from tiny import given as given_facts

from moabench import methods
from moabench.methods import catalog
from moabench.methods.bank import Experts
from moabench.methods.loss import Loss
from moabench.methods.router import Router
from moabench.methods.spec import Bound, ConfigError

EXAMPLES = int(os.environ.get("MOABENCH_CONFIGS", 300))
FITTING = {
    site: sorted(kind for kind, part in Experts.kinds().items() if site in part.sites)
    for site in ("linear", "ffn", "block")
}
WRONG = st.sampled_from(["x", -1, None, 0, 1e9, [], {}, True, "1"])


def of_type(hint: Any) -> st.SearchStrategy:
    """Values of a field: mostly of its type and in range, at its bounds too."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        bound: Bound = args[1]
        low = bound.ge if bound.ge is not None else bound.gt or 0
        high = bound.le if bound.le is not None else bound.lt
        high = 9 if high is None else min(high, 9)  # sizes may be far larger, and a test then takes as long
        if args[0] is int:
            return st.integers(int(low), int(high))
        return st.floats(low, high, allow_nan=False)
    if origin is Literal:
        return st.sampled_from(args)
    if origin in (typing.Union, types.UnionType):
        return st.one_of(*(of_type(arg) for arg in args))
    if origin is tuple:
        return st.lists(of_type(args[0]), min_size=1, max_size=5)
    if hint is bool:
        return st.booleans()
    if hint is type(None):
        return st.none()
    raise AssertionError(f"no values are known for {hint}")


@st.composite
def options(draw, part: type) -> dict[str, Any]:
    """Some options of a part; now and then one that is wrong."""
    hints = typing.get_type_hints(part, include_extras=True)
    found = {}
    for field in dataclasses.fields(part):
        if field.init and draw(st.integers(0, 2)) == 0:
            rare = draw(st.integers(0, 60)) == 0
            found[field.name] = draw(WRONG if rare else of_type(hints[field.name]))
    if draw(st.integers(0, 80)) == 0:
        found["no_such_option"] = 1
    return found


@st.composite
def parts(draw, family: type, kind: str | None = None) -> dict[str, Any]:
    kind = kind or draw(st.sampled_from(sorted(family.kinds())))
    return {"kind": kind} | draw(options(family.kinds()[kind]))


@st.composite
def mixtures(draw) -> dict[str, Any]:
    """A mixture whose parts fit together more often than not."""
    site = draw(st.sampled_from(["linear", "ffn", "block"]))
    kinds = sorted(Experts.kinds()) if draw(st.integers(0, 20)) == 0 else FITTING[site]
    if site == "block" or draw(st.integers(0, 9)) == 0:
        chosen = draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=3, unique=True))
        experts = {
            kind: {k: v for k, v in draw(parts(Experts, kind)).items() if k != "kind"} for kind in chosen
        }
    else:
        experts = draw(parts(Experts, draw(st.sampled_from(kinds))))
    found = {"site": site, "experts": experts, "router": draw(parts(Router))}
    if draw(st.integers(0, 3)) == 0:
        kind = draw(st.sampled_from(sorted(Loss.kinds())))
        found["losses"] = {kind: draw(options(Loss.kinds()[kind]))}
    if site == "block":
        found["input"] = draw(st.sampled_from(["raw", "normed"]))
        found["gates"] = draw(st.sampled_from(["expert", "index", "family"]))
    return found


@st.composite
def configs(draw) -> dict[str, Any]:
    """A shipped method with changes, or one made of drawn parts; now and then with other sizes in one
    layer."""
    if draw(st.booleans()):
        data = catalog.raw(draw(st.sampled_from(catalog.names())))
        for key, family in (("experts", Experts), ("router", Router)):
            if draw(st.booleans()) and "kind" in data.get(key, {}):
                kind = draw(st.sampled_from([data[key]["kind"], *sorted(family.kinds())]))
                data = catalog.override(data, {key: {"kind": kind} | draw(options(family.kinds()[kind]))})
    else:
        data = {"name": "drawn"} | draw(mixtures())
        if draw(st.integers(0, 5)) == 0:
            data["also"] = {"more": draw(mixtures())}
    if draw(st.integers(0, 7)) == 0:
        data["layers"] = {
            draw(st.sampled_from(["0", "1", "0-1", "2"])): {"experts": draw(options(Experts.kinds()["lora"]))}
        }
    return data


@pytest.fixture(scope="module")
def frozen():
    return base()


@given(data=configs())
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    print_blob=True,
    suppress_health_check=[
        HealthCheck.function_scoped_fixture,
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
    ],
)
def test_a_config_trains_a_step_or_stops_with_one_error(frozen, data):
    try:
        model = methods.attach(copy.deepcopy(frozen), data)
    except ConfigError as error:
        text = str(error)
        assert text and "\n" not in text and len(text) < 1500
        return
    inputs = given_facts(model, batch(right=3))
    trainable = [p for p in model.parameters() if p.requires_grad]
    model.train()
    with methods.record(model) as recorder:
        loss = model(**inputs, labels=answer_only(inputs["input_ids"], prompt=3)).loss
    loss = loss + sum(recorder.losses.values())
    assert loss.isfinite()
    if trainable:
        loss.backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in trainable)
        assert any(p.grad is not None for p in trainable)
