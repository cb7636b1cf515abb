"""Plots show the numbers of the tables: read back from the figures, not looked at here."""

import math

import numpy as np
import pytest
from synthetic import write_run

from moabench.analysis import load
from moabench.analysis.comparing import problems
from moabench.analysis.plots import curves, figures, pareto, routing, save
from moabench.analysis.plots.tokens import token_usage
from moabench.benchmarks.machine import files
from moabench.methods.spec import ConfigError


@pytest.fixture(scope="module")
def problem(runs_dir):
    (found,) = problems(load(runs_dir))
    return found


def image(axis):
    return axis.images[0].get_array()


def test_front_by_hand():
    points = [(1, 0.5), (2, 0.4), (2, 0.6), (3, 0.6), (4, 0.9), (0.5, math.nan), (1, 0.45)]
    assert pareto.front(points) == [0, 2, 4]
    assert pareto.front([(math.nan, 0.5)]) == []


def test_cost_shows_mean_accuracy_at_the_mean_cost(problem):
    (plot,) = pareto.cost(problem)
    axis = plot.figure.axes[0]
    shown = {line.get_label(): line for line in axis.containers}
    for entry in problem.finished:
        line = shown[entry.label].lines[0]
        assert line.get_xdata()[0] == entry.mean("params/trainable")
        assert line.get_ydata()[0] == pytest.approx(100 * entry.mean("accuracy"))


def test_learning_curves_are_means_over_seeds_with_a_band(tmp_path):
    for seed, factor in ((0, 1.0), (1, 3.0)):
        run = write_run(tmp_path, "lora", seed)
        files.write_parquet(
            run / "history.parquet", [{"step": s, "loss/task": factor / s} for s in (1, 2, 4)]
        )
    (problem,) = problems(load(tmp_path))
    (plot,) = curves.learning(problem)
    axis = plot.figure.axes[0]
    assert axis.lines[0].get_ydata() == pytest.approx([2.0, 1.0, 0.5])
    ends = axis.collections[0].get_paths()[0].vertices[:, 1]
    half = 12.706 * math.sqrt(2) / math.sqrt(2)  # Student's interval of two seeds, here of 1 and 3
    assert (ends.min(), ends.max()) == pytest.approx((2 - half, 2 + half), rel=1e-4)
    low, high = axis.get_ylim()  # as tall as the seeds need, which are further apart than nothing
    assert 0.1 < low <= 0.25 and 3.0 <= high < 6


def test_load_map_is_share_times_experts_of_one_seed(problem):
    (plot,) = routing.load_maps(problem)
    entry = next(e for e in problem.finished if e.method == "mixlora")
    run = entry.finished["run"].iloc[0]
    rows = problem.study.routing
    rows = rows[(rows.run == run) & rows.skill.isna()]
    share = rows.assign(load=rows.soft_share * rows.tokens).pivot_table(
        index="site", columns="index", values="load", aggfunc="sum"
    )
    share = share.div(share.sum(axis=1), axis=0).to_numpy()
    axis = next(axis for axis in plot.figure.axes if axis.get_title().startswith("mixlora"))
    assert axis.get_title().endswith("seed 0")
    assert np.allclose(image(axis), 4 * share)


def test_an_expert_without_tokens_keeps_its_place(tmp_path):
    """Expert 1 of three has no row in the co-activation matrix: rows must not move up."""
    run = write_run(tmp_path, "molora")
    entries = [(0, 1, 0.0), (0, 2, 0.5), (2, 0, 0.25), (2, 1, 0.0)]
    rows = [
        {"step": 9, "site": "model.layers.0.q", "name": "coactivation", "i": i, "j": j, "value": v}
        for i, j, v in entries
    ]
    files.write_parquet(run / "matrices.parquet", rows)
    (problem,) = problems(load(tmp_path))
    (plot,) = routing.coactivation(problem)
    values = image(plot.figure.axes[0])
    assert values.shape == (3, 3) and values.mask[1].all()
    assert values[2, 0] == 0.25 and values[0, 2] == 0.5


def test_specialisation_is_the_lift_at_the_site_where_it_is_strongest(tmp_path):
    """Site 1: expert 0 takes all of skill a, expert 1 all of b; site 0: both the same."""
    run = write_run(tmp_path, "molora")
    rows = []
    for site, shares in (
        ("model.layers.0.q", ((0.5, 0.5), (0.5, 0.5))),
        ("model.layers.1.q", ((1.0, 0.0), (0.0, 1.0))),
    ):
        for skill, of in zip(("a", "b"), shares, strict=True):
            rows += [
                {
                    "split": "test",
                    "task": "t@builtin:label",
                    "skill": skill,
                    "site": site,
                    "expert": f"e{i}",
                    "index": i,
                    "tokens": 10,
                    "assignments": 10 * of[i],
                }
                for i in (0, 1)
            ]
    files.write_parquet(run / "routing.parquet", rows)
    (problem,) = problems(load(tmp_path))
    (plot,) = routing.specialisation(problem)
    axis = plot.figure.axes[0]
    assert axis.get_title() == "by skill, site 1 q"
    assert np.allclose(image(axis), [[2, 0], [0, 2]])


def test_every_plot_can_be_written(problem, tmp_path):
    plots = figures(problem)
    names = [plot.name for plot in plots]
    assert {
        "cost",
        "learning",
        "load",
        "collapse",
        "load_map",
        "coactivation-molora",
        "specialisation-mixlora",
    } <= set(names)
    assert len(set(names)) == len(names) and all(plot.caption for plot in plots)
    for file in save(plots[:2], tmp_path, "svg") + save(plots[:1], tmp_path, "pdf"):
        assert file.stat().st_size > 1000


def test_runs_of_an_older_schema_have_the_plots_that_they_have_data_for(tmp_path):
    write_run(tmp_path, "molora", probes=False)
    (problem,) = problems(load(tmp_path))
    assert {plot.name for plot in figures(problem)} == {"cost", "learning"}


def test_token_usage_is_what_the_router_gave(llama, tokenizer):
    import peft

    import moabench.methods as methods

    experts = {"n": 3, "r": 2, "alpha": 2, "targets": ["q", "v"]}
    model = peft.get_peft_model(llama, methods.load("molora", experts=experts)).eval()
    text = "The red fox sleeps."
    plot = token_usage(model, tokenizer, text, ["model.layers.1.q"])
    found = methods.capture_routing(model, tokenizer(text, return_tensors="pt"))["model.layers.1.q"]
    assert np.allclose(image(plot.figure.axes[0]).T, found.weights.numpy().reshape(-1, 3))
    with pytest.raises(ConfigError, match="no routed site"):
        token_usage(model, tokenizer, text, ["model.layers.9.q"])
