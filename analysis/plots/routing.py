"""Where tokens go after training: load by layer and expert, co-activation, experts by task and skill. One run
each: experts of different seeds have no order in common, and a mean over them shows nothing."""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
import pandas as pd

from moabench.analysis.comparing import Entry, Problem
from moabench.methods.catalog import PLACES

from .style import STYLE, Plot, file_name, first_run, heat, panels, routed, short_site

EVALUATED = "On the evaluated questions, after training."


def evaluated(problem: Problem) -> pd.DataFrame:
    """Rows of routing.parquet on evaluated questions, with `load`: units that an expert got, as shares of
    units in a soft mixture."""
    table = problem.study.routing
    if not {"split", "task", "site", "expert", "index", "tokens"} <= set(table):
        return pd.DataFrame({"run": []})
    table = table[table["split"] != "train"]
    counts = table["assignments"] if "assignments" in table else pd.Series(np.nan, index=table.index)
    for column in ("soft_share", "importance"):
        if column in table:
            counts = counts.fillna(table[column] * table["tokens"])
    return table.assign(load=counts, skill=table.get("skill"))


def load_maps(problem: Problem) -> list[Plot]:
    """Site x expert, a panel an entry: the expert's share of the site's load times the number of experts."""
    table = evaluated(problem)
    entries = routed(problem.finished, table)
    if not entries:
        return []
    maps = [_load_map(entry, table) for entry in entries]
    entries, maps = zip(
        *sorted(zip(entries, maps, strict=True), key=lambda pair: len(pair[1][0])), strict=True
    )
    figure, axes = panels(
        len(maps), width=3.3, height=[0.8 + max(1.4, 0.14 * len(values)) for values, _ in maps]
    )
    with mpl.rc_context(STYLE):
        for axis, entry, (values, seed) in zip(axes, entries, maps, strict=True):
            rows = [short_site(site) for site in values.index]
            image = heat(
                axis, values.to_numpy(float), rows, list(values.columns), (0, 2), write=values.size <= 96
            )
            axis.set_title(f"{entry.label}, seed {seed}")
            axis.tick_params(labelsize=6)
        bar = figure.colorbar(image, ax=axes, shrink=0.6, extend="max")
        bar.set_label("share x E (1: even)")
    caption = (
        "Load of each expert (columns) at each site (rows: layer, place), as a multiple of an even "
        f"share. {EVALUATED}"
    )
    return [Plot("load_map", "Load by site and expert", caption, figure)]


def coactivation(problem: Problem) -> list[Plot]:
    """Expert x expert at the first, middle and last site: the share of the tokens of the row's expert that
    use the column's too."""
    table = problem.study.matrices
    if "name" not in table:
        return []
    table = table[table["name"] == "coactivation"]
    return [_coactivation(entry, *first_run(entry, table)) for entry in routed(problem.finished, table)]


def specialisation(problem: Problem) -> list[Plot]:
    """Expert x task and expert x skill at the site where they differ most."""
    table = evaluated(problem)
    return [
        plot
        for entry in routed(problem.finished, table)
        for plot in _specialisation(entry, *first_run(entry, table))
    ]


def load_map(rows: pd.DataFrame) -> tuple[pd.DataFrame, dict[int, str]]:
    """Site x expert, share of the site's load times the number of experts, of one run's `evaluated` rows; and
    the experts' names."""
    rows = rows[rows["skill"].isna()]
    loads = rows.pivot_table(index="site", columns="index", values="load", aggfunc="sum")
    loads = loads.loc[sorted(loads.index, key=_place)]
    return loads.div(loads.sum(axis=1), axis=0).mul(loads.notna().sum(axis=1), axis=0), _names(rows)


def _load_map(entry: Entry, table: pd.DataFrame) -> tuple[pd.DataFrame, int]:
    rows, seed = first_run(entry, table)
    loads, names = load_map(rows)
    return loads.rename(columns=names), seed


def _names(rows: pd.DataFrame) -> dict[int, str]:
    """Number of an expert -> its name where it says more than the number: experts of different kinds or
    places."""
    names = rows.drop_duplicates("index").set_index("index")["expert"]
    alike = names.str.replace(r"\d+$", "", regex=True).nunique() == 1
    return {i: str(i) if alike else name.replace("parallel_adapter", "adapter") for i, name in names.items()}


