"""What a routed adapter costs: rivals in one process, interleaved, medians, as ratios, after a check that they agree.

    python -m moabench.benchmarks.speed                      # all tables, fp32 and bf16, one thread
    python -m moabench.benchmarks.speed model --dtype fp32 --threads 2 --rounds 9

`mixture`  one mixture alone, forward and backward, against a Python loop over its experts written from its equation
`linear`   a frozen linear with a mixture of 8 experts against PEFT's LoRA r = 8 in its default settings
`model`    the train step and greedy decoding of a whole Llama, every method against the frozen base, beside its FLOP floor
`measures` what counting expert load and routing adds to a train step of the shipped base, a row of the history every ten steps included

Times are CPU time of the process with one thread, wall time otherwise. Exit code 1 where rivals disagree.
"""

from __future__ import annotations

import argparse
import copy
import functools
import platform
import statistics
import sys
import time
from collections.abc import Callable

import peft
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

import moabench.methods as methods
from moabench.benchmarks.config import ModelConfig
from moabench.benchmarks.model import load_model
from moabench.benchmarks.tally import Tally
from moabench.kernels import lowrank
from moabench.kernels.mix_ffn import mix_ffn
from moabench.methods import catalog

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SEVEN = ["q", "k", "v", "o", "gate", "up", "down"]
MODEL_METHODS = ("none", "lora", "molora", "moe_lora_topk", "hydralora", "adamole", "mixlora", "mixlora_dynamic", "moa_soft", "moa_sparse")


def clock() -> float:
    """CPU seconds of this process with one thread, so that others on the machine count less; wall seconds otherwise."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def interleaved(rivals: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each rival; every round runs all of them, and the first round does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in rivals}
    for round_ in range(rounds + 1):
        for name, run in rivals.items():
            start = clock()
            run()
            if round_:
                seconds[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


# One mixture alone


def route(kind: str, t: dict[str, Tensor], x: Tensor | None = None, scores: Tensor | None = None) -> methods.Routing:
    """The decision that both rivals use, from the input x or, where the shrink has made them, from scores without bias."""
    router = methods.Router.parse({"kind": kind}, "router")
    weight, bias = router.heads(t)
    scores = F.linear(x.float(), weight) if scores is None else scores
    return router.route(scores if bias is None else scores + bias, True)


def loop_mixture(kind: str, x: Tensor, t: dict[str, Tensor], r: int, shared: bool, gather: bool) -> Tensor:
    """`sum_e w_e B_e A_e x`, expert by expert, as the equation has it; with gather, as the papers' code has it for sparse routers: each
    expert takes its tokens by `where` and adds its result back by index."""
    routing = route(kind, t, x)
    y = x.new_zeros(x.shape[0], t["B"].shape[0])
    code = F.linear(x, t["A"].to(x.dtype)) if shared else None
    for e in range(routing.weights.shape[1]):
        a, b = t["A"][e * r : (e + 1) * r], t["B"][:, e * r : (e + 1) * r]
        if not gather:
            s = code if shared else F.linear(x, a.to(x.dtype))
            y = y + routing.weights[:, e : e + 1].to(x.dtype) * F.linear(s, b.to(x.dtype))
        else:
            rows = torch.where(routing.chosen[:, e])[0]
            out = F.linear(F.linear(x[rows], a.to(x.dtype)), b.to(x.dtype))
            y = y.index_add(0, rows, routing.weights[rows, e : e + 1].to(x.dtype) * out)
    return y


@functools.cache
def constants(bank: methods.Experts) -> dict[str, Tensor]:
    """A bank's fixed tensors."""
    return {name: torch.tensor(values) for name, values in bank.constants().items()}


def our_mixture(kind: str, x: Tensor, t: dict[str, Tensor], r: int, shared: bool) -> Tensor:
    """The same through the bank and kernels that every method runs on."""
    n = t["B"].shape[1] // r
    bank = methods.Experts.of_kind("lora_shared_a" if shared else "lora", "experts")(n=n, r=r, alpha=float(r))
    _, s, z = lowrank.linear_shrink(x, [], t["A"], t["weight"])
    mixed = bank.mix(s.unsqueeze(1), route(kind, t, scores=z).weights.unsqueeze(1), constants(bank))
    return lowrank.expand_add_(x.new_zeros(x.shape[0], t["B"].shape[0]), [(mixed[:, 0], t["B"])])


