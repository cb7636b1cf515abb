"""A whole Llama under a mixture, in fp64 loops over tokens and experts, written from the method cards. The
oracle of the tests.

Every sequence runs alone and without padding, token by token; nothing is fused, concatenated or batched.
Tensors are looked up by what `MixtureModel.sites()` shows. The sum of auxiliary losses is formed from the
same choices.
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict

import torch
from loop_routers import LOOPS, Choice
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

ORDER = (
    "q",
    "k",
    "v",
    "prompt",
    "o",
    "up",
    "gate",
    "down",
    "parallel_adapter",
)  # outputs of a block router (moa_soft.md)


class LoopLlama:
    """`base` is the plain model, `model` the attached one; `parameters` are fp64 copies of its trainable
    tensors by name."""

    def __init__(self, base, model) -> None:
        self.base = copy.deepcopy(base).double().requires_grad_(False).model
        self.head = copy.deepcopy(base.lm_head).double().requires_grad_(False)
        self.rotary = LlamaRotaryEmbedding(base.config)
        self.config = base.config
        self.spec = model.base_model.peft_config["default"].spec
        self.sites = model.base_model.sites()
        named = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.parameters = {n: p.detach().double().requires_grad_() for n, p in named.items()}
        self.copies = {id(p): self.parameters[n] for n, p in named.items()}

    def __call__(self, sequences: list[list[int]], prompts: list[int]) -> list[Tensor]:
        """Logits [n, vocab] of each sequence, whose first `prompts` tokens are the prompt. Choices collect in
        `self.routing`."""
        self.routing: dict[str, list[Choice]] = defaultdict(list)
        return [self._sequence(torch.tensor(s), p) for s, p in zip(sequences, prompts, strict=True)]

    # One sequence

    def _sequence(self, ids: Tensor, prompt: int) -> Tensor:
        x = self.base.embed_tokens(ids)  # [n, d]
        position = torch.arange(len(ids))[None]
        cos, sin = (t[0].double() for t in self.rotary(x.float()[None], position))
        for i, layer in enumerate(self.base.layers):
            self.places = [s for s in self.sites if s.name.startswith(f"model.layers.{i}.")]
            x = self._layer(layer, x, cos, sin, prompt)
        return self.head(self._norm(self.base.norm, x))

    def _layer(self, layer, x, cos, sin, prompt) -> Tensor:
        attention, ffn = layer.self_attn, layer.mlp
        h1 = self._norm(layer.input_layernorm, x)
        self.gates = self._block_gates(x if self.spec.get("input", "normed") == "raw" else h1, prompt)
        heads, groups = (
            self.config.num_attention_heads,
            self.config.num_attention_heads // self.config.num_key_value_heads,
        )
        q = self._linear(attention.q_proj, "q", h1).unflatten(-1, (heads, -1))
        k = self._linear(attention.k_proj, "k", h1).unflatten(-1, (heads // groups, -1))
        v = self._linear(attention.v_proj, "v", h1).unflatten(-1, (heads // groups, -1))
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        size = q.shape[-1]
        rows = []
        for t in range(len(x)):
            parts = []
            for head in range(heads):
                scores = torch.stack([q[t, head] @ k[s, head // groups] for s in range(t + 1)]) / math.sqrt(
                    size
                )
                parts.append(scores.softmax(0) @ v[: t + 1, head // groups])
            rows.append(torch.cat(parts) + self._prompt(layer, q[t], t, groups))
        z = x + self._linear(attention.o_proj, "o", torch.stack(rows))
        h2 = self._norm(layer.post_attention_layernorm, z)
        return z + self._feed_forward(ffn, h2)

    def _norm(self, module, x) -> Tensor:
        return module.weight * x / torch.sqrt(x.square().mean(-1, keepdim=True) + module.variance_epsilon)

    # Routers

    def _tensors(self, owner) -> dict[str, Tensor]:
        return {n: self.copies.get(id(p), p.detach().double()) for n, p in owner.tensors.items()}

    def _choose(self, site, u) -> Choice:
        choice = LOOPS[site.router.kind](site.router, self._tensors(site), u)
        self.routing[site.name].append(choice)
        return choice

    def _block_gates(self, u, prompt):
        """Choice of the block router for each token; None where there is none. A sequence router sees the
        mean over the prompt."""
        site = next((s for s in self.places if s.kind == "block"), None)
        if site is None or site.router is None:
            return None
        if site.router.granularity == "token":
            return [self._choose(site, row) for row in u]
        pooled = {
            "prompt_mean": u[:prompt].mean(0),
            "last_prompt": u[prompt - 1],
            "official_mean": u.mean(0),
        }[site.router.pool]
        one = self._choose(site, pooled)
        return [one] * len(u)

    def _gate(self, bank, place: str, t: int):
        """Weight of a block's expert at token t."""
        if self.gates is None:
            return 1.0
        gates = self.spec.get("gates", "expert")
        if gates == "expert":
            site = next(s for s in self.places if s.kind == "block")
            there = {b.place if b.place not in ("ffn", "attention") else b.name for b in site.banks}
            return self.gates[t].w[[p for p in ORDER if p in there].index(place)]
        names = ["lora", "prompt", "parallel_adapter"]
        return self.gates[t].w[
            names.index(gates.get(bank.name, bank.name) if isinstance(gates, dict) else bank.name)
        ]

    # Experts

    def _linear(self, module, place: str, x) -> Tensor:
        """W x + sum_e w_e (alpha / r_e) B_e A_e x, token by token."""
        y = [module(row) for row in x]
        for site in self.places:
            for bank in site.banks:
                if bank.place != place:
                    continue
                part, tensors = bank.part, self._tensors(bank)
                ranks = list(part.r) if isinstance(part.r, tuple) else [part.r] * part.n
                for t, row in enumerate(x):
                    choice = (
                        self._choose(site, row) if site.kind == "linear" and site.router is not None else None
                    )
                    start = 0
                    for e, r in enumerate(ranks):
                        weight = (
                            choice.w[e]
                            if choice
                            else self._gate(bank, place, t)
                            if site.kind == "block"
                            else 1.0
                        )
                        shared = tensors["A"].shape[0] < sum(ranks)
                        a = tensors["A"] if shared else tensors["A"][start : start + r]
                        scale = part.alpha / (math.sqrt(r) if part.rslora else r)
                        y[t] = y[t] + weight * scale * (tensors["B"][:, start : start + r] @ (a @ row))
                        start += r
        return torch.stack(y)

    def _prompt(self, layer, q_t, t: int, groups: int) -> Tensor:
        """g concat_h gamma_h softmax(q_h (W_k P)_h^T / sqrt(d_h)) (W_v P)_h for one token; queries carry
        their positions."""
        total = torch.zeros(q_t.numel(), dtype=torch.float64)
        for site in self.places:
            for bank in site.banks:
                if bank.part.kind != "prompt":
                    continue
                tensors = self._tensors(bank)
                keys, values = (
                    m(tensors["embedding"]).unflatten(-1, (-1, q_t.shape[-1]))
                    for m in (layer.self_attn.k_proj, layer.self_attn.v_proj)
                )
                parts = []
                for h in range(q_t.shape[0]):
                    scores = torch.stack([q_t[h] @ key for key in keys[:, h // groups]]) / math.sqrt(
                        q_t.shape[-1]
                    )
                    parts.append(tensors["gamma"][h, 0] * (scores.softmax(0) @ values[:, h // groups]))
                total = total + self._gate(bank, "prompt", t) * torch.cat(parts)
        return total

    def _feed_forward(self, ffn, x) -> Tensor:
        banks = {b.part.kind: (s, b) for s in self.places for b in s.banks if b.place == "ffn"}
        if "ffn_lora" in banks:
            return self._mixlora(ffn, x, *banks["ffn_lora"])
        f = _silu(self._linear(ffn.gate_proj, "gate", x)) * self._linear(ffn.up_proj, "up", x)
        y = self._linear(ffn.down_proj, "down", f)
        if "parallel_adapter" not in banks:
            return y
        bank = banks["parallel_adapter"][1]
        p = self._tensors(bank)
        rows = []
        for t, row in enumerate(x):  # U silu(D h + b_D) + b_U
            adapter = p["up"] @ _silu(p["down"] @ row + p["down_bias"]) + p["up_bias"][:, 0]
            rows.append(y[t] + self._gate(bank, "parallel_adapter", t) * adapter)
        return torch.stack(rows)

    def _mixlora(self, ffn, x, site, bank) -> Tensor:
        """sum_e w_e E_e(h), each expert the whole block with its own LoRA on gate, up and down."""
        p, part, r = self._tensors(bank), bank.part, bank.part.r
        s, rows = part.alpha / r, []
        for row in x:
            weights = self._choose(site, row).w
            total = torch.zeros_like(row)
            for e in range(part.n):
                own = slice(e * r, (e + 1) * r)
                gate = ffn.gate_proj(row) + s * (p["gate_B"][:, own] @ (p["gate_A"][own] @ row))
                up = ffn.up_proj(row) + s * (p["up_B"][:, own] @ (p["up_A"][own] @ row))
                inner = _silu(gate) * up
                total = total + weights[e] * (
                    ffn.down_proj(inner) + s * (p["down_B"][:, own] @ (p["down_A"][own] @ inner))
                )
            rows.append(total)
        return torch.stack(rows)


def _rotate(x, cos, sin) -> Tensor:
    """Rotary positions of x [n, heads, size]: (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin)."""
    half = x.shape[-1] // 2
    x1, x2, c, s = x[..., :half], x[..., half:], cos[:, None, :half], sin[:, None, :half]
    return torch.cat([x1 * c - x2 * s, x2 * c + x1 * s], -1)


def _silu(x) -> Tensor:
    return x / (1 + torch.exp(-x))


def switch_balance(
    routing: dict[str, list[Choice]], scope: str = "site", reduce: str = "sum", values: str = "probs"
):
    """L = E sum_i f_i P_i over real tokens, by site or over the tokens of all sites together (adamole.md,
    mixlora.md)."""
    groups = (
        list(routing.values()) if scope == "site" else [[c for choices in routing.values() for c in choices]]
    )
    losses = []
    for choices in groups:
        tokens, experts = len(choices), len(choices[0].p)
        loss = 0
        for i in range(experts):
            f = sum(c.chosen[i] for c in choices) / tokens
            loss = loss + f * sum((c.p if values == "probs" else c.shifted)[i] for c in choices) / tokens
        losses.append(experts * loss)
    return sum(losses) / (len(losses) if reduce == "mean" else 1)


def z_loss(routing: dict[str, list[Choice]]):
    """sum over sites of mean_t (log sum_i exp z_ti)^2."""
    return sum(
        sum(torch.log(sum(torch.exp(z) for z in c.z)) ** 2 for c in choices) / len(choices)
        for choices in routing.values()
    )
