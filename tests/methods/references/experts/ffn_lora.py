"""sum_e w_e E_e(h), each expert the whole block with its own LoRA on gate, up and down (mixlora.md)."""

import math

from references.loops import silu


def feed_forward(part, p, w, ffn, x, y):
    total, r = 0, part.r
    scale = part.alpha / (math.sqrt(r) if part.rslora else r)
    for e in range(part.n):
        own = slice(e * r, (e + 1) * r)
        gate = ffn.gate_proj(x) + scale * (p["gate_B"][:, own] @ (p["gate_A"][own] @ x))
        up = ffn.up_proj(x) + scale * (p["up_B"][:, own] @ (p["up_A"][own] @ x))
        inner = silu(gate) * up
        down = ffn.down_proj(inner) + scale * (p["down_B"][:, own] @ (p["down_A"][own] @ inner))
        total = total + w[e] * down
    return total
