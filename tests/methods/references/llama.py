"""A whole Llama under mixtures, in fp64 loops over tokens and experts. What the parts do there, their
references say; what is here is the frozen model, and who governs whom.

Every sequence runs alone and without padding, token by token; nothing is fused, concatenated or batched.
Tensors are looked up by what `MixtureModel.sites()` shows. Choices collect in `routing`, from which the
auxiliary losses are formed.
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

import references
from references.loops import Choice, silu

ORDER = (
    "q",
    "k",
    "v",
    "attention",
    "o",
    "up",
    "gate",
    "down",
    "ffn",
)  # outputs of a block router (moa_soft.md)


class LoopLlama:
    """`base` is the plain model, `model` the attached one; `parameters` are fp64 copies of its trainable
    tensors by name."""

    def __init__(self, base, model) -> None:
        self.base = copy.deepcopy(base).double().requires_grad_(False).model
        self.head = copy.deepcopy(base.lm_head).double().requires_grad_(False)
        self.rotary = LlamaRotaryEmbedding(base.config)
        self.config = base.config
        self.training = model.training
        self.sites = model.base_model.sites()
        named = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.parameters = {n: p.detach().double().requires_grad_() for n, p in named.items()}
        self.copies = {id(p): self.parameters[n] for n, p in named.items()}

    def __call__(self, sequences: list[list[int]], prompts: list[int], skills: list[int]) -> list[Tensor]:
        """Logits [n, vocab] of each sequence, whose first `prompts` tokens are the prompt, and whose skill is
        `skills`."""
        self.routing: dict[str, list[Choice]] = defaultdict(list)
        return [self._sequence(*one) for one in zip(sequences, prompts, skills, strict=True)]

    def losses(self) -> dict[str, Tensor]:
        """Auxiliary losses by kind, times their coefficients, of all choices since the last call."""
        groups = defaultdict(dict)  # a loss that several routers share is one
        for site in self.sites:
            for kind, loss in site.mixture.losses.items() if site.router is not None else ():
                groups[kind, loss][site.name] = self.routing[site.name]
        total = {}
        for (kind, loss), routing in groups.items():
            options = {k: v for k, v in vars(loss).items() if k not in ("coef", "batch")}
            value = references.of("losses", kind).value(routing, **options) if loss.coef else None
            if value is not None:
                total[kind] = total.get(kind, 0) + loss.coef * value
        return total

    # One sequence

    def _sequence(self, ids: list[int], prompt: int, skill: int) -> Tensor:
        self.ids, self.prompt, self.skill = ids, prompt, skill
        x = self.base.embed_tokens(torch.tensor(ids))  # [n, d]
        cos, sin = (t[0].double() for t in self.rotary(x.float()[None], torch.arange(len(ids))[None]))
        for i, layer in enumerate(self.base.layers):
            self.here = [s for s in self.sites if s.name.startswith(f"model.layers.{i}.")]
            x = self._layer(layer, x, cos, sin)
        return self.head(self._norm(self.base.norm, x))

    def _layer(self, layer, x, cos, sin) -> Tensor:
        attention, h = layer.self_attn, self._norm(layer.input_layernorm, x)
        self.block = {
            site.name: self._choices(site, x if site.mixture.input == "raw" else h)
            for site in self.here
            if site.kind == "block" and site.router is not None
        }
        heads = self.config.num_attention_heads
        groups = heads // self.config.num_key_value_heads
        q = self._linear(attention.q_proj, "q", h).unflatten(-1, (heads, -1))
        k = self._linear(attention.k_proj, "k", h).unflatten(-1, (heads // groups, -1))
        v = self._linear(attention.v_proj, "v", h).unflatten(-1, (heads // groups, -1))
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        rows = []
        for t in range(len(x)):
            parts = []
            for head in range(heads):
                scores = torch.stack([q[t, head] @ k[s, head // groups] for s in range(t + 1)])
                weights = (scores / math.sqrt(q.shape[-1])).softmax(0)
                parts.append(weights @ v[: t + 1, head // groups])
            rows.append(torch.cat(parts) + self._in_attention(attention, q[t], t, groups))
        z = x + self._linear(attention.o_proj, "o", torch.stack(rows))
        return z + self._feed_forward(layer.mlp, self._norm(layer.post_attention_layernorm, z))

    def _norm(self, module, x) -> Tensor:
        return module.weight * x / torch.sqrt(x.square().mean(-1, keepdim=True) + module.variance_epsilon)

    # Who governs whom

    def _tensors(self, owner) -> dict[str, Tensor]:
        return {n: self.copies.get(id(p), p.detach().double()) for n, p in owner.tensors.items()}

    def _banks(self, place: str, function: str):
        """(sites, bank, reference) of the banks at a place whose experts define `function`. Several sites are
        the decisions of several heads."""
        found: dict[int, tuple] = {}
        for site in self.here:
            for bank in site.banks:
                reference = references.of("experts", bank.part.kind)
                if bank.place == place and hasattr(reference, function):
                    found.setdefault(id(bank), ([], bank, reference))[0].append(site)
        return list(found.values())

    def _choose(self, site, u, t: int) -> Choice:
        facts = {"experts": len(site.experts), "skill": self.skill, "training": self.training}
        facts |= {"prompt": self.ids[: self.prompt], "token": self.ids[t]}
        choose = references.of("routers", site.router.kind).choose
        choice = choose(site.router, self._tensors(site), u, **facts)
        self.routing[site.name].append(choice)
        return choice

    def _choices(self, site, rows) -> list[Choice]:
        """The choice of each token; a sequence router sees one vector of the prompt."""
        if not _pools(site):
            return [self._choose(site, row, t) for t, row in enumerate(rows)]
        pooled = {"last_prompt": rows[self.prompt - 1], "official_mean": rows.mean(0)}
        choice = self._choose(site, pooled.get(site.router.pool, rows[: self.prompt].mean(0)), 0)
        self.routing[site.name] += [choice] * (len(rows) - 1)
        return [choice] * len(rows)

    def _weights(self, site, bank, choice: Choice | None) -> list:
        """Weight of each expert of a bank."""
        n, gates = bank.part.n, site.mixture.gates
        if choice is None:
            return [1.0] * n
        if site.kind == "linear":
            return choice.w
        places = sorted(site.banks, key=lambda b: ORDER.index(b.place))
        if gates == "expert":
            starts = dict(
                zip(map(id, places), accumulate((b.part.n for b in places), initial=0), strict=False)
            )
            return choice.w[starts[id(bank)] :][:n]
        names = list(dict.fromkeys(b.name for b in places))
        if gates == "index":  # of each bank, whatever the place
            numbers = {b.name: b.part.n for b in places}
            return choice.w[sum(numbers[name] for name in names[: names.index(bank.name)]) :][:n]
        gate = gates.get(bank.name, bank.name) if isinstance(gates, dict) else bank.name
        return [choice.w[names.index(gate)]] * n

    # Where the experts are

    def _linear(self, module, place: str, x) -> Tensor:
        added = []
        for (site,), bank, reference in self._banks(place, "add_to_linear"):
            own = site.kind == "linear" and site.router is not None
            choices = (
                self.block.get(site.name) if not own else self._choices(site, x) if _pools(site) else None
            )
            added.append((site, bank, reference, choices, own and choices is None))

        def run(t, u):
            y = module(u)
            for site, bank, reference, choices, now in added:
                choice = self._choose(site, u, t) if now else choices and choices[t]
                p, w = self._tensors(bank), self._weights(site, bank, choice)
                y = y + reference.add_to_linear(bank.part, p, w, u)
            return y

        for sites, bank, reference in self._banks(place, "around_linear"):
            run = partial(self._around, sites, bank, reference, place, run)
        return torch.stack([run(t, row) for t, row in enumerate(x)])

    def _around(self, sites, bank, reference, place: str, inner, t: int, u) -> Tensor:
        def choose(head, a):
            assert not _pools(sites[head]), "loops of such routers on activations are not written"
            return None if sites[head].router is None else self._choose(sites[head], a, t).w

        p = self._tensors(bank)
        return reference.around_linear(bank.part, p, place, partial(inner, t), u, choose)

    def _in_attention(self, attention, q_t, t: int, groups: int) -> Tensor:
        total = torch.zeros(q_t.numel(), dtype=torch.float64)

        def project(linear):
            return lambda x: linear(x).unflatten(-1, (-1, q_t.shape[-1])).repeat_interleave(groups, 1)

        for (site,), bank, reference in self._banks("attention", "in_attention"):
            choices = self.block.get(site.name)
            w = self._weights(site, bank, choices and choices[t])
            projections = project(attention.k_proj), project(attention.v_proj)
            total = total + reference.in_attention(bank.part, self._tensors(bank), w, q_t, *projections)
        return total

    def _feed_forward(self, ffn, x) -> Tensor:
        y = None

        def frozen():
            inner = silu(self._linear(ffn.gate_proj, "gate", x)) * self._linear(ffn.up_proj, "up", x)
            return self._linear(ffn.down_proj, "down", inner)

        for (site,), bank, reference in self._banks("ffn", "feed_forward"):
            own = site.kind == "ffn" and site.router is not None
            choices = self._choices(site, x) if own else self.block.get(site.name)
            if y is None and not bank.part.replaces:
                y = frozen()
            p, rows = self._tensors(bank), []
            for t, row in enumerate(x):
                w = self._weights(site, bank, choices and choices[t])
                before = None if y is None else y[t]
                rows.append(reference.feed_forward(bank.part, p, w, ffn, row, before))
            y = torch.stack(rows)
        return frozen() if y is None else y


def _pools(site) -> bool:
    """Whether its decision is one a sequence, made from what it reads."""
    return site.router is not None and site.router.granularity == "sequence" and not site.router.reads_facts


def _rotate(x, cos, sin) -> Tensor:
    """Rotary positions of x [n, heads, size]: (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin)."""
    half = x.shape[-1] // 2
    x1, x2, c, s = x[..., :half], x[..., half:], cos[:, None, :half], sin[:, None, :half]
    return torch.cat([x1 * c - x2 * s, x2 * c + x1 * s], -1)
