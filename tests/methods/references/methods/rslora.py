"""PEFT's LoRA with another scale (lora.md)."""

CASES = []  # PEFT's own
START = None
COUNTS = [("LLAMA_3_8B", {}, 23_068_672)]
GROWS = [{"experts.r": 3}]
