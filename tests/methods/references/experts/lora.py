"""sum_e w_e (alpha / r_e) B_e A_e x (lora.md); gate_grad=sqrt: sum_e [s_e o_e + (w_e - s_e) stop(o_e)], s_e =
stop(sqrt w_e) (riemannian_moe_lora.md)."""

import math

import torch


def add_to_linear(part, p, w, x):
    total, start = 0, 0
    for e in range(part.n):
        r = part.r[e] if isinstance(part.r, tuple) else part.r
        own = slice(start, start + r)
        output = part.alpha / (math.sqrt(r) if part.rslora else r) * (p["B"][:, own] @ (p["A"][own] @ x))
        total, start = total + weighed(part, w[e], output), start + r
    return total


def weighed(part, w, output):
    """One expert's output times its weight, with the gradients that gate_grad asks for."""
    if part.gate_grad == "plain":
        return w * output
    root = torch.as_tensor(w).detach().sqrt()
    return root * output + (w - root) * output.detach()
