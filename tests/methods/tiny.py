"""Tiny random models of stock architectures, a ragged batch, and methods attached to them. Nothing here knows
an equation."""

from __future__ import annotations

import references
import torch
import transformers as tf

from moabench import methods
from moabench.methods import catalog

VOCAB, PAD = 97, 0
SIZES = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    initializer_range=0.2,  # large enough for logits to differ visibly
    pad_token_id=PAD,
    bos_token_id=1,
    eos_token_id=2,
)
ARCHITECTURES = {
    "llama": (tf.LlamaForCausalLM, tf.LlamaConfig, {}),
    "qwen2": (tf.Qwen2ForCausalLM, tf.Qwen2Config, {}),
    "qwen3": (tf.Qwen3ForCausalLM, tf.Qwen3Config, {"head_dim": 16}),
    "mistral": (tf.MistralForCausalLM, tf.MistralConfig, {}),
    "gemma2": (tf.Gemma2ForCausalLM, tf.Gemma2Config, {"head_dim": 16, "sliding_window": 8}),
    "phi3": (tf.Phi3ForCausalLM, tf.Phi3Config, {}),
    "olmo2": (tf.Olmo2ForCausalLM, tf.Olmo2Config, {}),
}
METHODS = {name: catalog.parse(catalog.raw(name)) for name in catalog.names()}
MIXTURES = [name for name, method in METHODS.items() if method.tuner == "mixture"]
ADAPTERS = [name for name, method in METHODS.items() if method.tuner in ("mixture", "peft")]


def of_routers(name: str, fact: str) -> list:
    """What the references of a method's routers say of `fact`, e.g. `JUMPS`."""
    found = [m.router.kind for m in METHODS[name].mixtures if m.routed]
    return [getattr(references.of("routers", kind), fact) for kind in found]


def needing(fact: str) -> list[str]:
    """Methods that cannot decide without `skill` or `ids`."""
    return [name for name in METHODS if any(fact in given for given in of_routers(name, "FACTS"))]


ROUTED = [name for name in MIXTURES if any(m.routed for m in METHODS[name].mixtures)]
SPARSE = [name for name in ROUTED if not all(of_routers(name, "SOFT"))]


def base(architecture: str = "llama", seed: int = 0, **sizes):
    """A random model in evaluation mode, the same for the same seed."""
    model, config, more = ARCHITECTURES[architecture]
    torch.manual_seed(seed)
    return model(config(**{**SIZES, **more, **sizes})).eval()


def attached(name: str, model=None, trained: bool = True, **overrides):
    """`name` on `model` (default: the tiny Llama) in evaluation mode; `trained` draws every trainable tensor
    at random."""
    model = base() if model is None else model
    torch.manual_seed(1)
    model = methods.attach(model, catalog.override(catalog.raw(name), overrides)).eval()
    return randomise(model) if trained else model


def randomise(model, seed: int = 2, std: float = 0.3):
    """Trainable tensors from N(0, std^2), so that no expert is at its zero start and routers decide
    differently for each token."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, tensor in trainable(model).items():
            if "magnitude" not in name:  # DoRA's row norms must stay positive
                tensor.copy_(torch.randn(tensor.shape, dtype=tensor.dtype) * std)
    return model


def trainable(model) -> dict[str, torch.nn.Parameter]:
    """Trainable parameters by name."""
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def batch(left: int = 0, right: int = 0, length: int = 9, seed: int = 3) -> dict[str, torch.Tensor]:
    """Two sequences; the first has `left` and `right` padding tokens. Positions count real tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (2, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :left] = 0
    mask[0, length - right :] = 0
    ids = ids.where(mask.bool(), PAD)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}


def answer_only(ids, prompt: int = 5):
    """Labels that leave out the first `prompt` tokens and padding."""
    labels = ids.masked_fill(ids == PAD, -100)
    labels[:, :prompt] = -100
    return labels


def prompt_mask(model, like, prompt: int = 5) -> dict[str, torch.Tensor]:
    """The keyword that marks prompt tokens, where the model takes it."""
    if not getattr(model, "accepts_prompt_mask", False):
        return {}
    return {"prompt_mask": (torch.arange(like.shape[1]) < prompt).expand_as(like)}


def facts(model, inputs: dict) -> dict[str, torch.Tensor]:
    """The keyword that says each sequence's skill, where the model's routers read it: by its first real
    token, so that a sequence keeps its skill in any batch and under any padding."""
    sites = model.base_model.sites() if getattr(model, "accepts_skill_ids", False) else []
    experts = [len(s.experts) for s in sites if s.router is not None and s.router.reads_skills(True)]
    if not experts or "skill_ids" in inputs:
        return {}
    ids = inputs["input_ids"]
    mask = inputs.get("attention_mask", torch.ones_like(ids))
    first = ids.gather(1, mask.long().argmax(1, keepdim=True))[:, 0]
    return {"skill_ids": first % min(experts)}


def given(model, inputs: dict) -> dict[str, torch.Tensor]:
    """`inputs` with the facts that the model's routers read."""
    return {**inputs, **facts(model, inputs)}


def logits(model, **inputs):
    """Logits without gradients."""
    with torch.no_grad():
        return model(**given(model, inputs)).logits


def losses(model, inputs: dict, labels) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Task loss and auxiliary losses of one pass."""
    with methods.record(model) as recorder:
        task = model(**given(model, inputs), labels=labels).loss
    return task, recorder.losses


def train(model, steps: int = 3, lr: float = 1e-2, weight_decay: float = 0.1, inputs=None):
    """A few AdamW steps on one batch, in training mode; the model comes back in evaluation mode."""
    inputs = inputs or batch()
    optimiser = torch.optim.AdamW(list(trainable(model).values()), lr=lr, weight_decay=weight_decay)
    model.train()
    for _ in range(steps):
        task, extra = losses(model, inputs, answer_only(inputs["input_ids"]))
        optimiser.zero_grad()
        (task + sum(extra.values())).backward()
        optimiser.step()
    return model.eval()


def assert_near(name: str, got, expected, bound: float) -> None:
    """Fail with the tensor's name unless the RMS error relative to the RMS of `expected` is at most `bound`
    (None counts as zeros)."""
    got = torch.zeros_like(expected) if got is None else got.detach()
    assert got.shape == expected.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    error = (got.double() - expected.detach().double()).square().mean().sqrt().item()
    size = expected.detach().double().square().mean().sqrt().item()
    assert error <= bound * (size or 1.0), (
        f"{name}: relative RMS error {error / (size or 1.0):.2e}, expected at most {bound:.0e}"
    )
