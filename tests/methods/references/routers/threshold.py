"""m_i = [g_i >= tau], tau = Gamma_max sigmoid(v u + c) or Gamma_max; the weight by the way its gradient goes
(sparse MoA)."""

import torch

from references.loops import Choice
from references.loops import sigmoid as gate
from references.routers.sigmoid import scores

SOFT = False
JUMPS = True
SUMS_TO_ONE = False
VARIANTS = [
    *({"grad": g, "net": n} for g in ("none", "subtract", "ste") for n in ("linear", "swiglu")),
    *({"grad": g, "gamma_max": 0.8} for g in ("none", "subtract", "ste")),
    *({"grad": g, "gamma_max": 0.6, "dynamic": False} for g in ("none", "subtract", "ste")),
    {"dynamic": False, "gamma_max": 0.6, "grad": "ste", "temperature": 0.5},
    {"gamma_max": 0.0, "grad": "subtract"},
]
QUIET = {"threshold_weight": ("grad", "none"), "threshold_bias": ("grad", "none")}  # as the official code


def choose(options, tensors, u, **facts):
    z = scores(options, tensors, u)
    g = [gate(v) for v in z]
    tau = torch.tensor(options.gamma_max, dtype=u.dtype)
    if options.dynamic:
        tau = tau * gate(tensors["threshold_weight"][0] @ u + tensors["threshold_bias"][0])
    chosen = [bool(v >= tau) for v in g]
    w = []
    for v, m in zip(g, chosen, strict=True):
        if options.grad == "none":
            w.append(v * float(m))
        elif options.grad == "subtract":
            w.append((v - tau) * float(m))
        else:  # forward value v m; backward as if the mask were sigmoid((g - tau) / T)
            soft = gate((v - tau) / options.temperature)
            w.append(v * (float(m) + soft - soft.detach()))
    return Choice(w, g, chosen, z, tau)
