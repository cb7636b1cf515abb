"""Gradients of low-rank pairs preconditioned by the Gram matrix of their partner (Riemannian MoE-LoRA)."""

from __future__ import annotations

from dataclasses import dataclass

from ..lazy import Lazy
from ..rule import Rule
from ..spec import ConfigError, NonNegative

torch = Lazy("torch")


@dataclass(frozen=True)
class Riemannian(Rule):
    """For the pair A [r, d_in], B [d_out, r] of every expert:

        G_A <- (B^T B + delta I)^-1 G_A        G_B <- G_B (A A^T + delta I)^-1

    in fp32, once an optimiser step, on the gradients of the whole accumulated and clipped batch (arXiv
    2502.15828; of a single LoRA arXiv 2402.02347). damping: delta. relative: delta times the mean of the Gram
    matrix's diagonal instead, which does not blow up the first steps, where B is almost 0, and does not
    vanish beside large factors; the official code adds the constant. It also updates A before it looks at A
    A^T for B; here both are taken from the same A and B, as in its SGD form. Raises ConfigError for banks
    whose experts have no pair of their own.
    """

    kind = "riemannian"
    damping: NonNegative = 1e-6
    relative: bool = False

    def check(self, mixture):
        for name, bank in mixture.banks.items():
            if not {"A", "B"} <= bank.owners.keys():
                raise ConfigError(
                    f"experts.{name}: each expert of {bank.kind} needs a pair A, B of its own; expected "
                    "kind lora."
                )

    def after_backward(self, sites):
        with torch.no_grad():
            for view in (view for site in sites for view in site.banks):
                a, b = view.A, view.B
                if a.grad is None or b.grad is None:
                    continue
                changed = [
                    (self._solved(b_e.T @ b_e, ga), self._solved(a_e @ a_e.T, gb.T).T)
                    for a_e, b_e, ga, gb in self._experts(view, a, b)
                ]
                a.grad.copy_(torch.cat([ga for ga, _ in changed]))
                b.grad.copy_(torch.cat([gb for _, gb in changed], 1))

    def _experts(self, view, a, b):
        """(A, B, G_A, G_B) of each expert in fp32; the rows of A and columns of B lie expert by expert."""
        ranks = list(view.part.ranks)
        parts = zip(
            a.split(ranks), b.split(ranks, 1), a.grad.split(ranks), b.grad.split(ranks, 1), strict=True
        )
        return [tuple(t.float() for t in part) for part in parts]

    def _solved(self, gram, right):
        damping = self.damping * gram.diagonal().mean() if self.relative else self.damping
        identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        return torch.linalg.solve(gram + damping * identity, right)
