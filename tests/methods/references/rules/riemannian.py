"""G_A <- (B^T B + delta I)^-1 G_A, G_B <- G_B (A A^T + delta I)^-1 for the pair of each expert, both from the
same A and B (riemannian_moe_lora.md)."""

import torch


def _inverse(rule, gram):
    delta = rule.damping * (sum(gram[i, i] for i in range(len(gram))) / len(gram) if rule.relative else 1)
    return torch.linalg.inv(gram + delta * torch.eye(len(gram), dtype=gram.dtype))


def after_backward(rule, bank):
    a, b = (t.detach().double() for t in (bank.A, bank.B))
    grad_a, grad_b = bank.A.grad.double(), bank.B.grad.double()
    rows, columns, start = [], [], 0
    for e in range(bank.part.n):
        r = bank.part.r[e] if isinstance(bank.part.r, tuple) else bank.part.r
        own = slice(start, start + r)
        rows.append(_inverse(rule, b[:, own].T @ b[:, own]) @ grad_a[own])
        columns.append(grad_b[:, own] @ _inverse(rule, a[own] @ a[own].T))
        start += r
    return {"A": torch.cat(rows), "B": torch.cat(columns, 1)}
