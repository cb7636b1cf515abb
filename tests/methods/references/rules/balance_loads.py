"""b_i <- b_i + u sign(mean load - load_i), load_i the tokens of the step that chose i (moe_lora_bias.md)."""

import torch


def after_step(rule, site, chosen):
    experts = len(site.tensors["load_bias"])
    loads = [sum(bool(row[i]) for row in chosen) for i in range(experts)]
    mean, bias = sum(loads) / experts, site.tensors["load_bias"].double().tolist()
    moved = [b + rule.speed * ((mean > n) - (mean < n)) for b, n in zip(bias, loads, strict=True)]
    return {"load_bias": torch.tensor(moved, dtype=torch.float64)}
