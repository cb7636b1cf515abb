"""Tables from runs, and one table in four formats."""

import csv
import io
import math
import re

import pytest
from synthetic import TITLES, write_run

from moabench.analysis import load
from moabench.analysis import published as pub
from moabench.analysis.cli import main
from moabench.analysis.comparing import problems
from moabench.analysis.rendering import FORMATS, Column, Table, render, text
from moabench.analysis.statistics import Interval
from moabench.analysis.tables import ablation, comparisons, factors, leaderboard
from moabench.benchmarks.machine import environment, files
from moabench.methods.spec import ConfigError


@pytest.fixture(scope="module")
def problem(runs_dir):
    (found,) = problems(load(runs_dir))
    return found


def row_of(table, method):
    return next(row for row in table.rows if row["method"] == method)


def test_leaderboard(problem):
    table = leaderboard(problem)
    assert table.rows[0]["method"] == "molora"
    assert {row["method"] for row in table.rows[3:]} == {"dora", "rslora"}
    row, entry = row_of(table, "molora"), problem.entry("molora")
    accuracies = entry.finished[[f"eval/{title}/acc" for title in TITLES]].to_numpy()
    assert row["mean"].value == pytest.approx(accuracies.mean())
    assert row["mean"].low < accuracies.mean() < row["mean"].high
    assert row["gain"] == pytest.approx(accuracies.mean() - 0.25)
    assert (row["parameters"], row["step_seconds"], row["headline/max_vio"]) == pytest.approx(
        (1500, 10 / 300, 0.4)
    )
    assert "out of memory" in row_of(table, "dora")["remarks"]
    assert any("Unequal budgets: molora" in note for note in table.notes)
    assert any("No routing and collapse measures in the runs of lora" in note for note in table.notes)


def test_bold_is_the_highest_and_underlined_what_is_not_shown_to_be_lower(tmp_path):
    for seed in range(4):
        write_run(tmp_path, "molora", seed, chance=0.8), write_run(tmp_path, "mixlora", seed, chance=0.8)
        write_run(tmp_path, "lora", seed, chance=0.4)
    (problem,) = problems(load(tmp_path))
    table = leaderboard(problem)
    assert (0, "mean") in table.best
    assert {table.rows[row]["method"] for row, key in table.tied if key == "mean"} == {
        "molora",
        "mixlora",
    } - {table.rows[0]["method"]}


def test_comparisons_have_a_row_a_pair(problem):
    table = comparisons(problem, problem.pairs())
    assert len(table.rows) == 3
    row = next(row for row in table.rows if {row["a"], row["b"]} == {"molora", "lora"})
    assert (
        row["verdict"] == "molora is better"
        and row["p"] <= row["p_holm"] < 0.05
        and row["effect"] > 0
        and row["detectable"] > 0
    )


def test_ablation_takes_one_factor_at_a_time(tmp_path):
    base = {"method__router__kind": "softmax", "method__router__bias": True}
    for seed in range(2):
        write_run(tmp_path, "molora", seed, **base)
        write_run(tmp_path, "molora", seed, **base | {"method__router__kind": "topk", "method__router__k": 2})
        write_run(tmp_path, "molora", seed, **base, train__lr=1e-3)
        write_run(tmp_path, "molora", seed, **base, train__lr=1e-3, method__experts__r=4)
    (problem,) = problems(load(tmp_path))
    control = next(
        e
        for e in problem.entries
        if e.setting["train.lr"] == 3e-3 and e.setting["method.router.kind"] == "softmax"
    )
    table = ablation(problem, control)
    assert [(row["factor"], row["value"]) for row in table.rows[1:]] == [
        ("method.router", "kind=softmax -> topk, k=null -> 2"), ("train.lr", "0.003 -> 0.001"),
    ]  # fmt: skip
    assert isinstance(table.rows[1]["difference"], Interval)
    assert any("more than one factor differs" in note and "experts.r=4" in note for note in table.notes)
    assert factors(control, control) == {}


# ---- formats

