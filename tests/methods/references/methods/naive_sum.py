"""MoA's experts added together (unipeft.md)."""

from references.methods import NO_PROMPT, PROMPT

CASES = [PROMPT]
START = 1e-5  # adapter weights of gain 1e-4
_NO_LORA = {"experts.lora": None, "experts.r": None, "experts.alpha": None}
COUNTS = [
    ("LLAMA_3_8B", {}, 17_171_968),
    # component ablations
    ("LLAMA_3_8B", {**NO_PROMPT, "experts.parallel_adapter": None, "experts.r": 16}, 23_068_672),
    ("LLAMA_3_8B", {**NO_PROMPT, **_NO_LORA}, 4_325_888),
    ("LLAMA_3_8B", {**_NO_LORA, "experts.parallel_adapter": None}, 1_311_744),
]
GROWS = [
    {"experts.r": 3},
    {"experts.lora.r": 3},
    {"experts.parallel_adapter.bottleneck": 5},
    {"experts.prompt.length": 3},
]
ROUTER_AT_START = None
