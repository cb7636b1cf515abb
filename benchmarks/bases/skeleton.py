"""A base without weights, for counting what a method adds to it: parameters, FLOPs, memory."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from moabench import methods
from moabench.benchmarks.config.sections import ModelConfig

from .loading import skeleton


class Skeleton:
    """The base model of a run without its weights: what a method adds to it."""

    def __init__(self, model: ModelConfig) -> None:
        self._build = functools.partial(skeleton, model)
        base = self._build()
        self.size = sum(p.numel() for p in base.parameters())
        self.layers = base.config.get_text_config().num_hidden_layers

    def attached(self, data: Mapping[str, Any]) -> Any:
        """A new copy of the base with a method on it, on the meta device: nothing that is done with it
        computes anything."""
        import torch

        with torch.device("meta"):  # PEFT makes its own tensors where the default says
            return methods.attach(self._build(), data).to("meta")

    def count(self, data: Mapping[str, Any]) -> int:
        """Trainable parameters of a method."""
        return methods.param_count(self.attached(data))["trainable"]
