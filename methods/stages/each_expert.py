"""An expert for each label, alone on its rows (Mixture-of-LoRAs, first stage)."""

from __future__ import annotations

from dataclasses import dataclass

from ..spec import ConfigError
from ..stage import Round, Stage


@dataclass(frozen=True)
class EachExpert(Stage):
    """One training an expert, on the rows of its label alone and with an optimiser of its own, while the
    others stay as they are (arXiv 2403.03432). All together see every row once in `length` passes: each has
    its label's share of the steps.

    Experts are numbered in the order of the labels' names. The method's router must send a row of label e to
    expert e while it trains, as `label_classifier` does.
    """

    kind = "each_expert"
    reads_labels = True

    def check(self, mixtures):
        for mixture in mixtures:
            if mixture.router.kind != "label_classifier":
                raise ConfigError(
                    f"router.kind={mixture.router.kind}: expected label_classifier, which sends the rows of "
                    "a label to its expert while it trains."
                )
            for name, bank in mixture.banks.items():
                if not {"A", "B"} <= bank.owners.keys():
                    raise ConfigError(
                        f"experts.{name}: experts of {bank.kind} share tensors and cannot train alone; "
                        "expected lora."
                    )

    def rounds(self, counts):
        return [
            Round(f"{self.kind}{label}", ("experts",), label, count / sum(counts))
            for label, count in enumerate(counts)
        ]
