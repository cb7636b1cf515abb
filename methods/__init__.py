"""Mixtures of adapters as a PEFT tuner.

    import moabench.methods                                   # PEFT now knows mixtures
    config = moabench.methods.load("moa_sparse")
    model = peft.get_peft_model(base, config)                 # save_pretrained / PeftModel.from_pretrained
                                                              work as usual
    with moabench.methods.record(model) as rec:               # routing and auxiliary losses of the passes
                                                              inside
        out = model(**batch)

Importing this package is cheap: torch, transformers and PEFT load at the first use of what needs them, and
the tuner registers itself with PEFT whenever PEFT is imported, before or after.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import wrapt

if TYPE_CHECKING:  # what editors and type checkers follow
    from .bank import AttentionExperts, Experts, FeedForwardExperts, LinearExperts
    from .effects import Watched, watch
    from .loss import Loss
    from .params import Param
    from .recorder import Recorder, capture_routing, record
    from .router import LinearRouter, Router
    from .routing import Routing
    from .spec import ConfigError
    from .tuner import MixtureConfig, MixtureModel, attach, load, param_count, peft_config

_HOME = {
    "MixtureConfig": "tuner",
    "load": "tuner",
    "peft_config": "tuner",
    "MixtureModel": "tuner",
    "param_count": "tuner",
    "attach": "tuner",
    "record": "recorder",
    "capture_routing": "recorder",
    "Recorder": "recorder",
    "watch": "effects",
    "Watched": "effects",
    "Routing": "routing",
    "ConfigError": "spec",
    "Router": "router",
    "LinearRouter": "router",
    "Experts": "bank",
    "LinearExperts": "bank",
    "FeedForwardExperts": "bank",
    "AttentionExperts": "bank",
    "Loss": "loss",
    "Param": "params",
}
__all__ = [
    "AttentionExperts",
    "ConfigError",
    "Experts",
    "FeedForwardExperts",
    "LinearExperts",
    "LinearRouter",
    "Loss",
    "MixtureConfig",
    "MixtureModel",
    "Param",
    "Recorder",
    "Router",
    "Routing",
    "Watched",
    "attach",
    "capture_routing",
    "load",
    "param_count",
    "peft_config",
    "record",
    "watch",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@wrapt.when_imported("peft")
def _register(peft: Any) -> None:
    importlib.import_module(f"{__name__}.tuner")
