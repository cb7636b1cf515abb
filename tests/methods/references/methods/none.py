"""The frozen base."""

CASES = []
START = None
COUNTS = [("LLAMA_3_8B", {}, 0)]
