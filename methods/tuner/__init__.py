"""The mixtures as a PEFT tuner on stock transformers models. Importing it makes PEFT know them.

PEFT comes first: its import fires the hook in moabench.methods, which then finds this package on its way in
and leaves it alone.
"""

import peft  # noqa: F401

from .config import MixtureConfig, attach, load, peft_config
from .model import MixtureModel, param_count, register

register()

__all__ = ["MixtureConfig", "MixtureModel", "attach", "load", "param_count", "peft_config"]