TABLE = Table(
    "A & B",
    (Column("method", "method"), Column("mean", "mean %", "share"), Column("size", "size", "count")),
    (
        {"method": "moa_sparse", "mean": Interval(0.5, 0.4, 0.6), "size": 1200.0},
        {"method": "a|b", "mean": Interval(0.7, math.nan, math.nan), "size": None},
    ),
    ("A note with 5 %.",),
    frozenset({(1, "mean")}),
    frozenset({(0, "mean")}),
)


def test_markdown():
    assert render([TABLE], "markdown").splitlines() == [
        "**A & B**", "", "| method | mean % | size |", "|---|---:|---:|", "| moa_sparse | <u>50.0 ± 10.0</u> "
            "| 1,200 |",
        "| a\\|b | **70.0** |  |", "", "A note with 5 %.",
    ]  # fmt: skip


def test_latex_escapes_and_marks():
    found = render([TABLE], "latex")
    assert r"moa\_sparse & \underline{50.0 $\pm$ 10.0} & 1,200 \\" in found and r"\textbf{70.0}" in found
    assert r"\caption{A \& B. A note with 5 \%.}" in found
    assert found.index(r"\toprule") < found.index(r"\midrule") < found.index(r"\bottomrule")
    assert text(0.0004, "p") == "< 0.001"


def test_csv_has_plain_values_with_the_ends_of_intervals():
    rows = list(csv.DictReader(io.StringIO(render([TABLE], "csv"))))
    assert rows[0] == {
        "method": "moa_sparse",
        "mean": "0.5",
        "mean_low": "0.4",
        "mean_high": "0.6",
        "size": "1200.0",
    }
    assert rows[1]["mean_low"] == "" and rows[1]["size"] == ""


def test_terminal_shows_every_cell_whole():
    found = render([TABLE], "terminal")
    assert all(cell in found for cell in ("A & B", "moa_sparse", "50.0 ± 10.0", "1,200", "A note with 5 %."))


def test_sorting_moves_the_marks_too():
    found = TABLE.sorted_by("mean")
    assert [row["method"] for row in found.rows] == ["a|b", "moa_sparse"]
    assert found.best == {(0, "mean")} and found.tied == {(1, "mean")}
    with pytest.raises(ConfigError, match=r"sort='meen'.*Did you mean 'mean'"):
        TABLE.sorted_by("meen")


def test_unknown_format():
    with pytest.raises(ConfigError, match=r"Did you mean 'markdown'\?"):
        render([TABLE], "markdow")


HOSTILE = "=2+3[/b][bold]\x1b[31mred\x9b2J|a\\|b<script>`x`\u202e\ud800"
"""A formula, marks of rich, escape sequences, a table's bars, HTML, a mark that turns the writing round, half
a letter."""


@pytest.mark.parametrize("form", FORMATS)
def test_text_of_others_stands_as_it_is_and_does_nothing(form):
    """Names, reasons and metrics of a foreign run folder, in every cell, title and note."""
    table = Table(HOSTILE, (Column("m", HOSTILE), Column("v", "v")), ({"m": HOSTILE, "v": "x"},), (HOSTILE,))
    marked = Table(HOSTILE, table.columns, table.rows, (), frozenset({(0, "m")}))
    found = render([table, marked], form, styled=form == "terminal")
    for mark in ("\x1b[31m", "\x9b", "\u202e", "\ud800"):
        assert mark not in found
    assert found.encode("utf-8") and "red" in found and "2+3" in found
    if form == "terminal":
        assert "[/b][bold]" in found
    if form == "csv":
        cells = [cell for row in csv.reader(io.StringIO(found)) for cell in row]
        assert cells and not any(cell.startswith(("=", "+", "-", "@")) for cell in cells)
    if form == "markdown":
        assert "<script>" not in found
        rows = [line for line in found.splitlines() if line.startswith("|")]
        assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {3}, "as many cells as columns"


def test_a_number_below_zero_is_no_formula():
    table = Table("", (Column("a", "a", "points"),), ({"a": -0.25},))
    assert render([table], "csv") == "a\n-0.25\n"


# ---- published


