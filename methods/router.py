"""The family of routers. A router is options plus equations; its tensors are declared by `params` and handed
back as `p`.

Shapes: T rows (tokens, or sequences for granularity=sequence), G sites that share one input (q, k, v), D
width, E experts, H heads (rows of the router's linear map: E, or E + 1 where a threshold is read from the
same input).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from .lazy import Lazy
from .params import Param, bias_default, linear_default
from .routing import Routing
from .spec import NonNegative, Part

if TYPE_CHECKING:
    from torch import Tensor

    from moabench.kernels.route import Rule as Ruled

    from .recorder import Context
    from .rule import Rule

backend = Lazy("moabench.kernels.backend")
fused = Lazy("moabench.kernels.route")
F = Lazy("torch.nn.functional")
NONE: Mapping[str, Tensor] = {}


@dataclass(frozen=True)
class Router(Part):
    """Base of all routers.

    granularity: `token`, or `sequence` for one decision a sequence (arXiv 2506.05928, instance-level), made
    from a pooled input: pool: `prompt_mean` (mean over real prompt tokens; the same in training and
    generation), `last_prompt` (last prompt token), or `official_mean` (all positions, padding and answer
    included, as the MoA code trains: not causal, refused with a KV cache).
    """

    folder: ClassVar[str] = "moabench.methods.routers"
    gives: ClassVar[tuple[str, ...]] = ("probs", "logits")
    """What a loss finds in its Routing besides weights and selection: probs, logits, tau."""

    linear: ClassVar[bool] = False
    """Whether its scores are one linear map of the token, `heads`, which the GEMM of its place can make."""
    reads_facts: ClassVar[bool] = False
    """Whether it decides from facts about the batch, once a pass for all sites, and never sees a hidden
    state."""

    granularity: Literal["token", "sequence"] = "token"
    pool: Literal["prompt_mean", "last_prompt", "official_mean"] = "prompt_mean"

    @property
    def reads_prompt(self) -> bool:
        """Whether the decision depends on which tokens are the prompt, so that padding must be known."""
        return self.granularity == "sequence"

    def reads_skills(self, training: bool) -> bool:
        """Whether it needs `skill_ids` [B] in training, or outside of it: facts routers find them in the
        context, others get them in `route` as `labels`."""
        return False

    @property
    def rules(self) -> tuple[Rule, ...]:
        """What must happen at the moments of training for this router to be what it is."""
        return ()

    def check(self, experts: int) -> None:
        """Raise ConfigError where this router cannot choose among `experts` experts."""

    def params(self, d: int, experts: int) -> dict[str, Param]:
        """The tensors of one site: input width `d`, `experts` experts. Buffers are handed to `route` by
        name."""
        raise NotImplementedError

    def scores(self, p: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """Router outputs [..., H] of the fp32 input x [..., D]. Routers that are one linear map define
        `heads` instead."""
        raise NotImplementedError

    def heads(self, p: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Weight [H, D] and bias [H] or None of the linear map, where it is one (`linear`)."""
        raise NotImplementedError

    def route(self, scores: Tensor, training: bool, **buffers: Tensor) -> Routing:
        """The decision for scores [..., H] in fp32; leading dimensions are kept. buffers: those that the
        router declares, [E], or [G, E] for scores [T, G, H]."""
        raise NotImplementedError

    @property
    def rule(self) -> Ruled | None:
        """`route` as data, by which one kernel does it; None where it is no `moabench.kernels.route.Rule`,
        and `route` always runs."""
        return None


def decide(router: Router, scores: Tensor, training: bool, buffers: Mapping[str, Tensor] = NONE) -> Routing:
    """The decision for scores [T, H] or [T, G, H]: `router.route`, or where Triton runs the kernel of its
    rule."""
    rule = router.rule
    if rule is None or not backend.triton_for(scores):
        return router.route(scores, training, **buffers)
    made = fused.decide(scores, rule)
    extras = {} if made.tau is None else {"tau": made.tau}
    logits = fused.experts_only(scores, rule)
    return Routing(made.weights, made.chosen, made.probs, logits, made.ids, extras=extras)


@dataclass(frozen=True)
class LinearRouter(Router):
    """Base of routers whose scores are one linear map of the input, `z = W x (+ b)`.

    The maps of all sites that read the same input are computed by one GEMM. bias: give each expert's score a
    bias. init_std: draw W from N(0, init_std^2); null draws it like torch.nn.Linear.
    """

    linear = True

    bias: bool = False
    init_std: NonNegative | None = None

    def params(self, d: int, experts: int) -> dict[str, Param]:
        weight = (
            linear_default(experts, d)
            if self.init_std is None
            else Param((experts, d), "normal", self.init_std)
        )
        return {"weight": weight} | ({"bias": bias_default(experts, d)} if self.bias else {})

    def heads(self, p: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        return p["weight"], p.get("bias")

    def scores(self, p: Mapping[str, Tensor], x: Tensor) -> Tensor:
        return F.linear(x, *self.heads(p))


@dataclass(frozen=True)
class FactRouter(Router):
    """Base of routers that decide from facts about the batch (the true skills, the token ids) and never see a
    hidden state.

    They own no tensor. A pass has one decision, shared by all its sites; what is decided for a sequence is
    kept beside the KV cache.
    """

    gives = ()
    reads_facts = True

    @property
    def reads_prompt(self) -> bool:
        return False

    def params(self, d: int, experts: int) -> dict[str, Param]:
        return {}

    def decide(self, context: Context, experts: int) -> Routing | None:
        """The decision for each sequence, [B, experts]; None where this pass lacks the fact and the one kept
        with the cache holds."""
        raise NotImplementedError

    def spread(self, kept: Routing, context: Context) -> Routing:
        """The decision for each token, [B L, E], from `kept`, what `decide` gave for the prompt."""
        return kept.per_token(context.shape[1])
