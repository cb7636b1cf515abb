"""Every parameter of the base trains."""

CASES = []
START = None
COUNTS = [("LLAMA_3_8B", {}, 8_030_261_248)]
