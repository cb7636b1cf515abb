"""MoLoRA (molora.md)."""

from references.methods import SEVEN, THREE

CASES = [
    THREE,
    {**THREE, "experts.r": [1, 4, 2], "router.bias": True},
    {**THREE, "experts.rslora": True, "experts.targets": SEVEN},
    {**THREE, "experts.targets": ["q", "v", "down"], "experts.r": [2, 4, 8], "router.kind": "none"},
    *(
        # routers that are no linear map of the token, on linears of their own
        {**THREE, "router.kind": kind, "router.net": net, "experts.targets": ["q", "down"]}
        for kind in ("sigmoid", "threshold")
        for net in ("linear", "swiglu")
    ),
]
START = None
COUNTS = [("LLAMA_3_8B", {}, 100_139_008)]
SIZES = {"experts.n": 3, "experts.r": 2}
GROWS = [
    {"experts.r": 3},
    {"experts.n": 3},
    {"router.bias": True},
    {"experts.targets": ["q", "up"]},
    {"experts.r": [8, 8, 8, 8, 8, 8, 8, 9]},
]
ONE_EXPERT = {}
