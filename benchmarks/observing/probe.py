"""Probes: what experts and hidden states have become, on the same tokens at step 0, after each tenth of
training, and at its end.

    probe = Probe(cfg, model, tokenizer)        # before a method is attached: keeps the frozen model's hidden
                                                states
    probe.measure(model, step)                  # again and again; nothing that training depends on is changed
    probe.finish()
    probe.metrics(), probe.rows, probe.matrices # of the run; rows of probes.parquet and matrices.parquet

What is measured at a place: probe_measures.py.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moabench.analysis.measures import representation
from moabench.analysis.measures.catalog import over_sites
from moabench.benchmarks.data import batches
from moabench.benchmarks.machine import files
from moabench.benchmarks.machine.globals import undisturbed
from moabench.benchmarks.tasks.rows import Reader
from moabench.methods.effects import can_run, has_low_rank
from moabench.methods.spec import ConfigError
from moabench.methods.tuner.architecture import decoder_layers

from .load_measures import matrix_rows
from .probe_measures import Pass, Values, changed, choices, of_hidden_states, of_site
from .probe_tokens import probe_set

if TYPE_CHECKING:
    from moabench.benchmarks.config.run import RunConfig
    from moabench.benchmarks.data.batches import Example
    from moabench.methods.tuner.sites import Site


class Probe:
    """Everything the probes of one run found. `skills`: names in the order of their ids, for models that are
    told them."""

    def __init__(
        self,
        cfg: RunConfig,
        model: nn.Module,
        tokenizer: Any,
        skills: Sequence[str] = (),
        reader: Reader | None = None,
    ):
        self.set, self.sites, self.times = (
            probe_set(cfg, tokenizer, reader or Reader(cfg.data)),
            cfg.probe.sites,
            cfg.probe.times,
        )
        number = {name: i for i, name in enumerate(skills)}
        examples = [
            replace(e, skill=number.get(skill, -1))
            for e, skill in zip(self.set.examples, self.set.skills, strict=True)
        ]
        self.batch, self.part = (
            batches.collate(some, tokenizer.pad_token_id or 0)
            for some in (examples, first_tokens(examples, cfg.probe.alone))
        )
        """All examples, and those on which places are run again for each expert."""
        self.ids = self.batch["input_ids"][self.batch["attention_mask"].bool()]
        names = list(_layers(model))
        self.layers = {index: names[index] for index in spread(len(names), self.sites)}
        self.rows: list[dict[str, Any]] = []
        self.matrices: list[dict[str, Any]] = []
        self.choices: dict[int, dict[str, Tensor]] = {}
        """By step and site: the experts of each token, bool [T, E] where k is fixed, else shares in half
        precision."""
        with torch.no_grad(), undisturbed(model), self._hidden(model) as found:
            batches.forward(model, self.batch, kept=1)
        self.base = {index: (x, representation.erank(x)) for index, x in found.items()}

    def steps(self, last: int) -> set[int]:
        """The steps to measure at, of a training of `last` steps."""
        return {round(i * last / self.times) for i in range(self.times + 1)}

    def measure(self, model: nn.Module, step: int) -> None:
        """Adds what `model` is now as the rows of `step`. Raises ConfigError for hidden states that are not
        finite."""
        routed = [site for site in _sites(model) if site.router is not None]
        chosen = [routed[i] for i in spread(len(routed), self.sites)]
        again = {site.name for site in chosen if can_run(site) and not has_low_rank(site)}
        with torch.no_grad(), undisturbed(model):
            with self._hidden(model) as hidden:
                whole = Pass.of(model, self.batch, {site.name for site in chosen})
            for index, x in hidden.items():
                if not x.isfinite().all():
                    layer = self.layers[index]
                    raise ConfigError(
                        f"{layer}: hidden states at step {step} are not finite; expected a lower "
                        "learning rate."
                    )
            part = Pass.of(model, self.part, again) if again else whole
            for index, x in hidden.items():
                self._add(
                    step,
                    self.layers[index],
                    of_hidden_states(x, *self.base[index], self.batch["attention_mask"].bool()),
                )
            for site in chosen:
                values, matrices = of_site(
                    site, whole, part if site.name in again else whole, _predecessor(site, routed), self.ids
                )
                self._add(
                    step,
                    site.name,
                    values | self._fluctuation(step, site.name, choices(whole.routing[site.name], whole)),
                )
                for name, matrix in matrices.items():
                    self.matrices += matrix_rows(step, site.name, name, matrix)

    def _fluctuation(self, step: int, site: str, choice: Tensor) -> Values:
        """Keeps the choice, and compares it with that of the probe before."""
        earlier = [at for at in self.choices if at < step]
        self.choices.setdefault(step, {})[site] = choice
        return {"routing/fluctuation": changed(self.choices[max(earlier)][site], choice)} if earlier else {}

    def finish(self) -> None:
        """Adds the rows of routing saturation, which need the end."""
        last = max(self.choices, default=0)
        for step in sorted(self.choices.keys() - {last}):
            for site, choice in self.choices[step].items():
                self._add(step, site, {"routing/saturation": 1 - changed(choice, self.choices[last][site])})

    def metrics(self) -> dict[str, float]:
        """Measures of the last probe: mean over sites, and worst."""
        values: dict[str, list[float]] = {}
        final = max((row["step"] for row in self.rows), default=0)
        for row in self.rows:
            if row["step"] == final:
                values.setdefault(row["measure"], []).append(row["value"])
        return {
            key: v
            for name, found in values.items()
            for key, v in over_sites(name, torch.tensor(found)).items()
        }

    def record(self) -> dict[str, Any]:
        """What probe.json says: the tokens by their hash, and where and when was measured."""
        sites = dict.fromkeys(row["site"] for row in self.rows)
        steps = dict.fromkeys(row["step"] for row in self.rows)
        tokens = {
            "hash": self.set.hash,
            "tokens": self.set.tokens,
            "alone": int(self.part["attention_mask"].sum()),
        }
        return tokens | {"sequences": len(self.set.examples), "steps": list(steps), "sites": list(sites)}

    def save(self, path: Path) -> None:
        """For a run that is interrupted."""
        state = {"hash": self.set.hash, "rows": self.rows, "matrices": self.matrices, "choices": self.choices}
        files.write(path, lambda file: torch.save(state, file))

    def load(self, path: Path, step: int) -> None:
        """Continues from what `save` wrote, up to `step`; what came after is measured again, as it is trained
        again."""
        if not path.exists():
            return
        state = torch.load(path, weights_only=True)
        if state["hash"] == self.set.hash:
            self.rows, self.matrices = (
                [row for row in state[key] if row["step"] <= step] for key in ("rows", "matrices")
            )
            self.choices = {at: sites for at, sites in state["choices"].items() if at <= step}

    # One place

    @contextmanager
    def _hidden(self, model: nn.Module) -> Iterator[dict[int, Tensor]]:
        """Hidden states [T, d] of the real tokens after each probed layer, of the pass inside."""
        found: dict[int, Tensor] = {}

        def keep(index: int):
            def hook(module: nn.Module, args: tuple, output: Any) -> None:
                x = output[0] if isinstance(output, tuple) else output
                found[index] = x.detach()[self.batch["attention_mask"].bool().to(x.device)].float()

            return hook

        layers = list(_layers(model).values())
        handles = [layers[index].register_forward_hook(keep(index)) for index in self.layers]
        try:
            yield found
        finally:
            for handle in handles:
                handle.remove()

    def _add(self, step: int, site: str, values: Values) -> None:
        """Rows of the values that are defined."""
        for name, value in values.items():
            if not math.isnan(value := float(value)):
                self.rows.append({"step": step, "site": site, "measure": name, "value": value})


def spread(count: int, most: int) -> list[int]:
    """At most `most` of `count` indices, evenly from the first to the last."""
    chosen = min(count, most)
    return [round(i * (count - 1) / max(1, chosen - 1)) for i in range(chosen)]


def first_tokens(examples: Sequence[Example], tokens: int) -> list[Example]:
    """The first examples that have at most `tokens` tokens together, at least one."""
    total = list(accumulate(len(e.ids) for e in examples))
    return list(examples[: max(1, bisect_right(total, tokens))])


def _predecessor(site: Site, sites: Sequence[Site]) -> str | None:
    """The same place one routed layer before."""
    alike = [s.name for s in sites if s.place == site.place and s.mixture.name == site.mixture.name]
    position = alike.index(site.name)
    return alike[position - 1] if position else None


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    try:
        return decoder_layers(model)
    except ConfigError as error:
        raise ConfigError(f"{error} Probes look at these; probe.times=0 leaves probes out.") from None


def _sites(model: nn.Module) -> list[Site]:
    """Places of a mixture; none for other models."""
    tuner = getattr(model, "base_model", None)
    return tuner.sites() if hasattr(tuner, "mixture_layers") else []
