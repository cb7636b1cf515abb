"""UniPEFT (unipeft.md)."""

from references.methods import PROMPT

CASES = [PROMPT, {**PROMPT, "gates": {"lora": "lora", "prompt": "prompt", "parallel_adapter": "prompt"}}]
START = 1e-5  # adapter weights of gain 1e-4
COUNTS = [("LLAMA_3_8B", {}, 17_565_280)]
GROWS = [
    {"experts.r": 3},
    {"experts.lora.r": 3},
    {"experts.parallel_adapter.bottleneck": 5},
    {"experts.prompt.length": 3},
    {"experts.lora.targets": ["q", "up"]},
]
ROUTER_AT_START = None
