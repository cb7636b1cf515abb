"""Mixture of (IA)^3 vectors (mov.md)."""

CASES = [
    {"experts.n": 3},
    {"experts.n": 2, "router.bias": True, "experts.targets": ["v", "down"]},
    {
        "experts.n": 3,
        "router": {"kind": "topk", "k": 2, "renormalize": False},
        "losses": {"z_loss": {"coef": 0.2}},
    },
    {"experts.n": 1, "router.kind": "none"},
]
START = 1e-5  # the weights' sum is 1 up to rounding
COUNTS = [("LLAMA_3_8B", {}, 7_929_856)]
SIZES = {"experts.n": 3}
GROWS = [{"experts.n": 3}, {"router.bias": True}, {"experts.targets": ["k", "down"]}]
ROUTER_AT_START = 1e-5  # all experts are equal, so only rounding is left
