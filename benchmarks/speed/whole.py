"""Levels `linear`, `ffn`, `block` and `model`: methods as their users attach them, on parts of a stock Llama
or on all of it.

`linear`  its output projection (width x width): soft and top-k mixtures against PEFT's LoRA
`ffn`     its feed-forward block: MixLoRA against the published and the plain form
`block`   one decoder layer, forward and backward from a random gradient
`model`   a train step (loss and auxiliary losses, backward), greedy decoding, on CUDA also the step as a
          graph

Ratios are to the frozen base in the same rounds. B is drawn at random, so that nothing is at its zero start.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import peft
import torch
import transformers
from torch import Tensor, nn

import moabench.methods as methods
from moabench.benchmarks.training import step
from moabench.kernels import backend
from moabench.methods import catalog
from moabench.methods.tuner.architecture import PEFT_NAMES
from moabench.methods.tuner.layer import RoutedLinear

from .measure import DTYPES, Setting, Wanted
from .peers import peer
from .published_forms import grouped_unfit

SEVEN = ("q", "k", "v", "o", "gate", "up", "down")
VOCABULARY = 1536


@dataclass
class Rival:
    """One model under test. case: the method; name: how it runs; backend: of our kernels; ours: the attached
    mixture that a peer copies, with pairs of (tensor of ours, its copy here)."""

    case: str
    name: str
    model: nn.Module
    backend: backend.Name = "torch"
    ours: nn.Module | None = None
    pairs: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    @property
    def key(self) -> str:
        return f"{self.case}: {self.name}"


def llama(setting: Setting, layers: int, seed: int = 0) -> nn.Module:
    """A frozen random Llama. Up to width 2048 inner width 43/16 of it and all heads their own keys; above,
    the shape of Llama-3.1-8B's layers (inner width 3.5 times, four query heads a key)."""
    torch.manual_seed(seed)
    large = setting.width > 2048
    heads = max(1, setting.width // 128) if large else 8
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=setting.width,
        intermediate_size=setting.width * 7 // 2 if large else setting.width * 43 // 16,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 4 if large and heads % 4 == 0 else heads,
        tie_word_embeddings=True,
    )
    with torch.device(setting.device):
        return transformers.LlamaForCausalLM(config).to(DTYPES[setting.dtype]).requires_grad_(False)


def sized(name: str, setting: Setting) -> dict:
    """A method's data with the setting's experts, rank and k, without dropout; mixtures of linears on all
    seven (level `linear`: on the output projection). Methods with other adapters keep their own sizes."""
    data, of_linears = (
        catalog.raw(name),
        {"dropout": 0.0, "targets": ["o"] if setting.level == "linear" else list(SEVEN)},
    )
    experts = data.get("experts", {})
    if data.get("tuner") == "peft":
        return catalog.override(data, {"experts": {"r": setting.rank, "alpha": setting.rank} | of_linears})
    if experts.get("kind") == "ffn_lora":
        data = catalog.override(
            data,
            {"experts": {"n": setting.experts, "r": setting.rank, "alpha": 2 * setting.rank, "dropout": 0.0}},
        )
        data = data | {"also": None} if setting.level == "ffn" else data
    elif "kind" in experts:
        data = catalog.override(
            data, {"experts": {"n": setting.experts, "r": setting.rank, "alpha": setting.rank} | of_linears}
        )
    return (
        catalog.override(data, {"router": {"k": setting.k}})
        if data.get("router", {}).get("kind") == "topk"
        else data
    )


def wake(model: nn.Module, seed: int = 2) -> nn.Module:
    """Draw every trained matrix that starts at zero."""
    torch.manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad and p.dim() == 2 and not p.detach().any():
            nn.init.normal_(p, 0.0, 0.02)
    return model


def attach(name: str, base: nn.Module, setting: Setting) -> nn.Module:
    """A method on a copy of the base."""
    torch.manual_seed(1)
    return wake(methods.attach(copy.deepcopy(base), sized(name, setting)))


def peft_lora(base: nn.Module, setting: Setting, rank: int, own_dtype: bool) -> nn.Module:
    """PEFT's LoRA where our mixtures sit; own_dtype: adapters in the model's dtype instead of PEFT's default,
    fp32."""
    torch.manual_seed(1)
    targets = [n for role in (("o",) if setting.level == "linear" else SEVEN) for n in PEFT_NAMES[role]]
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=targets)
    return wake(peft.get_peft_model(copy.deepcopy(base), config, autocast_adapter_dtype=not own_dtype))


PEERS = {
    "molora": ("loop",),
    "moe_lora_topk": ("loop", "gather", "grouped"),
    "mixlora": ("published", "vanilla"),
}
"""Forms of other code that a method is compared with."""


