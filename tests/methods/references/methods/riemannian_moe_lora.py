"""Top-k mixture of LoRA with gate_grad=sqrt (riemannian_moe_lora.md)."""

from references.methods import THREE

_SMALL = {**THREE, "experts.dropout": 0.0}
CASES = [
    {**_SMALL, "router.k": 2},
    {**_SMALL, "router.k": 3, "experts.r": [1, 4, 2], "experts.targets": ["q", "down"]},
    {
        **_SMALL,
        "router.k": 2,
        "experts.kind": "lora_shared_a",
        "rules": None,
        "experts.targets": ["k", "gate"],
    },
]
START = None
COUNTS = [("LLAMA_32_3B", {}, 52_756_480)]
SIZES = {"experts.n": 3, "experts.r": 2, "experts.alpha": 2, "router.k": 2}
GROWS = [
    {"experts.r": 3},
    {"experts.n": 10},
    {"router.bias": True},
    {"experts.targets": ["q", "up"]},
]
ONE_EXPERT = {"router.k": 1, "experts.dropout": 0.0}
