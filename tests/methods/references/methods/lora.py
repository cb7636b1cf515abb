"""PEFT's LoRA (lora.md)."""

from references.methods import ATTENTION, SEVEN

CASES = []  # PEFT's own
START = None
COUNTS = [
    ("LLAMA_3_8B", {}, 23_068_672),
    ("LLAMA_2_7B", {"experts.r": 80, "experts.targets": SEVEN}, 199_884_800),
    ("LLAMA_2_7B", {"experts.r": 32, "experts.targets": ATTENTION}, 33_554_432),
    ("LLAMA_2_7B", {"experts.r": 8, "experts.targets": ["q", "v"]}, 4_194_304),
]
GROWS = [{"experts.r": 3}]
