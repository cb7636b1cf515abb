"""Level `mixture`: one mixture alone, `sum_e w_e B_e A_e x` with its router, forward and backward, without a
frozen linear."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from torch import Tensor
from torch.nn import functional as F

import moabench.methods as methods
from moabench.benchmarks.machine.timing import interleaved
from moabench.kernels import backend, lowrank
from moabench.methods.router import decide

from . import published_forms as forms
from .measure import DTYPES, Options, Report, Setting, largest_error, launches_and_waits

Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """One method's mixture on a linear: its router, and whether its experts share A."""

    router: str
    shared: bool = False

    @property
    def dense(self) -> bool:
        return self.router == "softmax"


CASES = {
    "molora": Case("softmax"),
    "moe_lora_topk": Case("topk"),
    "adamole": Case("adaptive_threshold"),
    "hydralora": Case("softmax", shared=True),
}


@dataclass
class Drawn:
    """One case with its tensors: A [R or r, d], B [d, R], the router's weight [H, d] and bias."""

    case: Case
    experts: int
    rank: int
    k: int
    tensors: dict[str, Tensor]

    @cached_property
    def router(self) -> methods.Router:
        return methods.Router.parse(
            {"kind": self.case.router} | ({"k": self.k} if self.case.router == "topk" else {}), "router"
        )

    @cached_property
    def bank(self) -> methods.LinearExperts:
        kind = "lora_shared_a" if self.case.shared else "lora"
        return methods.Experts.of_kind(kind, "experts")(n=self.experts, r=self.rank, alpha=float(self.rank))

    @cached_property
    def constants(self) -> dict[str, Tensor]:
        return {k: torch.tensor(v, device=self.tensors["A"].device) for k, v in self.bank.constants().items()}

    def to(self, dtype: torch.dtype) -> Drawn:
        """The same values as leaves of another dtype."""
        return replace(
            self, tensors={k: t.detach().to(dtype).requires_grad_() for k, t in self.tensors.items()}
        )

    def biased(self, scores: Tensor) -> Tensor:
        """Scores [T, H] with the router's bias."""
        bias = self.router.heads(self.tensors)[1]
        return scores if bias is None else scores + bias

    def form(self, x: Tensor, form: forms.Form) -> Tensor:
        """The mixture in one of the other forms."""
        scores = F.linear(x.to(lowrank.full_precision(x.dtype)), self.router.heads(self.tensors)[0])
        return form(
            x, self.tensors["A"], self.tensors["B"], self.router.route(self.biased(scores), True), 1.0
        )

    def ours(self, x: Tensor, name: backend.Name) -> Tensor:
        """Shrink, the bank's own rank-side mixture, expand: what every method runs on."""
        with backend.use(name):
            _, s, z = lowrank.linear_shrink(x, [], self.tensors["A"], self.tensors["weight"])
            weights = decide(self.router, self.biased(z), True).weights
            mixed = self.bank.mix(s.unsqueeze(1), weights.unsqueeze(1), self.constants)
            return lowrank.expand_add_(
                x.new_zeros(x.shape[0], self.tensors["B"].shape[0]), [(mixed[:, 0], self.tensors["B"])]
            )


def draw(case: Case, setting: Setting, seed: int = 0) -> Drawn:
    """fp32 tensors of a case from N(0, 1 / fan_in)."""
    generator = torch.Generator().manual_seed(seed)
    n, r, d = setting.experts, setting.rank, setting.width

    def randn(*shape: int) -> Tensor:
        return (
            (torch.randn(shape, generator=generator) / shape[-1] ** 0.5).to(setting.device).requires_grad_()
        )

    threshold = case.router == "adaptive_threshold"
    tensors = {
        "A": randn(r if case.shared else n * r, d),
        "B": randn(d, n * r),
        "weight": randn(n + threshold, d),
    }
    return Drawn(case, n, r, setting.k, tensors | ({"bias": randn(1)} if threshold else {}))


