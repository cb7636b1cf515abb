"""A LoRA for each label and routers taught by them (mixture_of_loras.md)."""

from references.methods import THREE

_SMALL = {**THREE, "experts.dropout": 0.0}
CASES = [
    _SMALL,
    {**_SMALL, "router.bias": False, "router.pool": "prompt_mean", "losses.label_cross_entropy.coef": 0.3},
]
START = None
COUNTS = [("LLAMA_3_8B", {}, 1_048_832 + 32 * 8 * 8 * (2 * 4096 + 2 * (4096 + 1024) + 3 * (4096 + 14336)))]
SIZES = {"experts.n": 3, "experts.r": 2}
GROWS = [{"experts.r": 3}, {"experts.n": 3}, {"router.bias": False}, {"experts.targets": ["q", "up"]}]
ONE_EXPERT = {"experts.dropout": 0.0}
