"""The wrappers that stand in the frozen model where a mixture attaches; they own nothing and ask the
layer."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .architecture import base_of


class _Wrapper(nn.Module):
    """A frozen module under its mixture, which `layer` (a MixtureLayer) runs; other attributes are the
    module's own."""

    def __init__(self, base_layer: nn.Module, layer: Any) -> None:
        super().__init__()
        self.base_layer = base_of(base_layer)
        self._layer = (layer,)

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)


class RoutedLinear(_Wrapper):
    """A frozen linear whose output the layer's mixtures add to."""

    def __init__(self, base_layer: nn.Module, layer: Any, attribute: str) -> None:
        super().__init__(base_layer, layer)
        self._attribute = attribute

    def forward(self, x: Tensor) -> Tensor:
        return self._layer[0].linear(self._modules["base_layer"], self._attribute, x)


class RoutedFeedForward(_Wrapper):
    """A frozen feed-forward block with experts beside or inside it."""

    def forward(self, x: Tensor) -> Tensor:
        return self._layer[0].feed_forward(self.base_layer, x)
