"""Sparse MoA (moa_sparse.md)."""

from references.methods import BLOCK

CASES = [
    *(
        {**BLOCK, "router.grad": g, "input": i, "router.gamma_max": 0.9}
        for g in ("none", "subtract", "ste")
        for i in ("normed", "raw")
    ),
    {**BLOCK, "router.dynamic": False, "router.gamma_max": 0.5, "router.net": "linear"},
]
START = 1e-5  # adapter weights of gain 1e-4
COUNTS = [
    ("LLAMA_3_8B", {}, 22_289_120),
    ("QWEN3_8B", {}, 24_485_436),
    ("QWEN3_14B", {}, 34_496_920),
]
GROWS = [
    {"experts.r": 3},
    {"experts.lora.r": 3},
    {"experts.parallel_adapter.bottleneck": 5},
    {"router.width": 2},
    {"router.net": "linear"},
    {"router.dynamic": False},
    {"experts.lora.targets": ["q", "up"]},
]
LEARNING = {"router.grad": "subtract"}  # the threshold of the official code never learns
ROUTER_AT_START = None
