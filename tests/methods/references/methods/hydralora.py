"""HydraLoRA (hydralora.md)."""

from references.methods import THREE

CASES = [THREE]
START = None
COUNTS = [
    ("LLAMA_3_8B", {}, 45_088_768),
    ("LLAMA_2_7B", {"experts.r": 4, "experts.n": 4, "experts.targets": ["gate", "up", "down"]}, 18_284_544),
]
SIZES = {"experts.n": 3, "experts.r": 2}
GROWS = [{"experts.r": 3}, {"experts.n": 3}, {"router.bias": True}, {"experts.targets": ["q", "up"]}]
ONE_EXPERT = {}