@pytest.fixture
def results(tmp_path):
    lines = [
        ",".join(pub.NEEDED),
        "Soft MoLoRA,2309.1,Tiny,own,zero-shot log-likelihood,ARC-e,accuracy,60.0",
        "molora,2309.1,Tiny,own,zero-shot log-likelihood,ARC-e,accuracy,61.0",
        "MoLoRA,2309.2,Llama-2-7B,own,log-likelihood,ARC-c,accuracy,62.0",
        "MoLoRA,2309.3,tiny,own,generate and match,ARC-c,accuracy,63.0",
        "MoLoRA,2309.4,tiny,own,log-likelihood,ARC-c,pass@1,63.0",
    ]
    file = tmp_path / "results.csv"
    file.write_text("\n".join(lines))
    return file


def test_published_are_joined_by_method_base_task_and_protocol(problem, results):
    table = pub.published(problem, pub.read(results))
    (row,) = table.rows
    assert (row["method"], row["task"], row["theirs"], row["arxiv"]) == ("molora", "arc_easy", 0.61, "2309.1")
    ours = problem.entry("molora").finished[f"eval/{TITLES[0]}/acc"].mean()
    assert row["difference"].value == pytest.approx(ours - 0.61)
    assert "questions: public data set / built-in world" in row["apart"]


def test_what_differs_is_listed_where_the_join_is_relaxed(problem, results):
    rows = pub.published(problem, pub.read(results), across=("base model", "protocol")).rows
    assert {row["arxiv"] for row in rows} == {"2309.1", "2309.2", "2309.3"}
    assert any("base model: Llama-2-7B / tiny" in row["apart"] for row in rows)
    assert any("protocol: generate and match / loglikelihood" in row["apart"] for row in rows)


def test_names_by_hand(problem, results):
    rows = pub.published(problem, pub.read(results), names={"Soft MoLoRA": "lora"}).rows
    assert {(row["method"], row["theirs"]) for row in rows} == {("lora", 0.6), ("molora", 0.61)}


def test_same_method():
    assert pub.same_method("Sparse MoA", "moa_sparse", {}) and pub.same_method("MixLoRA", "mixlora", {})
    assert not pub.same_method("LoRA r16", "lora", {}) and not pub.same_method(
        "MoE-LoRA top-2", "moe_lora_topk", {}
    )


def test_a_file_that_lacks_a_column(tmp_path):
    (tmp_path / "bad.csv").write_text("method,arxiv,base,train_data,protocol,dataset,metric,value\n")
    with pytest.raises(ConfigError, match="no column 'base_model'"):
        pub.read(tmp_path / "bad.csv")


# ---- command line