def rivals(
    setting: Setting, base: nn.Module, names: list[str], wanted: Wanted
) -> tuple[list[Rival], list[str]]:
    """The frozen base, PEFT's LoRA, and each method as ours and in the forms of other code; what cannot run
    here, with the reason."""
    cuda = torch.device(setting.device).type == "cuda"
    widths = (base.config.hidden_size, base.config.intermediate_size)
    found, unfit = [Rival("frozen", "frozen", base)], []
    if setting.level in ("linear", "block"):
        for rank in (8, 64):
            found.append(Rival("lora", f"PEFT r{rank}", peft_lora(base, setting, rank, False)))
            if setting.dtype != "fp32":
                found.append(Rival("lora", f"PEFT r{rank}, own dtype", peft_lora(base, setting, rank, True)))
    for name in names:
        ours = attach(name, base, setting)
        mixture = catalog.parse(catalog.raw(name)).tuner == "mixture"
        found.append(Rival(name, "torch" if mixture else "PEFT", ours))
        if mixture and cuda:
            found.append(Rival(name, "triton", ours, "triton"))
        for form in PEERS.get(name, ()) if setting.level != "model" or (cuda and name == "molora") else ():
            why = grouped_unfit(DTYPES[setting.dtype], setting.rank, *widths) if form == "grouped" else None
            if why and wanted(form):
                unfit.append(f"{setting.level} {name} {setting.dtype}: {form}: {why}")
            elif wanted(form):
                model, pairs = peer(ours, base, form)
                found.append(Rival(name, form, model, ours=ours, pairs=pairs))
    return [r for r in found if wanted(r.name) or r.case == "frozen"], unfit


def part(setting: Setting, model: nn.Module) -> Callable[[Tensor], Tensor]:
    """The function of hidden states [1 or B, L, d] that a level runs."""
    decoder = (model.get_base_model() if isinstance(model, peft.PeftModel) else model).model
    if setting.level == "linear":
        return decoder.layers[0].self_attn.o_proj
    if setting.level == "ffn":
        return decoder.layers[0].mlp
    return lambda x: decoder(inputs_embeds=x, use_cache=False).last_hidden_state


def shape(setting: Setting) -> tuple[int, int]:
    """Sequences and length of the setting's tokens: 128 long on a CPU and at most 2048 on CUDA."""
    length = min(setting.tokens, 128 if torch.device(setting.device).type == "cpu" else 2048)
    return max(1, setting.tokens // length), length


def hidden(setting: Setting, seed: int = 3) -> tuple[Tensor, Tensor]:
    """Hidden states [B, L, d] that ask for a gradient, and a gradient of the output."""
    generator, dtype = torch.Generator().manual_seed(seed), DTYPES[setting.dtype]
    drawn = [
        torch.randn(*shape(setting), setting.width, generator=generator).to(setting.device, dtype)
        for _ in range(2)
    ]
    return drawn[0].requires_grad_(), drawn[1]


def clear(model: nn.Module, x: Tensor | None = None) -> None:
    """Drop all gradients."""
    if x is not None:
        x.grad = None
    model.zero_grad(set_to_none=True)


def forward_backward(setting: Setting, rival: Rival, x: Tensor, dy: Tensor) -> Tensor:
    """One pass of a part and its gradients; the output."""
    clear(rival.model, x)
    with backend.use(rival.backend):
        y = part(setting, rival.model)(x)
        y.backward(dy)
    return y.detach()


def facts(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """What a forward takes besides token ids [B, L]: a skill for each sequence, for routers that read it."""
    return (
        {"skill_ids": torch.arange(len(ids), device=ids.device)}
        if getattr(model, "accepts_skill_ids", False)
        else {}
    )


def train_step(rival: Rival, ids: Tensor) -> Tensor:
    """Loss and auxiliary losses of a whole model, and their gradients; the frozen base's go back to the
    embeddings' output."""
    model = rival.model
    clear(model)
    with backend.use(rival.backend):
        if not any(p.requires_grad for p in model.parameters()):
            # without a cache, as in every other step: such a pass waits once, to see whether sequences are
            # packed
            embedded = model.get_input_embeddings()(ids).requires_grad_()
            loss = model(inputs_embeds=embedded, labels=ids, use_cache=False).loss
        else:
            loss = step.full(model, ids)
        loss.backward()
    return loss.detach()


def decode(rival: Rival, ids: Tensor, new: int = 16) -> None:
    """A prompt's pass and `new` greedy tokens with a KV cache."""
    model = rival.model
    with torch.no_grad(), backend.use(rival.backend):
        out = model(input_ids=ids, use_cache=True, **facts(model, ids))
        for _ in range(new):
            out = model(
                input_ids=out.logits[:, -1:].argmax(-1), past_key_values=out.past_key_values, use_cache=True
            )


def floor(model: nn.Module, length: int) -> float:
    """FLOPs of a step over those of the frozen base: 4 a frozen weight and 6 a trained one for each token,
    plus causal attention."""
    config = model.config
    frozen = sum(
        m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear) and not m.weight.requires_grad
    )
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad and p.dim() == 2)
    return 1 + 6 * trained / (4 * frozen + 7 * length * config.hidden_size * config.num_hidden_layers)


def linear_inputs(model: nn.Module) -> tuple[dict[int, Tensor], list]:
    """What the frozen linears of a model read, by storage address, filled as it runs (and kept alive, so that
    no address serves twice); and the hooks that fill it."""
    seen: dict[int, Tensor] = {}

    def see(module, args):
        seen[args[0].untyped_storage().data_ptr()] = args[0].detach()

    frozen = [
        m for n, m in model.named_modules() if isinstance(m, nn.Linear | RoutedLinear) and ".lora_" not in n
    ]
    return seen, [m.register_forward_pre_hook(see) for m in frozen]


def small(setting: Setting) -> Setting:
    """The same comparison at 64 tokens, to check it; of whole blocks in fp32, since in bf16 a rounded hidden
    state may select another expert."""
    return replace(
        setting, tokens=min(setting.tokens, 64), dtype="fp32" if setting.level == "block" else setting.dtype
    )
