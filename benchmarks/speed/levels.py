"""What is checked and measured at each level: rows of the report."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from moabench.benchmarks.machine.timing import interleaved
from moabench.kernels import backend
from moabench.methods import attach as attach_untrained
from moabench.methods import catalog

from . import mixture, whole
from .measure import (
    DTYPES,
    Options,
    Report,
    Setting,
    Wanted,
    graphed,
    largest_error,
    launches_and_waits,
    relative_error,
    saved_storages,
)
from .peers import peer

METHODS = {
    "mixture": tuple(mixture.CASES),
    "linear": ("molora", "moe_lora_topk"),
    "ffn": ("mixlora",),
    "block": ("molora", "moe_lora_topk", "mixlora", "moa_soft", "moa_sparse"),
    "model": tuple(n for n in catalog.names() if catalog.parse(catalog.raw(n)).tuner in ("mixture", "peft")),
}
"""Methods of a level unless others are asked for."""


def run(setting: Setting, report: Report, names: list[str], options: Options) -> None:
    """Check and measure the methods `names` at one setting."""
    if setting.level == "mixture":
        mixture.measure(setting, report, names, options)
    elif setting.level == "model":
        measure_model(setting, report, names, options)
    else:
        check_parts(setting, report, names, options.wanted)
        measure_part(setting, report, names, options)


# Parts of a layer


def check_parts(setting: Setting, report: Report, names: list[str], wanted: Wanted) -> None:
    """Outputs and all gradients of every rival against the first of its peers in fp64, at a few tokens."""
    setting = whole.small(setting)
    base = whole.llama(setting, 1)
    rivals, _ = whole.rivals(setting, base, names, wanted)
    for rival in rivals:
        what = f"{setting.level} {rival.key} {setting.dtype} width {setting.width}"
        if rival.case in whole.PEERS:
            report.check(what, _error_to_peer(setting, base, rival), DTYPES[setting.dtype])
        elif rival.case == "lora" and setting.level == "linear":
            report.check(what, _error_of_lora(setting, rival), DTYPES[setting.dtype])
        elif rival.backend == "triton":
            tensors = [p for p in rival.model.parameters() if p.requires_grad]
            got, want = (
                _gradients(setting, replace(rival, backend=name), tensors) for name in ("triton", "torch")
            )
            report.check(what, largest_error(got, want), DTYPES[setting.dtype])


def _gradients(setting: Setting, rival: whole.Rival, tensors: list[Tensor]) -> dict[str, Tensor]:
    x, dy = whole.hidden(setting)
    if tensors and tensors[0].dtype == torch.float64:
        x, dy = x.detach().double().requires_grad_(), dy.double()
    y = whole.forward_backward(setting, rival, x, dy)
    return {"y": y, "x": x.grad} | {str(i): t.grad for i, t in enumerate(tensors) if t.grad is not None}


def _error_to_peer(setting: Setting, base: nn.Module, rival: whole.Rival) -> float:
    """Largest error of a rival against the first form of its method's peers in fp64."""
    model, pairs = peer(rival.ours or rival.model, base, whole.PEERS[rival.case][0])
    want = _gradients(
        setting, whole.Rival(rival.case, "reference", model.double()), [copied for _, copied in pairs]
    )
    tensors = [copied for _, copied in rival.pairs] if rival.ours is not None else [own for own, _ in pairs]
    return largest_error(_gradients(setting, rival, tensors), want)


def _error_of_lora(setting: Setting, rival: whole.Rival) -> float:
    """PEFT's LoRA against `x W^T + x A^T B^T` in fp64."""
    x, dy = whole.hidden(setting)
    layer: Any = whole.part(setting, rival.model)
    a, b = (m["default"].weight.detach().double() for m in (layer.lora_A, layer.lora_B))
    wide = x.detach().double()
    y = whole.forward_backward(setting, rival, x, dy)
    update = layer.base_layer.weight.double() + b @ a
    return largest_error({"y": y, "x": x.grad}, {"y": wide @ update.t(), "x": dy.double() @ update})


def measure_part(setting: Setting, report: Report, names: list[str], options: Options) -> None:
    """Time, operators, host waits and, of a block, bytes saved for the backward; ratios are to the frozen
    part."""
    setting_of = _settings(setting)
    base = whole.llama(setting, 1)
    rivals, unfit = whole.rivals(setting, base, names, options.wanted)
    report.left_out += unfit
    x, dy = whole.hidden(setting)
    runs = {r.key: lambda r=r: whole.forward_backward(setting, r, x, dy) for r in rivals}
    seconds = interleaved(runs, options.rounds, torch.device(setting.device), warm_up=2)
    for rival in rivals:
        own = setting_of(rival.case)
        report.add(
            own, rival.case, rival.name, "time", "s", seconds[rival.key], "frozen", seconds["frozen: frozen"]
        )
        for quantity, count in zip(
            ("launches", "host waits"), launches_and_waits(runs[rival.key]), strict=True
        ):
            report.add(own, rival.case, rival.name, quantity, "operators", [float(count)])
    if setting.level == "block":
        frozen = saved_bytes(setting, rivals[0])
        for rival in rivals:
            total, inputs = saved_bytes(setting, rival)
            own = setting_of(rival.case)
            report.add(own, rival.case, rival.name, "saved", "bytes/token", [total], "frozen", [frozen[0]])
            extra = total - inputs - frozen[0] + frozen[1]
            report.add(own, rival.case, rival.name, "saved by the adapter", "bytes/token", [extra])


