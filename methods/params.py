"""Declared tensors: a part says which parameters it needs, the tuner owns them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .lazy import Lazy

if TYPE_CHECKING:
    import torch
else:
    torch = Lazy("torch")


@dataclass(frozen=True)
class Param:
    """Shape and initial distribution of one tensor.

    init: `zeros`, `normal` (std = scale), `uniform` (on +-scale), `full` (all scale). trained: a parameter;
    otherwise a buffer, saved, resumed and moved with the parameters, which only rules change. decay=False: an
    optimiser's weight decay leaves it alone. A vector (one dimension: biases, magnitudes) never has any, as
    in the official MoA code; to be declared is what is stored in two dimensions and is no matrix.
    """

    shape: tuple[int, ...]
    init: str = "zeros"
    scale: float = 1.0
    trained: bool = True
    decay: bool = True

    def make(self, device: torch.device) -> torch.Tensor:
        """The tensor in fp32 on `device`, a Parameter where it is trained; draws from torch's global
        generator."""
        data = torch.empty(self.shape, dtype=torch.float32, device=device)
        init = torch.nn.init
        if self.init == "normal":
            init.normal_(data, std=self.scale)
        elif self.init == "uniform":
            init.uniform_(data, -self.scale, self.scale)
        else:
            init.constant_(data, self.scale if self.init == "full" else 0.0)
        return torch.nn.Parameter(data) if self.trained else data


def linear_default(out: int, fan_in: int) -> Param:
    """Weight [out, fan_in] as torch.nn.Linear draws it: U(-1/sqrt(fan_in), 1/sqrt(fan_in)) = Kaiming-uniform
    with a = sqrt 5."""
    return Param((out, fan_in), "uniform", fan_in**-0.5)


def bias_default(out: int, fan_in: int) -> Param:
    """Bias [out] as torch.nn.Linear draws it, from the same interval as its weight."""
    return Param((out,), "uniform", fan_in**-0.5)
