"""Make the base model `tiny`: `python -m moabench.benchmarks.world.pretrain --out benchmarks/world/tiny`.

A byte-level BPE tokenizer and a Llama of 5.4 M parameters, both trained on the corpus of one seed. Paragraphs
are packed into rows of `length` tokens, separated by eos. AdamW, linear warm-up, cosine to a tenth, bf16
autocast with fp32 weights.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import math
import time
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from . import WorldConfig, corpus, corpus_hash

EOS, PAD = "<|eos|>", "<|pad|>"
FORMATS = (Path(__file__).parent / "lexicon" / "formats.txt").read_text(encoding="utf-8")
"""Words of the prompt formats. The tokenizer reads them `FORMATS_REPEATED` times, so that a prompt costs few
tokens; the model never does."""
FORMATS_REPEATED = 3000


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The pre-training recipe; the defaults made the shipped model."""

    steps: int = 7200
    rows: int = 8
    """Packed rows a step. Few: at the same number of tokens, 8 rows reached a far lower loss than 32."""
    length: int = 128
    """Tokens a row."""
    lr: float = 2e-3
    warmup: int = 100
    """Steps."""
    weight_decay: float = 0.1
    vocabulary: int = 2560
    seed: int = 0


def train_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer in which every digit is its own token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\d"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD, model_max_length=1024
    )


def pack(texts: list[str], tokenizer: PreTrainedTokenizerFast, length: int) -> torch.Tensor:
    """Token ids [rows, length] of all texts, each followed by eos; the last incomplete row is dropped."""
    encoded = tokenizer.backend_tokenizer.encode_batch(texts)
    ids = [token for one in encoded for token in (*one.ids, tokenizer.eos_token_id)]
    return torch.tensor(ids[: len(ids) // length * length], dtype=torch.long).view(-1, length)


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """An untrained model: 256 wide, 6 layers, 8 heads, tied embeddings."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    # on CPU the fused kernel's backward takes longer than the rest of the step
    config._attn_implementation = "eager"
    return LlamaForCausalLM(config)


def learning_rate(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then cosine from `lr` to `lr / 10` at the last step."""
    if step < recipe.warmup:
        return recipe.lr * (step + 1) / recipe.warmup
    progress = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return recipe.lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))


def optimizer_for(model: LlamaForCausalLM, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW; weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.95), fused=True)


def train(model: LlamaForCausalLM, data: torch.Tensor, recipe: Recipe) -> list[float]:
    """Train in place; returns the loss (nats a token) of every step. Rows are drawn without repetition until
    all were read."""
    optimizer, losses = optimizer_for(model, recipe), []
    order = torch.cat([torch.randperm(len(data)) for _ in range(1 + recipe.steps * recipe.rows // len(data))])
    model.train()
    bar = tqdm(range(recipe.steps), desc="pretrain", unit="step", mininterval=5)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, recipe)
        batch = data[order[step * recipe.rows : (step + 1) * recipe.rows]]
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(batch, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
    return losses


def build(
    recipe: Recipe, config: WorldConfig | None = None
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast, dict]:
    """Tokenizer, model and report (plain numbers for the model card) from a recipe; deterministic for one
    thread count."""
    torch.manual_seed(recipe.seed)
    start = time.perf_counter()
    texts = list(corpus(recipe.seed, config))
    tokenizer = train_tokenizer([*texts, *[FORMATS] * FORMATS_REPEATED], recipe.vocabulary)
    data = pack(texts, tokenizer, recipe.length)
    model = new_model(tokenizer)
    losses = train(model, data, recipe)
    last = losses[-100:]
    report = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "corpus paragraphs": len(texts),
        "corpus tokens": data.numel(),
        "tokens read": recipe.steps * recipe.rows * recipe.length,
        "loss (nats a token, mean of the last 100 steps)": round(sum(last) / len(last), 3),
        "minutes": round((time.perf_counter() - start) / 60, 1),
        "machine": f"CPU, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} thread(s), "
        f"torch {torch.__version__}",
        "corpus hash": corpus_hash(recipe.seed, config),
        "date": datetime.date.today().isoformat(),
    }
    return model, tokenizer, report


def save(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path, recipe: Recipe, report: dict
) -> None:
    """Write bf16 weights, configs, tokenizer and model card."""
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model.generation_config = GenerationConfig(do_sample=False, **ends)
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    command = (
        "python -m moabench.benchmarks.world.pretrain --out benchmarks/world/tiny --seed "
        f"{recipe.seed} --steps {recipe.steps}"
    )
    table = "\n".join(f"| {key} | {value} |" for key, value in (report | dataclasses.asdict(recipe)).items())
    template = (Path(__file__).parent / "card.md").read_text(encoding="utf-8")
    (out / "README.md").write_text(template.format(command=command, table=table), encoding="utf-8")


def main() -> None:
    """Command line."""
    defaults = Recipe()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--steps", type=int, default=defaults.steps)
    parser.add_argument("--seed", type=int, default=defaults.seed, help="of the world and of the training")
    parser.add_argument(
        "--threads", type=int, default=1, help="CPU threads; the shipped model was made with one"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    recipe = Recipe(steps=args.steps, seed=args.seed)
    model, tokenizer, report = build(recipe)
    save(model, tokenizer, args.out, recipe, report)
    print("\n".join(f"{key}: {value}" for key, value in report.items()))


if __name__ == "__main__":
    main()
