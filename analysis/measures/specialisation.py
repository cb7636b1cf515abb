"""Specialisation: how much the choice of expert tells about the task, the true skill or the token, and how
much of that is chance.

Pure functions of tensors; N sequences, C classes (tasks or skills), E experts, V token ids, leading axes
(sites) are kept. Logarithms are natural. Counts are assignments, or for soft mixtures sums of
`balance.membership`. Tokens of one sequence are not independent, so what counts as a draw is the sequence:
the null shuffles labels over sequences.

Beside a value belong its null, and runs of a random router and of the oracle on the same questions
(`molora_random`, `molora_oracle`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .balance import entropy
from .base import reported


def class_counts(counts: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Counts by class, [..., C, E], of counts by sequence [N, ..., E] with labels [N] int64."""
    member = torch.nn.functional.one_hot(labels, classes).to(torch.float64)
    return torch.einsum("nc,n...e->...ce", member, counts.double())


def joint_table(counts: Tensor) -> Tensor:
    """`P(e, class)` [..., C, E], sums to 1, with every class at an equal share, else big tasks rule. counts:
    [..., C, E].

    Classes without a count have no row's worth of probability; the others share it.
    """
    rows = counts.double() / counts.double().sum(-1, keepdim=True)
    rows = rows.nan_to_num(0.0)
    return rows / rows.sum((-2, -1), keepdim=True)


def mutual_information(table: Tensor) -> Tensor:
    """`I = sum P ln(P / (P_row P_column))` [...] in nats of P [..., C, E]. As a loss: Mod-Squad, arXiv
    2212.08066."""
    return entropy(table.sum(-1)) + entropy(table.sum(-2)) - entropy(table.flatten(-2))


@reported("specialisation/task_mi", None, "with the task of each sequence")
@reported("specialisation/task_mi_minus_null", "low", "with the task of each sequence, minus the null")
@reported("specialisation/skill_mi", None, "with the skill of each sequence")
@reported("specialisation/skill_mi_minus_null", "low", "with the skill of each sequence, minus the null")
def information_share(table: Tensor) -> Tensor:
    """`I / min(H(E), H(class))` [...], 0 .. 1; 0 where either has no entropy, since then there is nothing to
    tell."""
    least = torch.minimum(entropy(table.sum(-1)), entropy(table.sum(-2)))
    share = mutual_information(table) / least
    return torch.where(least > 1e-12, share, torch.where(least.isnan(), math.nan, 0.0)).clamp(max=1.0)


def miller_madow(experts: int, classes: int, sequences: int) -> float:
    """`(E - 1)(C - 1) / (2 N)` nats: what the plug-in estimate of I exceeds the truth by, for N independent
    draws (Miller 1955)."""
    return (experts - 1) * (classes - 1) / (2 * sequences)


@reported("specialisation/task_mi_null", None, "with the task of each sequence")
@reported("specialisation/skill_mi_null", None, "with the skill of each sequence")
def shuffled_information(
    counts: Tensor, labels: Tensor, classes: int, shuffles: int = 20, seed: int = 0
) -> Tensor:
    """Mean `information_share` [...] with the labels [N] shuffled over the sequences of counts [N, ..., E]:
    the value of chance."""
    generator = torch.Generator().manual_seed(seed)
    found = 0
    for _ in range(shuffles):
        shuffled = labels[torch.randperm(len(labels), generator=generator)]
        found = found + information_share(joint_table(class_counts(counts, shuffled, classes)))
    return found / shuffles


def domain_specialisation(assignments: Tensor, tokens: Tensor) -> Tensor:
    """`N_{e,D} / N_D` [..., C, E]: share of the tokens of domain D that use e; by chance k / E. OLMoE, arXiv
    2409.02060."""
    return assignments.double() / tokens.double().unsqueeze(-1)


def token_counts(weights: Tensor, ids: Tensor, vocabulary: int) -> Tensor:
    """Sums of weights [T, E] by token id [T]: [V, E]."""
    return torch.zeros(vocabulary, weights.shape[-1], dtype=torch.float64).index_add_(
        0, ids.cpu(), weights.double().cpu()
    )


@reported("specialisation/vocabulary", None, "last probe")
def vocabulary_specialisation(counts: Tensor, at_least: int = 8) -> Tensor:
    """Mean over token ids v seen `at_least` times of `max_e N_{v,e} / N_v`, 1/E .. 1; NaN without such ids.
    OLMoE, arXiv 2409.02060.

    counts [V, E] of memberships, so that a row sums to how often the id was seen.
    """
    seen = counts.sum(-1)
    often = counts[seen >= at_least]
    return (often.amax(-1) / often.sum(-1)).mean() if len(often) else torch.tensor(math.nan)


@reported("specialisation/token_id", None, "last probe")
@reported("specialisation/token_id_null", None, "with the ids shuffled")
def token_id_share(counts: Tensor) -> Tensor:
    """`I(E; token id) / H(E)`, 0 .. 1, of counts [V, E]: near 1 the router is a hash of the token.

    Plug-in, so it is high by chance where ids are rare: compare with `token_counts` of shuffled ids.
    """
    table = counts / counts.sum()
    experts = entropy(table.sum(0))
    return mutual_information(table) / experts if experts > 1e-12 else torch.zeros(())
