"""AdaMoLE (adamole.md)."""

from references.methods import ATTENTION, THREE

CASES = [
    {**THREE, "losses.switch_balance.coef": 0.3},
    {
        **THREE,
        "router.bias": False,
        "losses.switch_balance": {"coef": 0.3, "values": "shifted", "reduce": "mean"},
    },
]
START = None
COUNTS = [
    ("LLAMA_3_8B", {}, 101_123_488),
    ("LLAMA_2_7B", {"experts.r": 4, "experts.targets": ATTENTION, "router.bias": False}, 38_273_152),
]
SIZES = {"experts.n": 3, "experts.r": 2}
GROWS = [{"experts.r": 3}, {"experts.n": 3}, {"router.bias": False}, {"experts.targets": ["q", "up"]}]
ONE_EXPERT = {}
