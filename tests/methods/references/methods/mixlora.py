"""MixLoRA with top-k routing (mixlora.md)."""

from references.methods import THREE

_SMALL = {**THREE, "experts.dropout": 0.0, "losses.switch_balance.coef": 0.3}
CASES = [
    {**_SMALL, "router.k": 2},
    {**_SMALL, "router.k": 1, "router.renormalize": False, "losses.switch_balance.scope": "site"},
]
START = 1e-5  # the same sums in another order
COUNTS = [
    ("LLAMA_3_8B", {}, 241_172_480),
    *(
        ("LLAMA_2_7B", {"experts.r": r}, n)
        for r, n in ((2, 26_345_472), (4, 51_642_368), (8, 102_236_160), (16, 203_423_744), (32, 405_798_912))
    ),
]
SIZES = {"experts.n": 3, "experts.r": 2}
GROWS = [
    {"experts.r": 3},
    {"experts.n": 3},
    {"also.attention.experts.r": 3},
    {"also.attention.experts.targets": ["v"]},
]
ROUTER_AT_START = 1e-5  # all experts are equal, so only rounding is left