def loop_ffn(x: Tensor, t: dict[str, Tensor], r: int) -> Tensor:
    """MixLoRA's published form: frozen gate and up once, frozen down once an expert, tokens gathered by `where`."""
    routing = route("topk", t, x)
    gate, up, y = F.linear(x, t["Wg"]), F.linear(x, t["Wu"]), torch.zeros_like(x)
    for e in range(routing.weights.shape[1]):
        rows, part = torch.where(routing.chosen[:, e])[0], slice(e * r, (e + 1) * r)
        low = {name: (t[f"A{name}"][part].to(x.dtype), t[f"B{name}"][:, part].to(x.dtype)) for name in "gud"}
        g = gate[rows] + F.linear(F.linear(x[rows], low["g"][0]), low["g"][1])
        h = F.silu(g) * (up[rows] + F.linear(F.linear(x[rows], low["u"][0]), low["u"][1]))
        out = F.linear(h, t["Wd"]) + F.linear(F.linear(h, low["d"][0]), low["d"][1])
        y = y.index_add(0, rows, routing.weights[rows, e : e + 1].to(x.dtype) * out)
    return y


def our_ffn(x: Tensor, t: dict[str, Tensor], r: int) -> Tensor:
    """The same through mix_ffn."""
    (gate, up), s, z = lowrank.linear_shrink(x, [(t["Wg"], None), (t["Wu"], None)], torch.cat([t["Ag"], t["Au"]]), t["weight"])
    routing = route("topk", t, scores=z)
    s_gate, s_up = s.chunk(2, -1)
    inner, z = mix_ffn(gate, up, s_gate, s_up, t["Bg"], t["Bu"], t["Ad"], routing.weights.to(x.dtype), routing.ids)
    return lowrank.expand_add_(F.linear(inner, t["Wd"]), [(z, t["Bd"])])


