#!/usr/bin/env bash
# transformers 5.24.0, torch 2.13.0: a model on the meta device (to count FLOPs or shapes without weights) runs a
# forward pass with a KV cache, which is the default, and not with `use_cache=False`, which is how training runs it:
# without a cache and a mask it looks whether several sequences are packed in a row, and asks a tensor for its value.
# Seen: RuntimeError "Tensor.item() cannot be called on meta tensors". Under FakeTensorMode the same pass runs.
# Fails when that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0
"$folder/venv/bin/python" - <<'PY'
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlamaConfig, LlamaForCausalLM

config = LlamaConfig(
    vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
)
with torch.device("meta"):
    model, ids = LlamaForCausalLM(config), torch.zeros(2, 5, dtype=torch.long)
    assert model(input_ids=ids).logits.shape == (2, 5, 64)
    try:
        model(input_ids=ids, use_cache=False)
    except RuntimeError as error:
        assert "meta tensors" in str(error), error
        print("as described:", str(error).splitlines()[0])
    else:
        raise SystemExit("a pass without a cache runs on the meta device: the finding is out of date")
with FakeTensorMode():
    fake = LlamaForCausalLM(config)
    assert fake(input_ids=torch.zeros(2, 5, dtype=torch.long), use_cache=False).logits.shape == (2, 5, 64)
PY
