"""Banks inside attention, through transformers' own switch for attention functions: no model code is changed.

`mixture_<name>` runs the stock function <name> and adds what the layer's mixtures contribute from the same
queries. Masks are made as for <name>.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

PREFIX = "mixture_"


def route_attention(model: nn.Module) -> None:
    """Make the model's attention add the contributions of banks inside attention; a no-op where it does
    already."""
    stock = model.config._attn_implementation or "eager"
    if stock.startswith(PREFIX):
        return
    name = PREFIX + stock
    AttentionInterface.register(name, _with_mixture(stock))
    masks = AttentionMaskInterface()
    if stock in masks:
        AttentionMaskInterface.register(name, masks[stock])
    model.config._attn_implementation = name


def stock_attention(model: nn.Module) -> None:
    """Undo `route_attention`."""
    name = model.config._attn_implementation or ""
    if name.startswith(PREFIX):
        model.config._attn_implementation = name[len(PREFIX) :]


@contextmanager
def seeing(module: nn.Module, look: Callable[[Tensor, Tensor], Any]) -> Iterator[None]:
    """Inside, `look(key, value)` is shown what the attention `module` attends to, [B, H, L, hd]."""
    module._seen_by = look
    try:
        yield
    finally:
        del module._seen_by


def _with_mixture(stock: str):
    functions = AttentionInterface()

    def attention(module, query, key, value, attention_mask, *args, **kwargs):
        if (look := getattr(module, "_seen_by", None)) is not None:
            look(key, value)
        if stock == "eager":  # each model file has its own
            function = sys.modules[type(module).__module__].eager_attention_forward
        else:
            function = functions[stock]
        output, weights = function(module, query, key, value, attention_mask, *args, **kwargs)
        owner = getattr(module, "_mixture", None)
        if owner is not None:
            scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
            delta = owner[0].attention(query, scaling)
            output = output if delta is None else output + delta
        return output, weights

    return attention