def inputs(setting: Setting, drawn: Drawn, seed: int = 1) -> tuple[Tensor, Tensor]:
    """x [T, d] and a cotangent, in the setting's dtype. Tokens whose top-k selection hangs on the last digits
    of a score are replaced by the first, so that rivals that add in another order take the same decision."""
    generator, dtype = torch.Generator().manual_seed(seed), DTYPES[setting.dtype]
    x, dy = (
        torch.randn(setting.tokens, setting.width, generator=generator).to(setting.device, dtype)
        for _ in range(2)
    )
    if drawn.case.router == "topk" and drawn.k < drawn.experts:
        ordered = (
            F.linear(x.double(), drawn.tensors["weight"].detach().double()).sort(-1, descending=True).values
        )
        close = ordered[:, drawn.k - 1] - ordered[:, drawn.k] < 1e-4
        x = torch.where(close.unsqueeze(-1), x[(~close).int().argmax()], x)
    return x.requires_grad_(), dy


def gradients(f: Function, x: Tensor, dy: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Output and gradients of everything trained, under the cotangent dy."""
    for t in (x, *tensors.values()):
        t.grad = None
    y = f(x)
    y.backward(dy)
    return {"y": y.detach(), "x": x.grad} | {k: t.grad for k, t in tensors.items() if t.grad is not None}


def no_compiler() -> str | None:
    """Why torch.compile cannot run here, or None."""
    name = os.environ.get("CXX", "g++")
    return (
        None
        if torch.cuda.is_available() or shutil.which(name)
        else f"torch.compile wants a C++ compiler; {name} is not there"
    )


def rivals(
    drawn: Drawn, device: torch.device, dtype: torch.dtype, compiled: bool
) -> tuple[dict[str, Function], dict[str, str]]:
    """Functions of x by rival, and the rivals that cannot run here with the reason."""
    found: dict[str, Function] = {"torch": partial(drawn.ours, name="torch")}
    unfit: dict[str, str | None] = {}
    if device.type == "cuda":
        found["triton"] = partial(drawn.ours, name="triton")
    found["loop"] = partial(drawn.form, form=forms.loop)
    if not drawn.case.dense:
        found["gather"] = partial(drawn.form, form=forms.gather)
    if drawn.case.router == "topk":
        unfit["grouped"] = forms.grouped_unfit(dtype, drawn.rank, *drawn.tensors["A"].shape[1:])
        found["grouped"] = partial(drawn.form, form=forms.grouped)
    if drawn.case.router in ("softmax", "topk") and not drawn.case.shared:
        unfit["loop, compiled"] = no_compiler() if compiled else "left out by --quick"
        found["loop, compiled"] = torch.compile(partial(drawn.form, form=forms.loop))
    reasons = {name: why for name, why in unfit.items() if why}
    return {name: f for name, f in found.items() if name not in reasons}, reasons


def measure(setting: Setting, report: Report, names: list[str], options: Options) -> None:
    """Check and time every rival of the cases in `names`; ratios are to `torch`, ours."""
    dtype, device, wanted = DTYPES[setting.dtype], torch.device(setting.device), options.wanted
    for name in names:
        drawn = draw(CASES[name], setting)
        own = replace(setting, k=setting.k if CASES[name].router == "topk" else 0)
        x, dy = inputs(setting, drawn)
        found, reasons = rivals(drawn, device, dtype, options.compiled)
        report.left_out += [
            f"mixture {name} {setting.dtype}: {rival}: {why}"
            for rival, why in reasons.items()
            if wanted(rival)
        ]
        exact = drawn.to(torch.float64)
        wide = x.detach().double().requires_grad_()
        want = gradients(partial(exact.form, form=forms.loop), wide, dy.double(), exact.tensors)
        runs = {
            rival: partial(gradients, f, x, dy, drawn.tensors) for rival, f in found.items() if wanted(rival)
        }
        for rival, run in runs.items():
            report.check(
                f"mixture {name} {setting.dtype} width {setting.width}: {rival}",
                largest_error(run(), want),
                dtype,
            )
        seconds = interleaved(runs, options.rounds, device)
        for rival, values in seconds.items():
            report.add(
                own,
                name,
                rival,
                "time",
                "s",
                values,
                "torch" if "torch" in seconds else "",
                seconds.get("torch"),
            )
        for rival, run in runs.items():
            if "compiled" not in rival:
                for quantity, count in zip(("launches", "host waits"), launches_and_waits(run), strict=True):
                    report.add(own, name, rival, quantity, "operators", [float(count)])
