"""MoLoRA's experts by a hash of the prompt."""

from references.methods import THREE

CASES = [THREE, {**THREE, "router.granularity": "token"}]
START = None
COUNTS = [("LLAMA_3_8B", {}, 32 * 8 * 8 * (4 * 4096 + 2 * (4096 + 1024) + 14336 + 4096))]
SIZES = {"experts.n": 3, "experts.r": 2}
GROWS = [{"experts.r": 3}, {"experts.n": 3}, {"experts.targets": ["q", "up"]}]
ONE_EXPERT = {}
