"""Top-k mixture of LoRA (moe_lora_topk.md)."""

from references.methods import ATTENTION, THREE

CASES = [
    {**THREE, "router.k": 2, "losses.switch_balance.coef": 0.3},
    {**THREE, "router.k": 1, "router.renormalize": False, "experts.targets": ["k", "gate"]},
    {**THREE, "router.k": 3, "losses.z_loss.coef": 0.2},
]
START = None
COUNTS = [
    ("LLAMA_3_8B", {}, 100_140_288),
    ("LLAMA_2_7B", {"experts.r": 4, "experts.targets": ATTENTION, "router.bias": False}, 37_748_736),
]
SIZES = {"experts.n": 3, "experts.r": 2}
GROWS = [{"experts.r": 3}, {"experts.n": 3}, {"router.bias": False}, {"experts.targets": ["q", "up"]}]
ONE_EXPERT = {"router.k": 1}
