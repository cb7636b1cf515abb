"""Gated prompts inside attention (LLaMA-Adapter's form, as MoA uses it)."""

from __future__ import annotations

from dataclasses import dataclass

from ..bank import AttentionExperts
from ..lazy import Lazy
from ..params import Param
from ..spec import Count

route = Lazy("moabench.kernels.route")


@dataclass(frozen=True)
class Prompt(AttentionExperts):
    """`a += sum_e w_e concat_h gamma_eh softmax(q_h (W_k P_e)_h^T scaling) (W_v P_e)_h` (arXiv 2506.05928;
    2303.16199).

    P_e [length, d] ~ N(0, 1) through the frozen key and value projections, without positions; its softmax is
    its own. One gate gamma for each query head starts at 0, so P has no gradient until gamma has moved.
    """

    kind = "prompt"
    size = "length"
    length: Count = 10

    def params(self, d, heads):
        return {
            "embedding": Param((self.n * self.length, d), "normal", 1.0),
            # a scalar for each head, which decay would pull to 0, where the prompt is off; the official code
            # stores it as [1, heads, 1, 1], so that its rule by the number of dimensions does decay it
            "gamma": Param((heads, self.n), decay=False),
        }

    def forward(self, p, query, project, scaling, w):
        keys, values = project(p["embedding"])  # [E L, H, hd], in the model's dtype
        scores = query @ (keys.permute(1, 2, 0) * scaling)  # [B, H, L_q, E L]
        probs = route.softmax(scores.float().unflatten(-1, (self.n, -1)))
        gates = p["gamma"][None, :, None, :]  # [1, H, 1, E]
        if w is not None:
            gates = gates * w.unsqueeze(1)  # [B, 1, L_q, E]
        mixed = (probs * gates.unsqueeze(-1)).flatten(-2).to(query.dtype)
        return (mixed @ values.transpose(0, 1)).transpose(1, 2)
