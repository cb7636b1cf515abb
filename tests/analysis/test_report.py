"""The report: one file, nothing fetched, every run in it, words that follow the tests."""

import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from synthetic import write_run

from moabench.analysis import load
from moabench.analysis.cli import main
from moabench.analysis.comparing import problems
from moabench.analysis.report import protocol, report, summary
from moabench.benchmarks.machine import files


@pytest.fixture(scope="module")
def page(runs_dir):
    return report(load(runs_dir))


class Places(HTMLParser):
    """Ids, links and sources of a page, and whether its tags close in order."""

    VOID = {"meta", "link", "img", "br"}

    def __init__(self):
        super().__init__()
        self.ids, self.links, self.sources, self.open = set(), set(), set(), []

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.ids.add(found.get("id"))
        if "href" in found and tag == "a":
            self.links.add(found["href"])
        if "src" in found or (tag == "link" and "href" in found):
            self.sources.add(found.get("src") or found["href"])
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def places(page):
    found = Places()
    found.feed(page)
    assert not found.open
    return found


def test_nothing_is_fetched_and_every_link_leads_somewhere(page):
    found = places(page)
    assert found.sources and all(source.startswith("data:") for source in found.sources)
    assert found.links and all(link.removeprefix("#") in found.ids for link in found.links)
    assert not re.search(r"@import|url\(|fetch\(|XMLHttp", page)


def test_every_run_has_its_page_failed_ones_too(page, runs_dir):
    study = load(runs_dir)
    assert set(study.runs["run"]) <= places(page).ids
    assert "out of memory (20 GB)" in page and "interrupted" in page


def test_leaderboard_statistics_plots_and_commands_are_there(page):
    for heading in (
        "Leaderboard",
        "Statistics",
        "Plots",
        "Each row again",
        "What was read",
        "Expert load",
        "Config",
    ):
        assert f">{heading}<" in page
    assert page.count("<figure>") >= 5
    assert "9 of 11 runs are finished (1 failed, 1 interrupted)" in page and "probes.parquet: absent" in page


def test_summary_says_what_the_tests_say(runs_dir):
    (problem,) = problems(load(runs_dir))
    words = " ".join(summary(problem, problem.pairs()))
    assert "Highest mean accuracy: molora" in words
    better = re.search(r"Shown to be better than ([^.]*)\.", words).group(1)
    assert set(better.split(", ")) == {"lora", "mixlora"}
    assert (
        "Budgets are unequal (molora)" in words
        and "mixlora (train.lr=0.001)" in words
        and "Holm over 3" in words
    )
    assert (
        "chance 25 %, frozen base 25.0 %" in words
        and "dora (failed, seed 0: RunError: out of memory" in words
    )


def test_one_seed_is_no_ranking(tmp_path):
    write_run(tmp_path, "lora", chance=0.2), write_run(tmp_path, "molora", chance=0.9)
    (problem,) = problems(load(tmp_path))
    words = " ".join(summary(problem, problem.pairs()))
    assert "Nothing is shown about lora" in words and "better" not in words


def test_what_was_cut_is_said_of_its_entry(tmp_path):
    write_run(tmp_path, "lora")
    path = write_run(tmp_path, "molora")
    (problem,) = problems(load(tmp_path))
    assert "read whole" not in " ".join(summary(problem, problem.pairs()))
    metrics = files.read_json(path / "metrics.json") | {"train/cut_examples": 12, "eval/cut_requests": 0}
    files.write_json(path / "metrics.json", metrics)
    (problem,) = problems(load(tmp_path))
    words = " ".join(summary(problem, problem.pairs()))
    assert (
        "Not all was read whole: molora (12 training texts lost their beginning (train.max_length))" in words
    )


def test_text_of_runs_is_escaped(tmp_path):
    write_run(tmp_path, "lora")
    write_run(tmp_path, "molora", state="failed", reason="RunError: <script>alert(1)</script>")
    page = report(load(tmp_path))
    assert "<script>alert" not in page and "&lt;script&gt;alert" in page


def test_nothing_finished_is_a_report_too(tmp_path):
    write_run(tmp_path, "lora", state="failed", reason="RunError: out of memory")
    assert "No run of this problem is finished." in report(load(tmp_path))


def test_command_line(runs_dir, tmp_path, capsys):
    file = tmp_path / "sub" / "report.html"
    assert main(["report", str(runs_dir), "-o", str(file), "--where", "method == 'lora'"]) == 0
    assert capsys.readouterr().out.strip() == str(file) and "<!doctype html>" in file.read_text()


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
def test_in_a_browser_tables_sort_and_runs_have_pages(page, runs_dir, tmp_path):
    """The page's own script, run by a real browser: a click on `parameters` sorts, a run's address shows that
    run alone."""
    find = "[...document.querySelectorAll('th button')].find((b) => b.textContent == 'parameters')"
    click = f"<script>for (const _ of [1, 2]) {find}.click();</script>"
    (tmp_path / "page.html").write_text(page.replace("</body>", click + "</body>"))
    run = load(runs_dir).finished["run"].iloc[0]
    flags = (
        "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync"
    )
    command = [
        "chromium",
        *flags.split(),
        f"--user-data-dir={tmp_path}/profile",
        "--enable-logging=stderr",
        "--dump-dom",
    ]
    done = subprocess.run(
        [*command, f"file://{tmp_path}/page.html#{run}"], capture_output=True, text=True, timeout=120
    )
    assert "CONSOLE" not in done.stderr
    assert re.search(r'<body class="paged on-run">', done.stdout)
    assert re.findall(r'class="run shown" id="([^"]*)"', done.stdout) == [run]
    board = done.stdout[done.stdout.index(">Leaderboard<") : done.stdout.index(">Statistics<")]
    sizes = [
        int(size.replace(",", "")) for size in re.findall(r'<td class="number "[^>]*>(1,\d00)</td>', board)
    ]
    assert sizes == [1000, 1000, 1500]


def test_the_protocol_of_a_study_is_in_its_report(tmp_path):
    """Budget, recipe and learning rates in words; rates that were tuned run by run are listed."""
    budget = {"size": "lora_r8", "match": "params", "tolerance": 0.02}
    for method, count in (("lora", 1000), ("molora", 1010)):
        for seed in (0, 1):
            changes = {
                "train__lr_grid": [1e-3, 2e-3],
                "train__accumulation": 2,
                "experiment": {"name": "small", "about": "two methods"},
            }
            folder = write_run(tmp_path, method, seed=seed, trainable=count, budget=budget, **changes)
            metrics = files.read_json(folder / "metrics.json")
            files.write_json(folder / "metrics.json", metrics | {"tuning/lr": 1e-3 * (1 + seed)})
    (problem,) = problems(load(tmp_path))
    found = dict(protocol(problem))
    assert found["study"] == "small: two methods"
    assert found["training"].startswith("300 steps of 16 x 2 sequences")
    assert found["learning rate"].startswith("of 0.001, 0.002, the best on held-out training rows")
    assert "molora 0.001, 0.002" in found["learning rate"]
    assert (
        found["budget"].startswith("lora_r8, trainable parameters within 2%")
        and "molora 1,010" in found["budget"]
    )
    assert "lora: 0, 1; molora: 0, 1" in found["seeds"]
    page = report(load(tmp_path))
    assert "How it was done" in page and "the best on held-out training rows" in page
