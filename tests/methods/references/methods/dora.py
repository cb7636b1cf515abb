"""PEFT's DoRA (lora.md)."""

CASES = []  # PEFT's own
START = 1e-6  # m / |W| is 1 up to rounding
COUNTS = [("LLAMA_3_8B", {}, 23_068_672 + 32 * (3 * 4096 + 2 * 1024))]  # LoRA's, and a magnitude an output
GROWS = [{"experts.r": 3}]