def _coactivation(entry: Entry, rows: pd.DataFrame, seed: int) -> Plot:
    rows = rows[rows["step"] == rows["step"].max()]
    sites = sorted(rows["site"].unique(), key=_place)
    chosen = list(dict.fromkeys([sites[0], sites[len(sites) // 2], sites[-1]]))
    figure, axes = panels(len(chosen), width=3.0, height=2.5)
    with mpl.rc_context(STYLE):
        for axis, site in zip(axes, chosen, strict=True):
            part = rows[rows["site"] == site]
            names = range(part[["i", "j"]].to_numpy().max() + 1)  # an expert that got no token has no row
            values = (
                part.pivot(index="i", columns="j", values="value")
                .reindex(index=names, columns=names)
                .to_numpy(float, copy=True)
            )
            np.fill_diagonal(values, np.nan)
            image = heat(
                axis,
                values,
                [str(i) for i in names],
                [str(j) for j in names],
                (0, 1),
                write=values.size <= 64,
            )
            axis.set_title(short_site(site))
        axes[0].set_ylabel("tokens of expert")
        figure.supxlabel("share that also use expert", fontsize=9)
        figure.colorbar(image, ax=axes, shrink=0.8)
    caption = (
        f"{entry.label}, seed {seed}, first, middle and last site: of the tokens that use the row's expert, "
        f"the share that use the column's too. An empty row is an expert that got no token. {EVALUATED}"
    )
    return Plot(f"coactivation-{file_name(entry.label)}", f"Co-activation: {entry.label}", caption, figure)


def _specialisation(entry: Entry, rows: pd.DataFrame, seed: int) -> list[Plot]:
    tables = {"task": rows[rows["skill"].isna()], "skill": rows[rows["skill"].notna()]}
    lifts = {by: found for by, part in tables.items() if (found := _strongest(part, by)) is not None}
    if not lifts:
        return []
    widths = [len(lift.columns) for _, lift in lifts.values()]
    figure, axes = panels(len(lifts), width=max(3.0, 1.2 + 0.28 * sum(widths) / len(lifts)), height=3.1)
    names = _names(rows)
    with mpl.rc_context(STYLE):
        for axis, (by, (site, lift)) in zip(axes, lifts.items(), strict=True):
            columns = [str(name).partition("@")[0] for name in lift.columns]
            image = heat(
                axis,
                lift.to_numpy(float),
                [names[i] for i in lift.index],
                columns,
                (0, 2),
                write=lift.size <= 40,
            )
            axis.set_title(f"by {by}, site {short_site(site)}")
        axes[0].set_ylabel("expert")
        figure.colorbar(image, ax=axes, shrink=0.8, extend="max").set_label("share / expert's mean share")
    caption = (
        f"{entry.label}, seed {seed}, at the site where the experts' loads differ most between columns "
        "(chosen for it: a look at the extreme). 1: the expert gets as much of these tokens as of all; 2: "
        f"twice as much. {EVALUATED}"
    )
    return [
        Plot(f"specialisation-{file_name(entry.label)}", f"Specialisation: {entry.label}", caption, figure)
    ]


def _strongest(rows: pd.DataFrame, by: str) -> tuple[str, pd.DataFrame] | None:
    """(site, expert x column lifts) of the site with the highest mutual information of expert and column;
    None for one column."""
    found = []
    for site, part in rows.groupby("site", sort=False):
        joint = part.pivot_table(index="index", columns=by, values="load", aggfunc="sum").fillna(0.0)
        joint = joint / joint.to_numpy().sum()
        if joint.shape[1] < 2 or not np.isfinite(joint.to_numpy()).all():
            continue
        even = np.outer(joint.sum(axis=1), joint.sum(axis=0))
        with np.errstate(divide="ignore", invalid="ignore"):
            lift = joint / even
            information = np.nansum(joint * np.log(lift))
        found.append((information, site, lift))
    if not found:
        return None
    _, site, lift = max(found, key=lambda item: item[0])
    return site, lift


def _place(site: str) -> tuple[int, int, str]:
    """Order of sites: by layer, then as the model computes them."""
    layer, _, place = short_site(site).partition(" ")
    return (
        int(layer) if layer.isdigit() else -1,
        PLACES.index(place) if place in PLACES else len(PLACES),
        site,
    )
