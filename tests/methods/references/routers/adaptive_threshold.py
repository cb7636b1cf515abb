"""tau = tau_max sigmoid(w_t u + b_t); g_i = p_i - tau where p_i >= tau; w_i = g_i / sum g (AdaMoLE).

The threshold's row is the last of the linear map; a bias of one entry is the threshold's own.
"""

import torch

from references.loops import Choice, dots, sigmoid, softmax

SOFT = False
SUMS_TO_ONE = True  # with tau_max = 1/E at least one expert is selected
LEARNS = "sometimes"
VARIANTS = [
    {},
    {"bias": True, "tau_max": 0.3},
    {"weights": "plain", "tau_max": 0.4},
    {"threshold": "constant", "weights": "plain"},
    {"threshold": "constant", "bias": True, "tau_max": 0.5},
]


def choose(options, tensors, u, **facts):
    weight, bias = tensors["weight"], tensors.get("bias")
    adaptive = options.threshold == "adaptive"
    experts = weight.shape[0] - adaptive
    z = dots(weight[:experts], bias if bias is not None and len(bias) > 1 else None, u)
    p = softmax(z)
    tau = torch.tensor(1 / experts if options.tau_max is None else options.tau_max, dtype=u.dtype)
    if adaptive:
        tau = tau * sigmoid(weight[-1] @ u + bias[-1])
    chosen = [bool(v >= tau) for v in p]
    gate = [
        ((v - tau) if options.weights == "shifted" else v) if m else 0 * v
        for v, m in zip(p, chosen, strict=True)
    ]
    total = sum(gate)
    w = [g / total if total.detach() > 0 else g for g in gate]
    return Choice(w, p, chosen, z, tau, [v - tau for v in p])
