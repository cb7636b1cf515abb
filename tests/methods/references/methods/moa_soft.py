"""Soft MoA (moa_soft.md)."""

from references.methods import NO_PROMPT, PROMPT

CASES = [
    PROMPT,
    {
        **PROMPT,
        "input": "raw",
        "router.net": "linear",
        "experts.lora.targets": ["v", "o", "up", "gate", "down"],
    },
]
START = 1e-5  # adapter weights of gain 1e-4
COUNTS = [
    ("LLAMA_3_8B", {}, 24_520_288),
    ("LLAMA_3_8B", {"router.net": "linear"}, 18_089_696),
    ("LLAMA_3_8B", NO_PROMPT, 22_158_016),  # the HF path
    ("QWEN3_8B", NO_PROMPT, 24_337_944),
    ("QWEN3_14B", NO_PROMPT, 34_292_080),
]
GROWS = [
    {"experts.r": 3},
    {"experts.lora.r": 3},
    {"experts.parallel_adapter.bottleneck": 5},
    {"experts.prompt.length": 3},
    {"router.width": 2},
    {"router.net": "linear"},
    {"experts.lora.targets": ["q", "up"]},
]
ROUTER_AT_START = None
