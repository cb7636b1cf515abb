"""What the loops share: the choice of one token, and a few functions of lists of scalars."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Choice:
    """What one token gets, as lists over experts, so that autograd gives the reference gradients: weight w_i,
    probability or gate p_i, selection m_i, logits z_i; `tau` where there is a threshold; `label` where the
    router was given one."""

    w: list
    p: list
    chosen: list[bool]
    z: list
    tau: Tensor | None = None
    shifted: list = field(default_factory=list)
    label: int | None = None


def dots(weight, bias, u) -> list[Tensor]:
    """W u + b, row by row."""
    return [row @ u + (0 if bias is None else bias[i]) for i, row in enumerate(weight)]


def softmax(z: list[Tensor]) -> list[Tensor]:
    top = max(float(v.detach()) for v in z)
    powers = [torch.exp(v - top) for v in z]
    return [v / sum(powers) for v in powers]


def sigmoid(z) -> Tensor:
    return 1 / (1 + torch.exp(-z))


def silu(x) -> Tensor:
    return x / (1 + torch.exp(-x))


def descending(values: list[Tensor]) -> list[int]:
    """Indices from the largest value to the smallest; of equal ones the lower index goes first."""
    return sorted(range(len(values)), key=lambda i: -float(values[i].detach()))


def kept(values: list[Tensor], selected, total=1) -> list[Tensor]:
    """The selected values over `total`, 0 elsewhere."""
    return [v / total if i in selected else 0 * v for i, v in enumerate(values)]


def one_hot(expert: int, experts: int, z: list | None = None, label: int | None = None) -> Choice:
    """Weight 1 for one expert."""
    w = [torch.tensor(float(i == expert), dtype=torch.float64) for i in range(experts)]
    return Choice(w, w, [i == expert for i in range(experts)], w if z is None else z, label=label)
