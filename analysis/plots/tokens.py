"""Which expert acts on which token of an example text: needs the model, not only its run's tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

from moabench.methods.spec import ConfigError, nearest

from .style import STYLE, Plot, file_name, heat, panels, short_site

SITES = 3


def token_usage(
    model: Any, tokenizer: Any, text: str, sites: list[str] | None = None, label: str = ""
) -> Plot:
    """Weights of the experts (rows) for each token (columns) at the given sites; default: the first, the
    middle and the last.

    Raises ConfigError for a model without routed sites, or a site that it does not have.
    """
    from moabench.methods import capture_routing

    batch = tokenizer(text, return_tensors="pt").to(next(model.parameters()).device)
    routing = capture_routing(model, batch)
    if not routing:
        raise ConfigError("this model routes nothing; expected a mixture of adapters.")
    names = list(routing)
    chosen = sites or list(dict.fromkeys([names[0], names[len(names) // 2], names[-1]]))
    for site in chosen:
        if site not in routing:
            raise ConfigError(f"sites: {site!r} is no routed site.{nearest(site, names)}")
    tokens = [
        tokenizer.decode([token]).replace("\n", "\\n").replace("$", r"\$")
        for token in batch["input_ids"][0].tolist()
    ]
    return _drawn({site: routing[site] for site in chosen}, tokens, label)


def of_run(path: str | Path, text: str, label: str = "") -> Plot:
    """`token_usage` of the trained adapter of a finished run on its base model. Raises ConfigError where its
    config or adapter cannot be read, or was made for another base."""
    import yaml

    from moabench.benchmarks.bases.adapters import load_adapter
    from moabench.benchmarks.bases.fingerprint import model_fingerprint
    from moabench.benchmarks.bases.loading import load_model
    from moabench.benchmarks.config.run import RunConfig

    config = yaml.safe_load((Path(path) / "config.yaml").read_text(encoding="utf-8"))
    cfg = RunConfig.from_composed({**config, "task": config["task"]["eval"]})
    fingerprint = model_fingerprint(cfg.model, Path(path).parent).digest
    base, tokenizer = load_model(cfg.model, cfg.seed, "cpu")
    adapted = load_adapter(base, Path(path) / "adapter", fingerprint)
    return token_usage(adapted, tokenizer, text, label=label or cfg.parsed_method.name)


def _drawn(routing: dict[str, Any], tokens: list[str], label: str) -> Plot:
    figure, axes = panels(len(routing), width=max(4.0, 0.32 * len(tokens) + 1.6), height=2.4, across=1)
    with mpl.rc_context(STYLE):
        for axis, (site, found) in zip(axes, routing.items(), strict=True):
            weights = found.weights.detach().float().cpu().numpy().reshape(-1, found.weights.shape[-1])
            weights = (
                np.broadcast_to(weights, (len(tokens), weights.shape[1])) if len(weights) == 1 else weights
            )
            image = heat(
                axis,
                weights.T,
                [str(name) for name in found.experts],
                tokens,
                (0, max(1e-6, float(weights.max()))),
                write=False,
            )
            axis.set_xticks(range(len(tokens)), tokens, rotation=60, ha="right")
            axis.set_title(f"{label} {short_site(site)}".strip())
            figure.colorbar(image, ax=axis, shrink=0.9, pad=0.01).set_label("weight")
    caption = (
        f"{label}: weight of each expert for each token of the text, 0 where it is not selected. "
        "Each panel has a scale of its own."
    )
    return Plot(f"tokens-{file_name(label)}", f"Experts by token: {label}", caption, figure)
