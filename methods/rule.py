"""The family of rules: what happens to a method at fixed moments of its training, beside the optimiser's
step.

A rule is options plus functions of sites (tuner/sites.py), called by `Moments` (tuner/moments.py) once a
moment however the batch is cut: gradient accumulation, checkpointing, several processes and a resumed run
call none twice. What a rule remembers from step to step it keeps in buffers that a part declares (`Param(...,
trained=False)`), which are saved and resumed with the adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from .spec import Part

if TYPE_CHECKING:
    from torch import Tensor

    from .routing import Routing


@dataclass(frozen=True)
class Rule(Part):
    """Base of all rules. sites: of the mixture, tuner/sites.py. A moment that a rule does not define is
    passed over."""

    folder: ClassVar[str] = "moabench.methods.rules"

    def check(self, mixture: Any) -> None:
        """Raise ConfigError where this rule cannot act on the mixture (catalog.Mixture)."""

    def counts(self, routing: Routing) -> Tensor | None:
        """What to sum over the step's passes and processes, a tensor of one site's Routing [T, E] without
        padding (`routing.mask`); None where nothing is."""
        return None

    def after_backward(self, sites: Sequence[Any]) -> None:
        """The gradients of the whole accumulated batch are there, over all processes, and clipped."""

    def after_step(self, sites: Sequence[Any], counts: Sequence[Tensor]) -> None:
        """The optimiser has moved. counts: of each site, summed since the last step."""