def test_table_to_a_file_in_every_format(runs_dir, tmp_path, capsys):
    for form in FORMATS:
        file = tmp_path / f"table.{form}"
        assert (
            main(["table", str(runs_dir), "--format", form, "--out", str(file), "--sort", "parameters"]) == 0
        )
        assert "molora" in file.read_text()
    assert "9 of 11 runs are finished (1 failed, 1 interrupted)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["table", "{runs}", "--sort", "parametres"], "Did you mean 'parameters'?"),
        (["table", "{runs}", "--format", "latec"], "Did you mean 'latex'?"),
        (["table", "{runs}", "--where", "metod == 1"], "Did you mean 'method'?"),
        (["table", "{runs}", "--where", "seed == 99"], "no run is left"),
        (["table", "{runs}/nowhere"], "is no folder; expected a folder with <run>/status.json"),
        (["ablation", "{runs}", "--control", "moloora"], "Did you mean 'molora'?"),
        (["published", "{runs}", "--results", "no.csv"], "no such file"),
        (["published", "{runs}", "--results", "/dev/null"], "no such file"),
        (["tabel", "{runs}"], "invalid choice: 'tabel'"),
    ],
)
def test_mistakes_are_one_line_that_helps(runs_dir, capsys, words, message):
    assert main([word.format(runs=runs_dir) for word in words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1


@pytest.mark.parametrize(
    "content", [b"", b"\n\n", b"\xff\xfe\x00", b'a,b\n"'], ids=["empty", "blank", "binary", "cut"]
)
def test_published_results_that_are_no_table(runs_dir, tmp_path, capsys, content):
    file = tmp_path / "results.csv"
    file.write_bytes(content)
    for command in (["published", str(runs_dir)], ["report", str(runs_dir), "-o", str(tmp_path / "r.html")]):
        assert main([*command, "--results", str(file)]) == 2
        error = capsys.readouterr().err
        assert "results=" in error and error.count("\n") == 1


@pytest.mark.parametrize("section", ["train", "data", "mix", "budget", "experiment", "environment"])
def test_a_report_of_an_older_schema(tmp_path, section):
    """Whole sections are missing, or all that was in them."""
    for seed in range(2):
        for method in ("lora", "molora"):
            path = write_run(tmp_path, method, seed)
            if section == "environment":
                (path / "environment.json").unlink()
                continue
            config = files.read_yaml(path / "config.yaml")
            config[section] = {}
            files.write_yaml(path / "config.yaml", config)
    page = tmp_path / "report.html"
    assert main(["report", str(tmp_path), "-o", str(page)]) == 0 and "molora" in page.read_text()


@pytest.mark.parametrize(
    "query",
    [
        "@pd.io.common.os.system('touch x') == 0", "method.str.contains('l')", "__import__('os')", "seed[0]",
        "(lambda: 1)()", "[x for x in method]", "seed ** 9 ** 9 ** 9", "'a' * 9999999999 == method", "1 == 1",
        "seed == " + "(" * 500, "method == (", "seed := 3", "`no such` == 1", "seed == 1; seed", "f'{seed}'",
        "", "index == 1", "method < 3",
    ],
)  # fmt: skip
def test_a_condition_reads_columns_and_runs_nothing(runs_dir, query):
    with pytest.raises(ConfigError, match=r"where=.*Expected a condition on columns of the runs"):
        load(runs_dir).where(query)


@pytest.mark.parametrize(
    ("query", "count"),
    [
        ("seed == 1", 3), ('method == "lora" and seed < 2', 2), ("method in ['lora', 'dora']", 4),
        ("not (seed == 0)", 6), ("`train.lr` == 1e-3", 3), ("state != 'finished' or seed == 2", 5),
        ("(seed == 1) & (method == 'lora')", 1), ("method == '`@x`'", 0), ("seed > -1 and ~(seed > 0)", 5),
        ("0 < seed <= 2", 6), ("accuracy - 0.5 > 0 and seed + 1 == 1", 3),
    ],
)  # fmt: skip
def test_conditions(runs_dir, query, count):
    assert len(load(runs_dir).where(query).runs) == count


def test_nothing_finished_is_said(tmp_path, capsys):
    write_run(tmp_path, state="failed", reason="RunError: out of memory")
    assert main(["table", str(tmp_path)]) == 2
    assert "no run is finished: 0 of 1 runs are finished (1 failed)" in capsys.readouterr().err


def test_a_run_of_two_versions_is_flagged(tmp_path):
    """Resumed with another commit and number of threads: in the table, and whatever else differs."""
    for seed in range(2):
        path = write_run(tmp_path, "lora", seed)
        write_run(tmp_path, "molora", seed)
        file = path / "environment.json"
        first = files.read_json(file)
        second = first | {"threads": 2, "code": {"commit": "deed" * 10, "dirty": False}}
        if seed == 0:
            files.write_json(file, environment.after(first, second))
    (problem,) = problems(load(tmp_path))
    remarks = {row["method"]: row["remarks"] for row in leaderboard(problem).rows}
    assert "resumed with other code.commit, threads" in remarks["lora"] and "resumed" not in remarks["molora"]


def test_environments_of_all_attempts_are_kept_and_equal_ones_once():
    a, b, c = ({"threads": n, "packages": {"torch": "1"}} for n in (1, 2, 3))
    first = environment.after(None, a)
    again = environment.after(first, a)
    assert first == again == a and environment.changed(again) == []
    third = environment.after(environment.after(again, b), c)
    assert third["threads"] == 3 and third["before"] == [a, b] and environment.changed(third) == ["threads"]