@functools.cache
def cotangent(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A fixed gradient of the output, made once."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def gradients(f: Callable[[Tensor], Tensor], x: Tensor, t: dict[str, Tensor]) -> dict[str, Tensor]:
    """Output and gradients of everything trainable, under a fixed cotangent."""
    for tensor in (x, *t.values()):
        tensor.grad = None
    y = f(x)
    y.backward(cotangent(tuple(y.shape), y.dtype))
    return {"y": y.detach(), "x": x.grad} | {k: v.grad for k, v in t.items() if v.grad is not None}


def disagreement(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Largest relative RMS difference over the tensors of two results."""
    return max(((one[k] - other[k]).float().norm() / (other[k].float().norm() + 1e-12)).item() for k in other)


Rivals = dict[str, Callable[[Tensor], Tensor]]


def mixtures(width: int, dtype: torch.dtype, n: int = 8, r: int = 8) -> dict[str, tuple[dict[str, Tensor], Rivals]]:
    """By method: the tensors of one mixture, and functions of x [T, width] that compute it: `ours`, `loop`, and for sparse routers
    `gather loop`."""
    f, found = width * 11 // 4, {}

    def drawn(*shape: int) -> Tensor:
        return (torch.randn(shape) / shape[-1] ** 0.5).requires_grad_()

    for name, kind, shared in (
        ("molora", "softmax", False),
        ("moe_lora_topk", "topk", False),
        ("adamole", "adaptive_threshold", False),
        ("hydralora", "softmax", True),
    ):
        threshold = kind == "adaptive_threshold"
        t = {"A": drawn(r if shared else n * r, width), "B": drawn(width, n * r), "weight": drawn(n + threshold, width)}
        if threshold:
            t["bias"] = drawn(1)
        rivals: Rivals = {
            "ours": functools.partial(our_mixture, kind, t=t, r=r, shared=shared),
            "loop": functools.partial(loop_mixture, kind, t=t, r=r, shared=shared, gather=False),
        }
        if kind != "softmax":
            rivals["gather loop"] = functools.partial(loop_mixture, kind, t=t, r=r, shared=shared, gather=True)
        found[name] = t, rivals
    t = {"weight": drawn(n, width)} | {f"A{c}": drawn(n * r, width if c != "d" else f) for c in "gud"}
    t |= {f"B{c}": drawn(f if c != "d" else width, n * r) for c in "gud"}
    t |= {w: drawn(*s).detach().to(dtype) for w, s in (("Wg", (f, width)), ("Wu", (f, width)), ("Wd", (width, f)))}
    found["mixlora (whole FFN)"] = t, {"ours": lambda x, t=t: our_ffn(x, t, r), "gather loop": lambda x, t=t: loop_ffn(x, t, r)}
    return found


def bench_mixture(dtype: torch.dtype, width: int, rounds: int, tokens: int = 2048) -> bool:
    """Table of ours against loops. Returns False where they disagree."""
    torch.manual_seed(0)
    x, fine = torch.randn(tokens, width).to(dtype).requires_grad_(), True
    bound = 1e-4 if dtype == torch.float32 else 6e-2
    print(f"\nmixture alone, width {width}, 8 experts of rank 8, {tokens} tokens, forward + backward: rival's time / ours")
    for name, (t, rivals) in mixtures(width, dtype).items():
        results = {rival: gradients(f, x, t) for rival, f in rivals.items()}
        error = max(disagreement(results["ours"], other) for rival, other in results.items() if rival != "ours")
        times = interleaved({rival: functools.partial(gradients, f, x, t) for rival, f in rivals.items()}, rounds)
        ratios = "".join(f"   {rival} {seconds / times['ours']:5.2f}x" for rival, seconds in times.items() if rival != "ours")
        verdict = "" if error < bound else f"  DISAGREE (bound {bound:g})"
        print(f"  {name:20s} ours {times['ours'] * 1e3:7.2f} ms{ratios}   difference {error:.0e}{verdict}")
        fine &= error < bound
    return fine


# A frozen linear with its adapter


class _OneLinear(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def bench_linear(dtype: torch.dtype, width: int, rounds: int, tokens: int = 2048) -> None:
    """Frozen linear, PEFT's LoRA r = 8 (default settings) and a soft mixture of 8 experts of rank 8, forward and backward."""
    torch.manual_seed(0)
    base = _OneLinear(width).to(dtype).requires_grad_(False)
    lora = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=8, target_modules=["linear"]))
    x = torch.randn(tokens, width).to(dtype).requires_grad_()
    t = {"A": torch.randn(64, width).requires_grad_(), "B": torch.zeros(width, 64).requires_grad_()}
    t["weight"] = torch.randn(8, width).requires_grad_()
    bank = methods.Experts.of_kind("lora", "experts")(n=8, r=8)

    def ours(x: Tensor) -> Tensor:
        (y,), s, z = lowrank.linear_shrink(x, [(base.linear.weight, None)], t["A"], t["weight"])
        mixed = bank.mix(s.unsqueeze(1), route("softmax", t, scores=z).weights.unsqueeze(1), constants(bank))
        return lowrank.expand_add_(y, [(mixed[:, 0], t["B"])])

    times = interleaved(
        {
            "frozen": lambda: gradients(base, x, {}),
            "PEFT LoRA r8": lambda: gradients(lora, x, dict(lora.named_parameters())),
            "mixture E8 r8": lambda: gradients(ours, x, t),
        },
        rounds,
    )
    print(f"\nlinear {width} -> {width}, {tokens} tokens, forward + backward, ratio to the frozen linear")
    for name, seconds in times.items():
        print(f"  {name:16s} {seconds / times['frozen']:5.2f}   {seconds * 1e3:7.2f} ms")


# A whole model


def sized(name: str) -> dict:
    """A method with 8 experts of rank 8; the mixtures of linears on all seven, as in the table of the project's goals."""
    data = catalog.raw(name)
    if name in ("lora", "molora", "moe_lora_topk", "hydralora", "adamole"):
        data = catalog.override(data, {"experts": {"r": 8, "targets": SEVEN}})
    elif name.startswith("mixlora"):
        data = catalog.override(data, {"experts": {"r": 8, "alpha": 16, "dropout": 0.0}})
    return data


def floor(model: nn.Module, config, length: int) -> float:
    """FLOPs of a train step over those of the frozen base: 4 a frozen weight and 6 a trained one for each token, plus attention."""
    frozen = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear) and not m.weight.requires_grad)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad and p.dim() == 2)
    attention = 7 * length * config.hidden_size * config.num_hidden_layers
    return 1 + 6 * trained / (4 * frozen + attention)


