"""Top-k mixture of LoRA under a bias that follows the loads (moe_lora_bias.md)."""

from references.methods import THREE

CASES = [
    {**THREE, "router.k": 2, "losses": {"switch_balance": {"coef": 0.3}}},
    {
        **THREE,
        "router.k": 1,
        "router.route_scale": 2.5,
        "router.bias": True,
        "experts.targets": ["k", "gate"],
    },
]
START = None
COUNTS = [("LLAMA_3_8B", {}, 100_139_008)]  # as molora: the bias is no parameter
SIZES = {"experts.n": 3, "experts.r": 2}
GROWS = [{"experts.r": 3}, {"experts.n": 3}, {"router.bias": True}, {"experts.targets": ["q", "up"]}]
