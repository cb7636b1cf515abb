"""FFN(h) + sum_e w_e (U_e silu(D_e h + b_e) + c_e) (moa_soft.md)."""

from references.loops import silu


def feed_forward(part, p, w, ffn, x, y):
    m = part.bottleneck
    for e in range(part.n):
        own = slice(e * m, (e + 1) * m)
        hidden = silu(p["down"][own] @ x + p["down_bias"][own])
        y = y + w[e] * (p["up"][:, own] @ hidden + p["up_bias"][:, e])
    return y
