"""Run folders as the harness writes them, with results drawn from a known truth."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np

from moabench.benchmarks.config.hashing import digest
from moabench.benchmarks.machine import files

CONFIG = {
    "method": {"name": "lora", "tuner": "peft", "experts": {"kind": "lora", "targets": ["q", "v"], "r": 16}},
    "model": {"kind": "builtin", "name": "tiny"},
    "task": {"name": "arc", "eval": ["arc_easy", "arc_challenge"]},
    "data": {"source": "builtin", "root": None, "eval_limit": None},
    "train": {"steps": 300, "lr": 3e-3, "batch_size": 16},
    "mix": {"name": "own", "own": True},
    "protocol": "native",
    "budget": {"size": "none"},
    "logger": {"kind": "none"},
    "runs_dir": "runs",
    "seed": 0,
}
TITLES = ("arc_easy@builtin:loglikelihood", "arc_challenge@builtin:loglikelihood")
SITES, EXPERTS = ("model.layers.0.q", "model.layers.1.q"), 4


def write_run(
    folder: Path,
    method="lora",
    seed=0,
    chance=0.6,
    questions=100,
    state="finished",
    reason=None,
    trainable=1000,
    probes=True,
    **changes,
) -> Path:
    """One run folder. chance: probability of a right answer; changes: dotted keys of the config, as keyword
    `train__lr=1e-3`."""
    config = copy.deepcopy(CONFIG) | {"seed": seed}
    config["method"]["name"] = method
    for key, value in changes.items():
        *parents, last = key.split("__")
        part = config
        for name in parents:
            part = part.setdefault(name, {})
        part[last] = value
    path = folder / f"arc-{method}-tiny-s{seed}-{digest(config)[:8]}"
    files.write_json(
        path / "status.json", {"state": state, "hash": "ab" * 32, **({"reason": reason} if reason else {})}
    )
    files.write_yaml(path / "config.yaml", config)
    files.write_json(
        path / "environment.json",
        {"code": {"commit": "c0ffee" * 6, "dirty": False}, "device_name": "a CPU", "threads": 1},
    )
    if state == "finished":
        _write_results(
            path,
            np.random.default_rng([seed, sum(map(ord, method))]),
            chance,
            questions,
            trainable,
            probes and method != "lora",
        )
    return path


def _write_results(path, rng, chance, questions, trainable, probes):
    rows, metrics = (
        [],
        {
            "params/trainable": trainable,
            "params/total": 10 * trainable,
            "train/seconds": 10.0,
            "train/steps": 300,
        },
    )
    metrics |= {"train/tokens_per_second": 5e3, "memory/peak_bytes": 5e8}
    for title in TITLES:
        right = rng.random(questions) < chance
        skills = [f"recall:{'ab'[i % 2]}" for i in range(questions)]
        rows += [
            {
                "task": title,
                "doc_id": f"{title}-{i}",
                "context": None,
                "question": f"q{i}",
                "correct": bool(ok),
                "skill": skill,
            }
            for i, (ok, skill) in enumerate(zip(right, skills, strict=True))
        ]
        metrics |= {f"eval/{title}/acc": float(right.mean()), f"base/{title}/acc": 0.25}
    history = [{"step": step, "loss/task": 3 / step, "loss/total": 3 / step} for step in (1, 10, 20)]
    routing, readings, matrices = [], [], []
    if probes:
        metrics |= {
            "headline/max_vio": 0.4,
            "headline/max_vio_worst": 0.9,
            "headline/effective_experts": 3.5,
            "headline/mi_minus_null": 0.1,
        }
        metrics |= {"headline/expert_cka": 0.2, "headline/erank_ratio": 1.1, "load/max_vio": 0.4}
        history = [row | {"load/max_vio": 1 / row["step"], "load/router_entropy": 0.9} for row in history]
        for title in TITLES:
            for skill in (None, "recall:a", "recall:b"):
                for site in SITES:
                    share = rng.dirichlet(np.ones(EXPERTS))
                    routing += [
                        {
                            "split": "test",
                            "task": title,
                            "skill": skill,
                            "site": site,
                            "expert": f"e{e}",
                            "index": e,
                            "soft": False,
                            "tokens": 500,
                            "share": s,
                            "soft_share": s,
                            "importance": s,
                            "router_entropy": 0.8,
                        }
                        for e, s in enumerate(share)
                    ]
        readings = [
            {"step": step, "site": site, "measure": measure, "value": rng.random()}
            for step in (0, 10, 20) for site in SITES for measure in ("experts/cka", "routing/fluctuation")
        ]  # fmt: skip
        matrices = [
            {"step": step, "site": site, "name": name, "i": i, "j": j, "value": rng.random()}
            for step in (0, 20)
            for site in SITES
            for name in ("coactivation", "output_cka")
            for i in range(EXPERTS)
            for j in range(EXPERTS)
        ]
    files.write_json(path / "metrics.json", metrics)
    for name, table in {"samples": rows, "history": history, "routing": routing}.items():
        files.write_parquet(path / f"{name}.parquet", table)
    if probes:
        files.write_parquet(path / "probes.parquet", readings)
        files.write_parquet(path / "matrices.parquet", matrices)
