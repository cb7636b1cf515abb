"""Probes: what experts and hidden states have become, on the same tokens at step 0, after each tenth of training, and at its end.

    probe = Probe(cfg, model, tokenizer)        # before a method is attached: keeps the frozen model's hidden states
    probe.measure(model, step)                  # again and again; nothing that training depends on is changed
    probe.metrics(), probe.rows, probe.matrices # of the run; rows of probes.parquet and matrices.parquet

One forward pass, and at blocks and feed-forward blocks a pass of that place alone for each expert. Which measures a place has follows from
what it is: low-rank pairs on one linear are measured in rank space, anything else by running it with one expert alone.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moabench.analysis import balance, experts, representation, specialisation
from moabench.analysis import routing as measure
from moabench.analysis.measures import over_sites
from moabench.methods import record, watch
from moabench.methods.effects import Watched, can_run, has_low_rank
from moabench.methods.router import LinearRouter
from moabench.methods.spec import ConfigError
from moabench.methods.tuner.architecture import decoder_layers

from . import batches, files
from .evaluation import undisturbed
from .probe_set import probe_set
from .readings import matrix_rows

if TYPE_CHECKING:
    from moabench.methods import Routing
    from moabench.methods.tuner.sites import Site

    from .batches import Example
    from .config import RunConfig

Values = dict[str, Tensor]


@dataclass(frozen=True)
class Pass:
    """One forward pass over a batch: the routing of every site, and how the watched places were called. real [T]: no padding."""

    routing: dict[str, Routing]
    watched: dict[str, Watched]
    real: Tensor

    @classmethod
    def of(cls, model: nn.Module, batch: dict[str, Any], names: set[str]) -> Pass:
        if not names:
            batches.forward(model, batch, kept=1)
            return cls({}, {}, batch["attention_mask"].bool().flatten())
        with record(model) as recorder, watch(model, names) as watched:
            batches.forward(model, batch, kept=1)
        routing = recorder.routing
        device = next(iter(routing.values())).weights.device
        return cls(routing, watched, batch["attention_mask"].bool().flatten().to(device))


class Probe:
    """Everything the probes of one run found. `skills`: names in the order of their ids, for models that are told them."""

    def __init__(self, cfg: RunConfig, model: nn.Module, tokenizer: Any, skills: Sequence[str] = ()):
        self.set, self.sites, self.times = probe_set(cfg, tokenizer), cfg.probe.sites, cfg.probe.times
        number = {name: i for i, name in enumerate(skills)}
        examples = [replace(e, skill=number.get(skill, -1)) for e, skill in zip(self.set.examples, self.set.skills, strict=True)]
        self.batch, self.part = (
            batches.collate(some, tokenizer.pad_token_id or 0) for some in (examples, first_tokens(examples, cfg.probe.alone))
        )
        """All examples, and those on which places are run again for each expert."""
        names = list(_layers(model))
        self.layers = {index: names[index] for index in spread(len(names), self.sites)}
        self.rows: list[dict[str, Any]] = []
        self.matrices: list[dict[str, Any]] = []
        self.choices: dict[int, dict[str, Tensor]] = {}
        """By step and site: the experts of each token, bool [T, E] where k is fixed, else shares in half precision."""
        with torch.no_grad(), undisturbed(model), self._hidden(model) as found:
            batches.forward(model, self.batch, kept=1)
        self.base = {index: (x, representation.erank(x)) for index, x in found.items()}

    def steps(self, last: int) -> set[int]:
        """The steps to measure at, of a training of `last` steps."""
        return {round(i * last / self.times) for i in range(self.times + 1)}

    def measure(self, model: nn.Module, step: int) -> None:
        """Adds what `model` is now as the rows of `step`."""
        routed = [site for site in _sites(model) if site.router is not None]
        chosen = [routed[i] for i in spread(len(routed), self.sites)]
        again = {site.name for site in chosen if can_run(site) and not has_low_rank(site)}
        with torch.no_grad(), undisturbed(model):
            with self._hidden(model) as hidden:
                whole = Pass.of(model, self.batch, {site.name for site in chosen})
            part = Pass.of(model, self.part, again) if again else whole
            for index, x in hidden.items():
                self._add(step, self.layers[index], self._representation(index, x))
            for site in chosen:
                values = self._routing(step, site, whole, _predecessor(site, routed)) | _geometry(site, whole)
                values |= self._experts(step, site, part if site.name in again else whole) | self._weights(step, site)
                self._add(step, site.name, values)

    def metrics(self) -> dict[str, float]:
        """Measures of the last probe: mean over sites, and worst. Adds the rows of routing saturation, which need the end."""
        last = max(self.choices, default=None)
        for step, sites in self.choices.items() if last else ():
            if step < last:
                for site, choice in sites.items():
                    self._add(step, site, {"routing/saturation": 1 - _changed(choice, self.choices[last][site])})
        values: dict[str, list[float]] = {}
        final = max((row["step"] for row in self.rows), default=0)
        for row in self.rows:
            if row["step"] == final:
                values.setdefault(row["measure"], []).append(row["value"])
        return {key: v for name, found in values.items() for key, v in over_sites(name, torch.tensor(found)).items()}

    def record(self) -> dict[str, Any]:
        """What probe.json says: the tokens by their hash, and where and when was measured."""
        sites = dict.fromkeys(row["site"] for row in self.rows)
        steps = dict.fromkeys(row["step"] for row in self.rows)
        tokens = {"hash": self.set.hash, "tokens": self.set.tokens, "alone": int(self.part["attention_mask"].sum())}
        return tokens | {"sequences": len(self.set.examples), "steps": list(steps), "sites": list(sites)}

    def save(self, path: Path) -> None:
        """For a run that is interrupted."""
        state = {"hash": self.set.hash, "rows": self.rows, "matrices": self.matrices, "choices": self.choices}
        files.write(path, lambda file: torch.save(state, file))

    def load(self, path: Path, step: int) -> None:
        """Continues from what `save` wrote, up to `step`; what came after is measured again, as it is trained again."""
        if not path.exists():
            return
        state = torch.load(path, weights_only=True)
        if state["hash"] == self.set.hash:
            self.rows, self.matrices = ([row for row in state[key] if row["step"] <= step] for key in ("rows", "matrices"))
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

    def _representation(self, index: int, x: Tensor) -> Values:
        off, erank_off = self.base[index]
        erank, real = representation.erank(x), self.batch["attention_mask"].bool().to(x.device)
        padded = x.new_zeros(*real.shape, x.shape[-1])
        padded[real] = x
        return {
            "representation/erank": erank,
            "representation/erank_ratio": erank / erank_off,
            "representation/drift_cka": representation.drift_cka(x, off),
            "representation/drift_norm": representation.drift_norm(x, off),
            "representation/token_similarity": representation.token_similarity(x),
            "representation/over_smoothing": representation.over_smoothing(padded, real),
        }

    def _routing(self, step: int, site: Site, found: Pass, before: str | None) -> Values:
        """Fluctuation since the probe before, affinity with the layer before, and what the token id says."""
        r, values = found.routing[site.name], {}
        share = balance.membership(r.weights[found.real])
        choice = (r.chosen[found.real] if r.ids is not None else share.half()).cpu()
        earlier = [at for at in self.choices if at < step]
        if earlier:
            values["routing/fluctuation"] = _changed(self.choices[max(earlier)][site.name], choice)
        self.choices.setdefault(step, {})[site.name] = choice
        if before is not None:
            previous = balance.membership(found.routing[before].weights[found.real])
            values["routing/affinity"] = measure.affinity_information(previous, share)
            self.matrices += matrix_rows(step, site.name, "affinity", measure.affinity(previous, share))
        if r.granularity == "token":
            ids = self.batch["input_ids"].flatten()[found.real.cpu()].unique(return_inverse=True)[1]
            shuffled = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))]
            counts, chance = (specialisation.token_counts(share, numbers, int(ids.max()) + 1) for numbers in (ids, shuffled))
            values["specialisation/token_id"] = specialisation.token_id_share(counts)
            values["specialisation/token_id_null"] = specialisation.token_id_share(chance)
            values["specialisation/vocabulary"] = specialisation.vocabulary_specialisation(counts)
        return values

    def _experts(self, step: int, site: Site, found: Pass) -> Values:
        """Measures of the experts' outputs on the real tokens, and of what they contribute as routed."""
        w, real = found.watched[site.name], found.real
        if has_low_rank(site):
            p, b = w.low_rank()
            outputs = experts.rank_coordinates(p[:, real], b)
        elif can_run(site):
            outputs = w.outputs()[:, real].float()
        else:
            return {}
        if site.kind == "block":
            norms = experts.norms(w.removed()[:, real])
        else:
            norms = found.routing[site.name].weights[real] * experts.norms(outputs)
        share = balance.contribution(norms.double().sum(0))
        cka, cosine = experts.cka(outputs), experts.output_cosine(outputs)
        self.matrices += matrix_rows(step, site.name, "output_cka", cka) + matrix_rows(step, site.name, "output_cosine", cosine)
        return {
            "experts/cka": experts.off_diagonal(cka),
            "experts/output_cosine": experts.off_diagonal(cosine),
            "experts/zero_share": experts.zero_share(outputs).mean(),
            "experts/output_erank": experts.effective_rank(experts.spectrum(outputs)).nanmean(),
            "load/contribution_effective_experts": balance.effective_experts(share),
            "load/contribution_max_vio": balance.max_vio(share),
        }

    def _weights(self, step: int, site: Site) -> Values:
        """Measures of low-rank experts on one linear by their tensors alone."""
        if not has_low_rank(site):
            return {}
        (view,) = site.banks
        owner, scale, b = view.owner.to(view.B.device), view.scale.to(view.B.device), view.B.double()
        shared = len(view.A) < len(owner)
        a = view.A.repeat(len(owner) // len(view.A), 1) if shared else view.A
        b = b * scale[owner]
        spectra, left, right = zip(*(experts.directions(a[owner == e], b[:, owner == e]) for e in range(view.part.n)), strict=True)
        matrices = {"weight_cosine": experts.weight_cosine(a, b, owner), "overlap_out": experts.overlaps(left)}
        if not shared:
            matrices["overlap_in"] = experts.overlaps(right)
        for name, matrix in matrices.items():
            self.matrices += matrix_rows(step, site.name, name, matrix)
        eranks = torch.stack([experts.effective_rank(s) for s in spectra])
        return {f"experts/{name}": experts.off_diagonal(m) for name, m in matrices.items()} | {"experts/update_erank": eranks.nanmean()}


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


def _changed(before: Tensor, after: Tensor) -> Tensor:
    """Routing fluctuation of two stored choices."""
    return measure.fluctuation(before, after) if before.dtype == torch.bool else measure.total_variation(before, after)


def _geometry(site: Site, found: Pass) -> Values:
    """How the router's input is arranged around its choices, and the router's own rows."""
    r, values = found.routing[site.name], {}
    x = found.watched[site.name].read.flatten(0, -2)[found.real].float()
    if r.granularity == "token":
        share = balance.membership(r.weights[found.real])
        rc, shuffled = representation.within_between(x, share), representation.shuffled_within_between(x, share)
        values = {"representation/rc": rc, "representation/rc_shuffled": shuffled}
        values["representation/clustering"] = representation.clustering(rc, shuffled)
    if isinstance(site.router, LinearRouter):
        weight = site.router.heads(site.tensors)[0][: len(site.experts)]
        values["representation/span_share"] = representation.span_share(x, weight)
        values["representation/router_cosine"] = representation.row_cosine(weight)
        values["representation/router_erank"] = experts.effective_rank(experts.spectrum(weight, centre=False))
    return values


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    try:
        return decoder_layers(model)
    except ConfigError as error:
        raise ConfigError(f"{error} Probes look at these; probe.times=0 leaves probes out.") from None


def _sites(model: nn.Module) -> list[Site]:
    """Places of a mixture; none for other models."""
    tuner = getattr(model, "base_model", None)
    return tuner.sites() if hasattr(tuner, "mixture_layers") else []
