"""sum_e w_e concat_h gamma_eh softmax(q_h (W_k P_e)_h^T / sqrt(d_h)) (W_v P_e)_h; queries carry their
positions (moa_soft.md)."""

import math

import torch


def in_attention(part, p, w, q, keys, values):
    total, length = 0, part.length
    for e in range(part.n):
        rows = p["embedding"][e * length : (e + 1) * length]
        k, v, parts = keys(rows), values(rows), []
        for h, query in enumerate(q):
            scores = torch.stack([query @ key[h] for key in k]) / math.sqrt(len(query))
            parts.append(
                p["gamma"][h, e] * sum(s * value[h] for s, value in zip(scores.softmax(0), v, strict=True))
            )
        total = total + w[e] * torch.cat(parts)
    return total