def saved_bytes(setting: Setting, rival: whole.Rival) -> tuple[float, float]:
    """Bytes that a part keeps for its backward for each further token, and how many of them are inputs of its
    frozen linears, which every low-rank adapter keeps for dA. Taken from two lengths, so that weights and
    their copies in another dtype do not count."""
    found = [_kept(replace(setting, tokens=tokens), rival) for tokens in (setting.tokens, 2 * setting.tokens)]
    return tuple((twice - once) / setting.tokens for once, twice in zip(*found, strict=True))


def _kept(setting: Setting, rival: whole.Rival) -> tuple[int, int]:
    x, _ = whole.hidden(setting)
    seen, hooks = whole.linear_inputs(rival.model)
    with saved_storages() as storages, backend.use(rival.backend):
        y = whole.part(setting, rival.model)(x)
    for hook in hooks:
        hook.remove()
    del y
    return sum(storages.values()), sum(n for at, n in storages.items() if at in seen)


def _settings(setting: Setting) -> Callable[[str], Setting]:
    """The setting as a case has it: experts and k are 0 for what has none."""

    def of(case: str) -> Setting:
        mixed = case in catalog.names() and catalog.parse(catalog.raw(case)).tuner == "mixture"
        router = catalog.raw(case).get("router", {}).get("kind") if mixed else None
        return replace(
            setting, experts=setting.experts if mixed else 0, k=setting.k if router == "topk" else 0
        )

    return of


# A whole model


def measure_model(setting: Setting, report: Report, names: list[str], options: Options) -> None:
    """Train step beside its FLOP floor, greedy decoding, operators and host waits of a step, each against the
    frozen model's."""
    setting_of, device = _settings(setting), torch.device(setting.device)
    base = whole.llama(setting, options.layers)
    check_starts(setting, report, base, names)
    rivals, unfit = whole.rivals(setting, base, names, options.wanted)
    report.left_out += unfit
    batch, length = whole.shape(setting)
    ids = torch.randint(3, whole.VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(4)).to(
        device
    )
    runs = {"step": {r.key: lambda r=r: whole.train_step(r, ids) for r in rivals}}
    _models(rivals, training=True)
    if device.type == "cuda":
        runs["step as a CUDA graph"] = {
            key: graphed(run) for key, run in runs["step"].items() if not _waits_by_itself(key)
        }
    for kind, by_rival in runs.items():
        _add_times(report, setting_of, rivals, kind, interleaved(by_rival, options.rounds, device, warm_up=2))
    for rival in rivals:
        own = setting_of(rival.case)
        report.add(
            own,
            rival.case,
            rival.name,
            "floor of the step",
            "ratio",
            [whole.floor(rival.model, length) if rival.case != "frozen" else 1.0],
        )
        for quantity, count in zip(
            ("launches", "host waits"), launches_and_waits(runs["step"][rival.key]), strict=True
        ):
            report.add(own, rival.case, rival.name, quantity, "operators", [float(count)])
    _models(rivals, training=False)
    decodes = interleaved(
        {r.key: lambda r=r: whole.decode(r, ids[:1, :32]) for r in rivals}, options.rounds, device
    )
    _add_times(report, setting_of, rivals, "decode of 16 tokens", decodes)


def check_starts(setting: Setting, report: Report, base: nn.Module, names: list[str]) -> None:
    """Every method starts at the base (parallel adapters almost), so its logits are the base's before
    anything is trained."""
    ids = torch.arange(3, 19, device=setting.device).unsqueeze(0)
    with torch.no_grad():
        want = base(input_ids=ids).logits
        for name in names:
            model = attach_untrained(copy.deepcopy(base), whole.sized(name, setting)).eval()
            facts = (
                {"skill_ids": torch.zeros(1, dtype=torch.int64, device=setting.device)}
                if getattr(model, "accepts_skill_ids", False)
                else {}
            )
            error = relative_error(model(input_ids=ids, **facts).logits, want)
            report.check(
                f"model {name} {setting.dtype} width {setting.width}: start", error, DTYPES[setting.dtype]
            )


def _waits_by_itself(key: str) -> bool:
    """Whether a rival's form cannot be captured, since it waits for the host."""
    return key.rpartition(": ")[2] in ("gather", "published", "vanilla")


def _models(rivals: list[whole.Rival], training: bool) -> None:
    for rival in rivals:
        rival.model.train(training)


def _add_times(
    report: Report, setting_of, rivals: list[whole.Rival], quantity: str, seconds: dict[str, list[float]]
) -> None:
    for rival in rivals:
        if rival.key in seconds:
            report.add(
                setting_of(rival.case),
                rival.case,
                rival.name,
                quantity,
                "s",
                seconds[rival.key],
                "frozen",
                seconds["frozen: frozen"],
            )
