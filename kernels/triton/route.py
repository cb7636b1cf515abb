"""Triton kernels of routing: scores to weights, and the gradient of the scores, one launch each.

Shapes: T tokens, G sites, E experts, H = E + ADAPTIVE scores, K selected. One program holds BM tokens of one
site and all its experts. Everything is fp32; ties go to the lower index.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import Tile, Variant

SMALLEST = 1e-20
"""Least sum that weights are divided by: rows whose selected weights sum to less get no gradient through
them."""
FLOOR = tl.constexpr(SMALLEST)


@triton.jit
def _select(
    key, p, inside, live, ids, at_ids, k, mass, E, TOP_K: tl.constexpr, BM: tl.constexpr, BE: tl.constexpr
):
    """Which experts are chosen [BM, BE], by rounds that take the largest key left. TOP_K: k rounds, whose
    experts go to ids; else E rounds, and those count before which less than `mass` of p was taken."""
    e = tl.arange(0, BE)[None, :]
    taken, chosen = tl.zeros((BM, BE), tl.int1), tl.zeros((BM, BE), tl.int1)
    before = tl.zeros((BM,), tl.float32)
    for i in range(0, k if TOP_K else E):
        left = inside & ~taken
        best = tl.max(tl.where(left, key, -float("inf")), 1)
        first = tl.min(tl.where(left & (key == best[:, None]), e, BE), 1)
        first = tl.minimum(first, E - 1)  # NaN equals nothing; an index must stay an index
        hit = e == first[:, None]
        taken = taken | hit
        if TOP_K:
            chosen = taken
            tl.store(ids + at_ids + i, first.to(tl.int64), mask=live)
        else:
            chosen = chosen | (hit & (before < mass)[:, None])
            before += tl.sum(tl.where(hit, p, 0.0), 1)
    return chosen


@triton.jit
def forward_kernel(
    scores, weights, probs, tau, chosen, ids, T, G, E, K, mass, bound, row_stride, site_stride,
    col_stride,
    SOFTMAX: tl.constexpr, SELECT: tl.constexpr, ADAPTIVE: tl.constexpr, SHIFTED: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    BM: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """Weights and what belongs to them for BM tokens of site program_id(1)."""
    tokens, g = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1)
    e = tl.arange(0, BE)
    live, inside = tokens < T, (e < E)[None, :]
    read = scores + tokens.to(tl.int64) * row_stride + g * site_stride
    z = tl.load(read[:, None] + e[None, :] * col_stride, mask=live[:, None] & inside, other=0.0)
    z = tl.where(inside, z, -float("inf"))
    if SOFTMAX:
        power = tl.exp(z - tl.max(z, 1)[:, None])
        p = power / tl.sum(power, 1)[:, None]
    else:
        p = tl.where(inside, 1.0 / (1.0 + tl.exp(-z)), 0.0)

    row = tokens.to(tl.int64) * G + g
    out = row[:, None] * E + e[None, :]
    wide = live[:, None] & inside
    u = p
    if SELECT != "all":
        tl.store(probs + out, p, mask=wide)
        if SELECT == "threshold":
            t = tl.zeros((BM,), tl.float32) + bound
            if ADAPTIVE:
                t = t / (1.0 + tl.exp(-tl.load(read + E * col_stride, mask=live, other=0.0)))
            tl.store(tau + row, t, mask=live)
            selected = (p >= t[:, None]) & inside
        else:
            selected = _select(
                z if SELECT == "top_k" else p,
                p,
                inside,
                live,
                ids,
                row * K,
                K,
                mass,
                E,
                SELECT == "top_k",
                BM,
                BE,
            )
        tl.store(chosen + out, selected.to(tl.uint8), mask=wide)
        if SHIFTED:
            u = p - t[:, None]
        u = u * selected.to(tl.float32)  # NaN stays NaN
    if RENORMALIZE:
        u = u / tl.maximum(tl.sum(u, 1), FLOOR)[:, None]
    tl.store(weights + out, u, mask=wide)


@triton.jit
def backward_kernel(
    dweights, dprobs, dtau, probs, chosen, tau, dscores, N, E, H, inverse_bound, inverse_ste,
    SOFTMAX: tl.constexpr, SELECT: tl.constexpr, ADAPTIVE: tl.constexpr, SHIFTED: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    DETACH: tl.constexpr, STE: tl.constexpr, DW: tl.constexpr, DP: tl.constexpr, DT: tl.constexpr,
    BM: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """Gradient of the scores of BM rows. `DW`, `DP`, `DT`: whether weights, probs and tau have one."""
    rows, e = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, BE)
    live, inside = rows < N, (e < E)[None, :]
    wide = live[:, None] & inside
    at = rows.to(tl.int64)[:, None] * E + e[None, :]
    p = tl.load(probs + at, mask=wide, other=0.0)
    dp, dt = tl.zeros((BM, BE), tl.float32), tl.zeros((BM,), tl.float32)
    if SELECT == "threshold":
        t = tl.load(tau + rows, mask=live, other=0.0)
    if DW:
        du, u = tl.load(dweights + at, mask=wide, other=0.0), p
        if SELECT != "all":
            selected = tl.load(chosen + at, mask=wide, other=0) != 0
            if SHIFTED:
                u = p - t[:, None]
            u = tl.where(selected, u, 0.0)
        if RENORMALIZE:
            whole = tl.sum(u, 1)
            inverse = tl.where(whole > FLOOR, 1.0 / tl.maximum(whole, FLOOR), 0.0)
            du = (du - tl.sum(du * u, 1)[:, None] * inverse[:, None]) * inverse[:, None]
        if SELECT != "all":
            dp = tl.where(selected, du, 0.0)
        else:
            dp = du
        if SHIFTED:
            dt -= tl.sum(dp, 1)
        if STE:
            soft = 1.0 / (1.0 + tl.exp(-(p - t[:, None]) * inverse_ste))
            through = du * p * soft * (1.0 - soft) * inverse_ste
            dp += through
            dt -= tl.sum(through, 1)
    if DP:
        dp += tl.load(dprobs + at, mask=wide, other=0.0)
    if DT:
        dt += tl.load(dtau + rows, mask=live, other=0.0)
    if SOFTMAX:
        dz = p * (dp - tl.sum(dp * p, 1)[:, None])
    else:
        dz = dp * p * (1.0 - p)
    write = dscores + rows.to(tl.int64) * H
    tl.store(write[:, None] + e[None, :], dz, mask=wide)
    if ADAPTIVE:
        if DETACH:
            dt = tl.zeros((BM,), tl.float32)
        else:
            dt = dt * t * (1.0 - t * inverse_bound)
        tl.store(write + E, dt, mask=live)


def tile(experts: int) -> Tile:
    """BM tokens by all experts, about 500 numbers a program: more of them spill."""
    wide = max(2, triton.next_power_of_2(experts))
    return Tile({"BM": max(1, min(128, 512 // wide)), "BE": wide}, num_warps=4, num_stages=1)


@torch.library.custom_op("moabench::route", mutates_args=())
def route(
    scores: Tensor, activation: str, select: str, k: int, mass: float, tau: float, adaptive: bool,
    shifted: bool,
    renormalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """weights, probs [T, G, E], tau [T, G, 1], chosen [T, G, E] bool and ids [T, G, K] int64 of scores [T, G,
    H] fp32 of any strides. What the rule does not have is empty: probs and chosen where all are selected."""
    tokens, sites, experts = scores.shape[0], scores.shape[1], scores.shape[2] - adaptive
    t = tile(experts)
    weights, probs, taus, chosen, ids = outputs = _outputs(scores, select, k, adaptive)
    if tokens and sites:
        forward_kernel[(triton.cdiv(tokens, t.sizes["BM"]), sites)](
            scores, weights, probs, taus, chosen.view(torch.uint8), ids, tokens, sites, experts,
            ids.shape[-1],
            mass, tau, *scores.stride(), SOFTMAX=activation == "softmax", SELECT=select, ADAPTIVE=adaptive,
            SHIFTED=shifted, RENORMALIZE=renormalize, **t.sizes, num_warps=t.num_warps,
            num_stages=t.num_stages,
        )  # fmt: skip
    return outputs


@route.register_fake
def _(scores, activation, select, k, mass, tau, adaptive, shifted, renormalize):
    return _outputs(scores, select, k, adaptive)


def _outputs(scores: Tensor, select: str, k: int, adaptive: bool) -> tuple[Tensor, ...]:
    tokens, sites, experts = scores.shape[0], scores.shape[1], scores.shape[2] - adaptive
    some = experts if select != "all" else 0
    return (
        scores.new_empty(tokens, sites, experts),
        scores.new_empty(tokens, sites, some),
        scores.new_empty(tokens, sites, int(select == "threshold")),
        scores.new_empty(tokens, sites, some, dtype=torch.bool),
        scores.new_empty(tokens, sites, k if select == "top_k" else 0, dtype=torch.int64),
    )


@torch.library.custom_op("moabench::route_backward", mutates_args=())
def route_backward(
    dweights: Tensor | None, dprobs: Tensor | None, dtau: Tensor | None, probs: Tensor, chosen: Tensor,
    taus: Tensor, activation: str,
    select: str, tau: float, adaptive: bool, shifted: bool, renormalize: bool, detach: bool, ste: float,
) -> Tensor:  # fmt: skip
    """Gradient [T, G, H] of the scores, from those of weights, probs and tau (None: none) and what `route`
    returned."""
    tokens, sites, experts = probs.shape
    out = probs.new_empty(tokens, sites, experts + adaptive)
    if not out.numel():
        return out
    t = tile(experts)
    given = [
        d.contiguous() if d is not None and d.numel() else None for d in (dweights, dprobs, dtau)
    ]  # compiled: empty for empty outputs
    backward_kernel[(triton.cdiv(tokens * sites, t.sizes["BM"]),)](
        *(probs if d is None else d for d in given), probs, chosen.view(torch.uint8), taus, out,
        tokens * sites, experts,
        experts + adaptive, 1 / tau if tau else 0.0, 1 / ste if ste else 0.0,
        SOFTMAX=activation == "softmax", SELECT=select, ADAPTIVE=adaptive, SHIFTED=shifted,
        RENORMALIZE=renormalize, DETACH=detach,
        STE=bool(ste), DW=given[0] is not None, DP=given[1] is not None, DT=given[2] is not None,
        **t.sizes, num_warps=t.num_warps, num_stages=t.num_stages,
    )  # fmt: skip
    return out


@route_backward.register_fake
def _(
    dweights,
    dprobs,
    dtau,
    probs,
    chosen,
    taus,
    activation,
    select,
    tau,
    adaptive,
    shifted,
    renormalize,
    detach,
    ste,
):
    return probs.new_empty(*probs.shape[:2], probs.shape[2] + adaptive)


def variants(dtype: torch.dtype) -> list[Variant]:
    """The compilations that a GPU would ask for: every selection, few and many experts. Scores are fp32
    whatever the model is."""
    if dtype != torch.float32:
        return []
    wide, found = "*fp32", []
    rules = {
        "softmax": ("softmax", "all", False, False, False, False),
        "top-k": ("softmax", "top_k", False, False, True, False),
        "top-p": ("softmax", "top_p", False, False, True, False),
        "adaptive": ("softmax", "threshold", True, True, True, False),
        "sigmoid ste": ("sigmoid", "threshold", True, False, False, True),
    }
    for name, (activation, select, adaptive, shifted, renormalize, ste) in rules.items():
        same = {
            "SOFTMAX": activation == "softmax",
            "SELECT": select,
            "ADAPTIVE": adaptive,
            "SHIFTED": shifted,
            "RENORMALIZE": renormalize,
        }
        for experts in (2, 8, 64):
            types = dict.fromkeys(("scores", "weights", "probs", "tau"), wide) | {
                "chosen": "*u8",
                "ids": "*i64",
            }
            types |= dict.fromkeys(("T", "G", "E", "K", "row_stride", "site_stride"), "i32") | {
                "mass": "fp32",
                "bound": "fp32",
            }
            constants = same | {"col_stride": 1}
            found.append(
                Variant(
                    f"route {name} E{experts}",
                    forward_kernel,
                    types,
                    constants,
                    tile(experts),
                    products=False,
                )
            )
            types = dict.fromkeys(("dweights", "dprobs", "dtau", "probs", "tau", "dscores"), wide) | {
                "chosen": "*u8"
            }
            types |= dict.fromkeys(("N", "E", "H"), "i32") | {"inverse_bound": "fp32", "inverse_ste": "fp32"}
            constants = same | {"DETACH": False, "STE": ste, "DW": True, "DP": True, "DT": adaptive}
            found.append(
                Variant(
                    f"route {name} backward E{experts}",
                    backward_kernel,
                    types,
                    constants,
                    tile(experts),
                    products=False,
                )
            )
    return found
