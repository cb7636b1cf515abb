"""Run folders read as tables: what is there, what is missing, what is broken."""

import subprocess
import sys

import pandas as pd
import pytest
from synthetic import CONFIG, write_run

from moabench.analysis import load
from moabench.benchmarks.machine import files
from moabench.benchmarks.run.reading import flat
from moabench.methods.spec import ConfigError


def test_one_row_a_run_with_config_environment_and_metrics(runs_dir):
    study = load(runs_dir)
    assert len(study.runs) == 11 and len(study.finished) == 9
    row = study.finished[(study.finished.method == "mixlora") & (study.finished.seed == 1)].iloc[0]
    assert (row["train.lr"], row["data"], row["task"], row["environment.code.commit"][:6]) == (
        1e-3,
        "builtin",
        "arc",
        "c0ffee",
    )
    assert row["accuracy"] == pytest.approx(row[[c for c in study.runs if c.startswith("eval/")]].mean())
    assert study.configs[row["run"]]["task"]["eval"] == CONFIG["task"]["eval"]


def test_failed_and_cut_off_runs_stay_with_their_reason_and_without_results(runs_dir):
    runs = load(runs_dir).runs.set_index("method")
    assert runs.loc["dora", "state"] == "failed" and "out of memory" in runs.loc["dora", "reason"]
    assert runs.loc["rslora", "state"] == "interrupted"  # it says running, and nobody holds it
    assert runs.loc[["dora", "rslora"], "accuracy"].isna().all()


def test_tables_of_all_runs_with_the_run_beside_each_row(runs_dir):
    study = load(runs_dir)
    assert len(study.samples) == 9 * 200 and study.samples["run"].nunique() == 9
    one = study.finished.iloc[0]
    alone = pd.read_parquet(f"{one['path']}/samples.parquet")
    together = study.samples[study.samples.run == one["run"]].drop(columns="run").reset_index(drop=True)
    assert together["correct"].tolist() == alone["correct"].tolist()
    assert set(study.probes["run"]) == set(study.finished.loc[study.finished.method != "lora", "run"])


def test_an_older_schema_is_read_and_what_is_missing_is_said(tmp_path):
    write_run(tmp_path, "molora", probes=False)
    study = load(tmp_path)
    assert study.probes.empty and len(study.samples) == 200
    assert study.skipped["file"].tolist() == ["probes.parquet"]
    assert any("probes.parquet: absent" in note for note in study.notes())


@pytest.mark.parametrize("broken", ["metrics.json", "config.yaml", "status.json", "environment.json"])
def test_a_broken_file_costs_its_run_only(tmp_path, broken):
    write_run(tmp_path, "lora", 0)
    bad = write_run(tmp_path, "lora", 1)
    (bad / broken).write_text('{"a": [')
    study = load(tmp_path)
    assert len(study.runs) == 1
    assert study.skipped[["run", "file"]].values.tolist() == [[bad.name, broken]]


def test_a_broken_or_odd_table_costs_its_run_only(tmp_path):
    write_run(tmp_path, "lora", 0)
    bad, odd = write_run(tmp_path, "lora", 1), write_run(tmp_path, "lora", 2)
    (bad / "samples.parquet").write_bytes(b"PAR1")
    files.write_parquet(odd / "samples.parquet", [{"task": 5, "correct": "yes"}])
    study = load(tmp_path)
    assert len(study.samples) == 200
    assert set(study.skipped["run"]) == {bad.name, odd.name}


def test_a_finished_run_without_metrics_is_no_result(tmp_path):
    (write_run(tmp_path) / "metrics.json").unlink()
    study = load(tmp_path)
    assert study.runs.empty and "has none" in study.skipped["reason"].item()


def test_the_same_run_in_two_folders_counts_once(tmp_path):
    run = write_run(tmp_path / "a")
    study = load(tmp_path / "a", run)
    assert len(study.runs) == 1 and "the same run" in study.skipped["reason"].item()


def test_configs_are_nobodys_but_their_runs(tmp_path):
    """Sections are parsed once for all runs; changing one run's config leaves the others alone."""
    write_run(tmp_path, seed=0), write_run(tmp_path, seed=1)
    first, second = load(tmp_path).configs.values()
    first["method"]["experts"]["targets"].append("o")
    assert second["method"]["experts"]["targets"] == ["q", "v"]


def test_a_folder_without_runs_is_an_error_that_says_what_was_looked_for(tmp_path):
    with pytest.raises(ConfigError, match=r"has no run folder in it; expected .*<run>/status.json"):
        load(tmp_path)
    with pytest.raises(ConfigError, match="is no folder"):
        load(tmp_path / "nowhere")


def test_columns_by_name_and_runs_by_condition(runs_dir):
    study = load(runs_dir)
    with pytest.raises(ConfigError, match=r"Did you mean 'train.lr'\?"):
        study.column("train.lrr")
    assert set(study.where('`train.lr` < 2e-3 and state == "finished"').runs["method"]) == {"mixlora"}
    with pytest.raises(ConfigError, match=r"Did you mean 'method'\?"):
        study.where("metod == 'lora'")


def test_flat():
    assert flat({"a": {"b": 1, "c": [1, 2]}, "d": [{"e": 3}, {"e": 4}], "f": []}) == {
        "a.b": 1, "a.c": (1, 2), "d.0.e": 3, "d.1.e": 4, "f": (),
    }  # fmt: skip


def test_importing_the_package_imports_nothing_heavy():
    code = (
        "import sys, moabench.analysis; moabench.analysis.load; print(sorted({'torch', 'matplotlib', "
        "'transformers'} & set(sys.modules)))"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )
