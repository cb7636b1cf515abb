"""MixLoRA with top-p routing (mixlora.md)."""

from references.methods import THREE

_SMALL = {**THREE, "experts.dropout": 0.0, "losses.switch_balance.coef": 0.3}
CASES = [
    {**_SMALL, "router.p": 0.7},
    {**_SMALL, "router.p": 0.7, "router.renormalize": False},
]
START = 1e-5  # the same sums in another order
COUNTS = [
    ("LLAMA_2_7B", {}, 203_423_744),
]
SIZES = {"experts.n": 3, "experts.r": 2}
GROWS = [
    {"experts.r": 3},
    {"experts.n": 3},
    {"also.attention.experts.r": 3},
    {"also.attention.experts.targets": ["v"]},
]
ROUTER_AT_START = 1e-5  # all experts are equal, so only rounding is left
