"""The oracle: routes by the true skill of the sequence. An upper reference, not a method: real data has no
such label."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..router import FactRouter
from ..routing import one_hot
from ..spec import ConfigError


@dataclass(frozen=True)
class Oracle(FactRouter):
    """`w = onehot(skill_ids mod E)` at every site, without parameters.

    The forward takes `skill_ids` [B] int64, numbered from 0; with more skills than experts, those equal
    modulo E share one. Passes that continue from a KV cache may leave the ids out. Raises ConfigError for ids
    that are missing or negative.
    """

    kind = "oracle"
    granularity: Literal["sequence"] = "sequence"

    def reads_skills(self, training):
        return True

    def decide(self, context, experts):
        if context.skill_ids is None:
            if context.continues:
                return None
            raise ConfigError(
                "skill_ids=None: expected [batch] int64 at the forward, since router.kind=oracle "
                "routes by the true skill."
            )
        return one_hot(context.skill_ids % experts, experts)
