#!/usr/bin/env bash
# transformers 5.24.0, safetensors 0.8.0, torch 2.13.0: on a CPU a model that was loaded from safetensors is the
# mapped file. Whoever writes into that file afterwards, in place, changes the weights of the model in memory: a base
# that two runs share, rewritten during a run, gives results of neither. (Replacing the file by another, as
# `save_pretrained` does, leaves the loaded model alone.)
# Seen: a weight that was 1 is 2 after the file was written, without a call to the model.
# Fails when that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 safetensors==0.8.0
"$folder/venv/bin/python" - "$folder/model" <<'PY'
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

folder = Path(sys.argv[1])
config = LlamaConfig(
    vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
)
model = LlamaForCausalLM(config)
torch.nn.init.ones_(model.model.layers[0].mlp.up_proj.weight)
model.save_pretrained(folder)
loaded = LlamaForCausalLM.from_pretrained(folder)
weight = loaded.model.layers[0].mlp.up_proj.weight
assert bool((weight == 1).all())

file = folder / "model.safetensors"
ones, twos = (torch.full((512,), value).numpy().tobytes() for value in (1.0, 2.0))
place = file.read_bytes().index(ones)
with file.open("r+b") as stream:
    stream.seek(place)
    stream.write(twos)
if not bool((weight == 2).all()):
    raise SystemExit("the loaded model keeps its weights: the finding is out of date")
print("as described: the weight of the loaded model is", weight[0, 0].item())
PY
