"""Instance-level MoA (moa_instance.md)."""

from references.methods import PROMPT

CASES = [PROMPT, {**PROMPT, "input": "normed", "router.pool": "last_prompt"}]
START = 1e-5  # adapter weights of gain 1e-4
COUNTS = [("LLAMA_3_8B", {}, 24_520_288), ("LLAMA_3_8B", {"router.net": "linear"}, 18_089_696)]
GROWS = [
    {"experts.r": 3},
    {"experts.lora.r": 3},
    {"experts.parallel_adapter.bottleneck": 5},
    {"experts.prompt.length": 3},
    {"router.width": 2},
    {"router.net": "linear"},
]
ROUTER_AT_START = None