def bench_model(dtype: torch.dtype, width: int, rounds: int, batch: int = 16, length: int = 128) -> None:
    """Train step (batch x length tokens) and greedy decoding of a 6-layer Llama for every method, ratios to the frozen base."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=1536,
        hidden_size=width,
        intermediate_size=width * 43 // 16,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=8,
        tie_word_embeddings=True,
    )
    base = transformers.LlamaForCausalLM(config).to(dtype).requires_grad_(False)
    models = {name: methods.attach(copy.deepcopy(base), sized(name)) for name in MODEL_METHODS}
    ids = torch.randint(0, config.vocab_size, (batch, length))

    def step(model: nn.Module) -> None:
        model.train()
        if not any(p.requires_grad for p in model.parameters()):
            embedded = model.get_input_embeddings()(ids).requires_grad_()
            model(inputs_embeds=embedded, labels=ids).loss.backward()
            return
        with methods.record(model) as recorder:
            loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss
        (loss + sum(recorder.losses.values())).backward()
        model.zero_grad()

    def decode(model: nn.Module, new: int = 16) -> None:
        model.eval()
        with torch.no_grad():
            out = model(input_ids=ids[:, :1], use_cache=True)
            for _ in range(new):
                out = model(input_ids=out.logits[:, -1:].argmax(-1), past_key_values=out.past_key_values, use_cache=True)

    steps = interleaved({name: lambda m=m: step(m) for name, m in models.items()}, rounds)
    decodes = interleaved({name: lambda m=m: decode(m) for name, m in models.items()}, rounds)
    print(f"\nLlama {width} wide, 6 layers, batch {batch} x {length}, ratio to the frozen base (train step floor = by FLOPs)")
    print(f"  {'method':16s} {'step':>6s} {'floor':>6s} {'ms':>8s} {'decode':>8s} {'ms/token':>9s}")
    for name, model in models.items():
        low = floor(model, config, length) if name != "none" else 1.0
        ratio, decoded = steps[name] / steps["none"], decodes[name] / decodes["none"]
        print(f"  {name:16s} {ratio:6.2f} {low:6.2f} {steps[name] * 1e3:8.1f} {decoded:8.2f} {decodes[name] / 17 * 1e3:9.2f}")


# What is counted while training


def bench_measures(rounds: int, batch: int = 16, length: int = 24) -> None:
    """Time of the tally over that of the train step whose routing it counts, on batches as short as the built-in questions."""
    base, _ = load_model(ModelConfig("tiny", kind="builtin"), 0, "cpu")
    ids, found = torch.randint(0, base.config.vocab_size, (batch, length)), {}
    mask = torch.ones_like(ids)
    print(f"\ncounting load and routing, base tiny, batch {batch} x {length}: share of a train step")
    for name in ("molora", "moe_lora_topk", "mixlora", "moa_soft"):
        model, tally = methods.attach(copy.deepcopy(base), catalog.raw(name)).train(), Tally()

        def step(model: nn.Module = model) -> None:
            with methods.record(model) as found["recorder"]:
                found["task"] = model(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False).loss
            (found["task"] + sum(found["recorder"].losses.values())).backward()
            model.zero_grad()

        count = functools.partial(lambda tally: tally.add({"task": found["task"]}, mask, found["recorder"].routing), tally)
        times = interleaved({"step": step, "count": count, "row": functools.partial(tally.window, 1)}, rounds)
        share = (times["count"] + times["row"] / 10) / times["step"]
        print(f"  {name:16s} {100 * share:5.1f} %   step {times['step'] * 1e3:7.1f} ms, count {times['count'] * 1e3:5.2f} ms")


def main() -> int:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="moabench.benchmarks.speed", description=__doc__.split("\n\n")[0])
    parser.add_argument("tables", nargs="*", metavar="{mixture,linear,model,measures}", help="default: all")
    parser.add_argument("--dtype", nargs="+", choices=sorted(DTYPES), default=["fp32", "bf16"])
    parser.add_argument("--width", type=int, nargs="+", default=[256], help="model width; mixture and linear always add 1024")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    if unknown := set(args.tables) - {"mixture", "linear", "model", "measures"}:
        parser.error(f"unknown table {', '.join(sorted(unknown))}: expected mixture, linear, model or measures")
    torch.set_num_threads(args.threads)
    tables, fine = args.tables or ["mixture", "linear", "model", "measures"], True
    versions = ", ".join(f"{m.__name__} {m.__version__}" for m in (torch, transformers, peft))
    print(f"{platform.machine()}, {args.threads} thread(s), {versions}")
    for name in args.dtype:
        dtype = DTYPES[name]
        print(f"\n== {name}")
        for width in dict.fromkeys([*args.width, 1024]):
            if "mixture" in tables:
                fine &= bench_mixture(dtype, width, args.rounds)
            if "linear" in tables:
                bench_linear(dtype, width, args.rounds)
        for width in args.width:
            if "model" in tables:
                bench_model(dtype, width, args.rounds)
    if "measures" in tables:
        bench_measures(args.rounds)
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
