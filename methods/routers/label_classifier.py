"""A router that is taught, by label, to name the expert of a prompt (Mixture-of-LoRAs)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..router import LinearRouter
from ..routing import one_hot
from ..spec import ConfigError


@dataclass(frozen=True)
class LabelClassifier(LinearRouter):
    """`w = onehot(argmax(W h + b))`, once a sequence, h the last prompt token (arXiv 2403.03432).

    While training `w = onehot(label)`: the row's `skill_ids` are its label, and must be given. The weight is
    constant, so that the task's loss gives the router no gradient; `label_cross_entropy` teaches it. h is
    detached: what the router is taught does not change the experts below.
    """

    kind = "label_classifier"
    gives = ("logits", "labels")
    bias: bool = True
    granularity: Literal["sequence"] = "sequence"
    pool: Literal["last_prompt", "prompt_mean"] = "last_prompt"

    def reads_skills(self, training):
        return training

    def scores(self, p, x):
        return super().scores(p, x.detach())

    def route(self, scores, training, labels=None):
        if training and labels is None:
            raise ConfigError(
                "skill_ids=None: expected [batch] int64 in training, since router.kind=label_classifier is "
                "taught by them."
            )
        made = one_hot(labels if training else scores.argmax(-1), scores.shape[-1])
        if training:
            made.extras = {"labels": labels.unsqueeze(-1)}
        made.logits = scores
        return made
