#!/usr/bin/env bash
# accelerate 1.15.0, torch 2.13.0: a module that marks one of its parameters with a Python attribute (as modules do
# to keep weight decay off a tensor) cannot be built under `init_empty_weights`: the parameter is made again on the
# meta device with all its attributes as keyword arguments of its class, which knows none of them.
# Seen: TypeError "Parameter.__new__() got an unexpected keyword argument 'no_weight_decay'". Without the attribute,
# or with it set after the parameter was registered, the same module is built.
# Fails when that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 accelerate==1.15.0 numpy
"$folder/venv/bin/python" - <<'PY'
import torch
from accelerate import init_empty_weights


class Scale(torch.nn.Module):
    def __init__(self, when):
        super().__init__()
        weight = torch.nn.Parameter(torch.ones(3))
        if when == "before":
            weight.no_weight_decay = True
        self.weight = weight
        if when == "after":
            self.weight.no_weight_decay = True


for when in ("never", "after"):
    with init_empty_weights():
        assert Scale(when).weight.device.type == "meta"
try:
    with init_empty_weights():
        Scale("before")
except TypeError as error:
    assert "no_weight_decay" in str(error), error
    print("as described:", error)
else:
    raise SystemExit("a parameter with an attribute is built: the finding is out of date")
PY
