"""What a method must be, said once.

CASES: overrides under which a whole tiny model is held against the loops (../llama.py)
START: how far it starts from the base: None, bitwise at it; else the relative RMS of the logits' difference
"""

from transformers import LlamaConfig, Qwen3Config

REQUIRED = ("CASES", "START")

COUNTS: list[tuple[str, dict, int]] = []
"""Published numbers of trainable parameters: (model below, overrides, number), counted in the authors' code,
in their paper's tables, or by the formula of the card."""
SIZES: dict = {}
"""Overrides that make it small where a test is slow."""
GROWS: list[dict] = []
"""Overrides that each change the number of its parameters."""
LEARNING: dict = {}
"""Overrides with which every trained tensor gets a gradient once nothing is zero."""
ROUTER_AT_START: float | None = 0.0
"""Largest norm of the task's gradient of a router at the start, where no expert does anything yet, or all do
the same; None where routers learn from the first step on."""
ONE_EXPERT: dict | None = None
"""Overrides with which one expert is plain LoRA, whatever its router does; None where it is not."""

LLAMA_3_8B = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
)
LLAMA_2_7B = LlamaConfig(
    vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
)
LLAMA_32_3B = LlamaConfig(
    vocab_size=128256,
    hidden_size=3072,
    intermediate_size=8192,
    num_hidden_layers=28,
    num_attention_heads=24,
    num_key_value_heads=8,
    head_dim=128,
    tie_word_embeddings=True,
)
QWEN3_8B = Qwen3Config(
    vocab_size=151936,
    hidden_size=4096,
    intermediate_size=12288,
    num_hidden_layers=36,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
)
QWEN3_14B = Qwen3Config(
    vocab_size=151936,
    hidden_size=5120,
    intermediate_size=17408,
    num_hidden_layers=40,
    num_attention_heads=40,
    num_key_value_heads=8,
    head_dim=128,
)
TOTALS = {"LLAMA_3_8B": 8_030_261_248, "LLAMA_2_7B": 6_738_415_616}
"""Parameters of the frozen models, as on the hub."""
ATTENTION = ["q", "k", "v", "o"]
SEVEN = [*ATTENTION, "gate", "up", "down"]
THREE = {"experts.n": 3, "experts.r": 2, "experts.alpha": 3}
"""Three experts of rank 2."""
BLOCK = {"experts.r": 2, "experts.alpha": 3, "experts.parallel_adapter.bottleneck": 5}
"""MoA's experts, small; with a prompt too:"""
PROMPT = BLOCK | {"experts.prompt.length": 3}
NO_PROMPT = {"experts.prompt": None}
