"""The methods: one YAML a method in conf/method, read as plain data and turned into validated mixtures.
Imports no torch.

A method is one or more mixtures (site x experts x router + losses), or a reference point that routes nothing:
`tuner: peft` (PEFT's own LoRA), `full` (every base parameter trains) or `none` (the frozen base).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import yaml

from .bank import Experts
from .loss import Loss
from .router import Router
from .rule import Rule
from .spec import LATER, ConfigError, Name, build, drop_stale, nearest
from .stage import Stage

PLACES = (
    "q",
    "k",
    "v",
    "attention",
    "o",
    "up",
    "gate",
    "down",
    "ffn",
)  # order of a block router's outputs, as in the MoA code


@dataclass(frozen=True)
class Mixture:
    """One router (a site) and the banks it governs.

    site: `linear`, a router on every target linear; `ffn`, one on the feed-forward block; `block`, one a
    decoder layer that governs experts at several places. input: what a block router reads: `raw`, the layer's
    input, or `normed`, what its attention reads. gates: `expert`, one router output for each expert at each
    place; `index`, one for each expert, which it has at all places of its bank; `family`, one for each bank;
    or a mapping from bank to the bank whose output it uses (every bank then still owns an output).
    """

    name: str
    site: Literal["linear", "ffn", "block"]
    input: Literal["raw", "normed"]
    gates: str | dict[str, str]
    banks: dict[str, Experts]
    router: Router
    losses: dict[str, Loss]
    own_rules: dict[str, Rule] = field(default_factory=dict, metadata=LATER)

    @property
    def rules(self) -> tuple[Rule, ...]:
        """What happens at the moments of its training: what its router needs, and what the method names."""
        return (*self.router.rules, *self.own_rules.values())

    @property
    def routed(self) -> bool:
        return self.router.kind != "none"

    @property
    def experts(self) -> tuple[tuple[str, str, int], ...]:
        """(bank, place, index) of each expert that a `block` or `ffn` router governs, in the order of its
        outputs."""
        found = [
            (place, bank, i)
            for bank, part in self.banks.items()
            for place in part.places
            for i in range(part.n)
        ]
        order = {place: i for i, place in enumerate(PLACES)}
        return tuple((bank, place, i) for place, bank, i in sorted(found, key=lambda e: order[e[0]]))

    @property
    def expert_names(self) -> tuple[str, ...]:
        """Names of the router's outputs."""
        if self.site == "linear":
            return tuple(f"{bank}{i}" for bank, part in self.banks.items() for i in range(part.n))
        if self.gates == "index":
            return tuple(f"{bank}{i}" for bank, part in self.banks.items() for i in range(part.n))
        if self.gates != "expert":
            return tuple(self.banks)
        many = len({(bank, i) for bank, _, i in self.experts}) > len(self.banks)
        places = [self.banks[b].label(b, p) for b, p, _ in self.experts]
        return tuple(f"{p}{e[2]}" if many else p for p, e in zip(places, self.experts, strict=True))

    def column(self, bank: str, place: str, index: int) -> int:
        """Router output that scales expert `index` of `bank` at `place`."""
        if self.gates == "expert":
            return self.experts.index((bank, place, index))
        if self.gates == "index":
            return self.expert_names.index(f"{bank}{index}")
        gate = self.gates.get(bank, bank) if isinstance(self.gates, dict) else bank
        return list(self.banks).index(gate)


@dataclass(frozen=True)
class Method:
    """A validated method."""

    name: str
    tuner: Literal["mixture", "peft", "full", "none"]
    mixtures: tuple[Mixture, ...]
    dora: bool
    data: dict[str, Any]
    stages: tuple[Stage, ...] = field(default=(), metadata=LATER)
    """Trainings, one after the other; none named is one of everything."""
    layers: tuple[tuple[tuple[int, ...], Method], ...] = ()
    """Decoder layers in which the experts have other options, from 0, and the method as it is there."""

    def in_layer(self, index: int) -> Method:
        """The method as it is in decoder layer `index`, from 0."""
        return next((method for span, method in self.layers if index in span), self)

    @property
    def heterogeneous(self) -> bool:
        """True where a router governs experts of different kinds or at different places, whose gates cannot
        be compared."""
        return any(
            m.site != "linear"
            and m.routed
            and len({e[: 1 if m.gates == "index" else 2] for e in m.experts}) > 1
            for m in self.mixtures
        )


@dataclass(frozen=True, kw_only=True)
class _MixtureKeys:
    """Keys of a mixture as data."""

    site: Literal["linear", "ffn", "block"] = "linear"
    input: Literal["raw", "normed"] = "normed"
    gates: Literal["expert", "index", "family"] | dict = "expert"
    experts: dict = field(default_factory=dict)
    router: dict = field(default_factory=lambda: {"kind": "none"})
    losses: dict | None = None
    rules: dict | None = None


@dataclass(frozen=True, kw_only=True)
class _MethodKeys(_MixtureKeys):
    """Top-level keys of a method's YAML: its main mixture, further ones under `also`, and what it is."""

    name: Name
    about: str = ""
    paper: str = ""
    tuner: Literal["mixture", "peft", "full", "none"] = "mixture"
    dora: bool = False
    also: dict | None = None
    layers: dict | None = None
    stages: tuple[dict, ...] | None = None


def folder() -> Path:
    """conf/method, wherever the package is installed."""
    return Path(next(iter(find_spec("moabench.conf").submodule_search_locations))) / "method"


def names() -> list[str]:
    """Names of all shipped methods."""
    return sorted(f.stem for f in folder().glob("*.yaml"))


@cache
def _read(name: str) -> dict[str, Any]:
    file = folder() / f"{name}.yaml"
    if name not in names():
        raise ConfigError(f"method={name!r}: no such method.{nearest(name, names())}")
    return yaml.safe_load(file.read_text(encoding="utf-8"))


def raw(name: str) -> dict[str, Any]:
    """The YAML of a method as plain data. Raises ConfigError with the nearest name."""
    return copy.deepcopy(_read(name))


def override(data: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`data` with the nested (or dotted) `changes` merged in; None removes an entry."""
    result = copy.deepcopy(dict(data))
    for key, value in changes.items():
        head, _, rest = str(key).partition(".")
        if rest:
            value = {rest: value}
        if isinstance(value, Mapping) and isinstance(result.get(head), Mapping):
            result[head] = override(result[head], value)
        elif value is None and head in result and head not in _MethodKeys.__dataclass_fields__:
            del result[head]
        else:
            result[head] = override({}, value) if isinstance(value, Mapping) else value
    return result


def parse(data: Mapping[str, Any], path: str = "method") -> Method:
    """Validated Method from plain data. Raises ConfigError naming the key, the value, what was expected and
    the nearest name.

    `layers: {"0-3, 6": {experts: {r: 4}}}` gives the experts of some decoder layers other options (MoLA,
    arXiv 2402.08562, has more experts in some of them); which kinds of experts there are, and the router, are
    the same in all.
    """
    keys = build(_MethodKeys, data, path)
    method = _parse(keys, path)
    return replace(method, data=dict(data), layers=tuple(_in_layers(data, keys.layers or {}, method, path)))


def _in_layers(
    data: Mapping[str, Any], changes: Mapping[Any, Any], method: Method, path: str
) -> Iterator[tuple[tuple[int, ...], Method]]:
    """The variants of a method by layer, checked."""
    taken: set[int] = set()
    for key, options in changes.items():
        where = f"{path}.layers.{key}"
        span = _span(str(key), f"{path}.layers")
        if twice := taken.intersection(span):
            raise ConfigError(f"{where}: layer {min(twice)} was named before; expected each layer once.")
        taken |= set(span)
        if not isinstance(options, Mapping) or not options.keys() <= {"experts", "also"}:
            raise ConfigError(
                f"{where}={options!r}: expected options of 'experts', or of 'also.<mixture>.experts', "
                "that differ there."
            )
        changed = override({k: v for k, v in data.items() if k != "layers"}, options)
        found = _parse(build(_MethodKeys, changed, where), where)
        if _shape(found) != _shape(method):
            raise ConfigError(
                f"{where}={options!r}: expected the same banks, targets and routers as in the other layers."
            )
        if any(loss.scope == "model" for m in method.mixtures for loss in m.losses.values()) and _counts(
            found
        ) != _counts(method):
            raise ConfigError(
                f"{where}={options!r}: expected as many experts as elsewhere, since a loss with "
                "scope=model counts them together."
            )
        if any(stage.reads_labels for stage in method.stages) and _counts(found) != _counts(method):
            raise ConfigError(
                f"{where}={options!r}: expected as many experts as elsewhere, one for each label of the rows."
            )
        yield span, found


def _span(text: str, path: str) -> tuple[int, ...]:
    """Layers of '0-3, 6' or, for a command line, '0-3+6'."""
    found: list[int] = []
    for part in re.split("[,+]", text):
        first, _, last = part.strip().partition("-")
        if not re.fullmatch("[0-9]{1,4}(-[0-9]{1,4})?", part.strip()) or int(last or first) < int(first):
            raise ConfigError(
                f"{path}: {text!r} names no layers; expected numbers from 0 and ranges, as '0-3, 6'."
            )
        found += range(int(first), int(last or first) + 1)
    return tuple(found)


def _shape(method: Method) -> list:
    """What is the same in all layers."""
    return [
        (
            m.name,
            m.site,
            m.router,
            m.losses,
            m.own_rules,
            {name: (bank.kind, bank.places) for name, bank in m.banks.items()},
        )
        for m in method.mixtures
    ]


def _counts(method: Method) -> list[int]:
    return [len(m.expert_names) for m in method.mixtures]


def _parse(keys: _MethodKeys, path: str) -> Method:
    """The method, as it is where no layer differs; its `data` is left to the caller."""
    original = _read(keys.name) if keys.name in names() else {}
    if keys.tuner != "mixture":
        for key in ("stages", "rules"):
            if getattr(keys, key):
                raise ConfigError(
                    f"{path}.{key}={getattr(keys, key)!r}: expected none with tuner={keys.tuner}."
                )
    if keys.tuner in ("full", "none"):
        if keys.experts or keys.also:
            raise ConfigError(
                f"{path}.experts={keys.experts!r}: expected none, since tuner={keys.tuner} has no adapter."
            )
        return Method(keys.name, keys.tuner, (), False, {})
    main = _mixture("main", keys, original, path)
    if keys.tuner == "peft":
        _check_peft(main, path)
        return Method(keys.name, keys.tuner, (main,), keys.dora, {})
    if keys.dora:
        raise ConfigError(f"{path}.dora=True: expected false; only tuner=peft has DoRA.")
    extra = []
    for name, entry in (keys.also or {}).items():
        where = f"{path}.also.{name}"
        if name == "main" or "__" in str(name) or "." in str(name):
            raise ConfigError(
                f"{where}: expected another name; 'main', '__' and '.' have a meaning in tensor names."
            )
        more = build(_MixtureKeys, entry, where)
        inherited = _inherit(more.experts, keys.experts, f"{where}.experts")
        more = _MixtureKeys(**{**vars(more), "experts": inherited})
        extra.append(_mixture(name, more, (original.get("also") or {}).get(name, {}), where))
    mixtures = (main, *extra)
    stages = tuple(Stage.parse(entry, f"{path}.stages[{i}]") for i, entry in enumerate(keys.stages or ()))
    for i, stage in enumerate(stages):
        _checked(lambda stage=stage: stage.check(mixtures), f"{path}.stages[{i}]")
    return Method(keys.name, keys.tuner, mixtures, False, {}, stages)


def _inherit(own: Mapping[str, Any], main: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Options of a further bank, the ones it leaves out taken from the main bank where both kinds know them
    (r, alpha, dropout)."""
    if "kind" not in own or "kind" not in main:
        return dict(own)
    known = Experts.of_kind(own["kind"], path).options() - {"n", "targets"}
    return {k: v for k, v in main.items() if k in known} | dict(own)


def _mixture(name: str, keys: Any, original: Mapping[str, Any], path: str) -> Mixture:
    router_data = drop_stale(dict(keys.router), original.get("router") or {}, Router, f"{path}.router")
    router = Router.parse(router_data, f"{path}.router")
    banks = _banks(keys.experts, original.get("experts") or {}, f"{path}.experts")
    losses = {
        kind: Loss.parse({"kind": kind, **(options or {})}, f"{path}.losses.{kind}")
        for kind, options in (keys.losses or {}).items()
    }
    rules = {
        kind: Rule.parse({"kind": kind, **(options or {})}, f"{path}.rules.{kind}")
        for kind, options in (keys.rules or {}).items()
    }
    mixture = Mixture(name, keys.site, keys.input, keys.gates, banks, router, losses, rules)
    _check_places(mixture, path)
    _checked(lambda: router.check(len(mixture.expert_names)), f"{path}.router", ".")
    for kind, rule in rules.items():
        _checked(lambda rule=rule: rule.check(mixture), f"{path}.rules.{kind}")
    if losses and not mixture.routed:
        raise ConfigError(
            f"{path}.losses={sorted(losses)}: expected none, since router.kind=none routes nothing."
        )
    for kind, loss in losses.items():
        if loss.coef > 0 and loss.reads not in router.gives:
            fit = ", ".join(
                sorted(
                    name
                    for name, part in Router.kinds().items()
                    if loss.reads in part.gives and name != "none"
                )
            )
            raise ConfigError(
                f"{path}.losses.{kind}: reads {loss.reads}, which router.kind={router.kind} does not "
                f"have; expected {fit}."
            )
    return mixture


def _checked(check: Callable[[], None], path: str, separator: str = ": ") -> None:
    """What a part refuses, under the key by which the user knows it."""
    try:
        check()
    except ConfigError as error:
        raise ConfigError(f"{path}{separator}{error}") from None


def _banks(data: Mapping[str, Any], original: Mapping[str, Any], path: str) -> dict[str, Experts]:
    """Named banks: `data` is one bank if it has a `kind`, else a mapping name -> bank whose scalars are
    defaults for every bank."""
    if "kind" in data:
        data = drop_stale(dict(data), original, Experts, path)
        return {str(data["kind"]): Experts.parse(data, path)}
    shared = {k: v for k, v in data.items() if not isinstance(v, Mapping) and v is not None}
    banks, used = {}, set()
    for name, options in data.items():
        if not isinstance(options, Mapping):
            continue
        if name == "router" or "__" in str(name) or "." in str(name):
            raise ConfigError(
                f"{path}.{name}: expected another name; 'router', '__' and '.' have a meaning in "
                "tensor names."
            )
        kind = options.get("kind", name)
        known = Experts.of_kind(kind, f"{path}.{name}").options()
        used |= known & shared.keys()
        banks[name] = Experts.parse(
            {k: v for k, v in shared.items() if k in known} | {**options, "kind": kind}, f"{path}.{name}"
        )
    for key in shared.keys() - used:
        known = set().union(*(b.options() for b in banks.values())) or {"kind"}
        raise ConfigError(f"unknown key '{path}.{key}' (value {shared[key]!r}).{nearest(key, known)}")
    if not banks:
        raise ConfigError(
            f"{path}={dict(data)!r}: expected a bank with 'kind', one of "
            f"{', '.join(sorted(Experts.kinds()))}."
        )
    order = {
        place: i for i, place in enumerate(PLACES)
    }  # not the mapping's own order: a saved config sorts its keys
    return dict(sorted(banks.items(), key=lambda item: (order[item[1].places[0]], item[0])))


def _check_places(mixture: Mixture, path: str) -> None:
    for name, bank in mixture.banks.items():
        if mixture.site not in bank.sites:
            fits = sorted(k for k, c in Experts.kinds().items() if mixture.site in c.sites)
            raise ConfigError(
                f"{path}.experts.{name}: {bank.kind} takes site={' or '.join(bank.sites)}, but "
                f"site={mixture.site} takes {', '.join(fits)}."
            )
    if mixture.site == "linear" and len(mixture.banks) > 1:
        raise ConfigError(
            f"{path}.experts={sorted(mixture.banks)}: expected one bank, since a linear site has one."
        )
    if mixture.site == "linear" and mixture.gates != "expert":
        raise ConfigError(f"{path}.gates={mixture.gates!r}: expected 'expert' at a linear site.")
    replacing = [n for n, b in mixture.banks.items() if b.replaces]
    if replacing and mixture.site == "block":
        raise ConfigError(
            f"{path}.experts.{replacing[0]}: expected site=ffn, since these experts run the whole block."
        )
    if isinstance(mixture.gates, dict):
        for bank, gate in mixture.gates.items():
            for value in (bank, gate):
                if value not in mixture.banks:
                    raise ConfigError(
                        f"{path}.gates={mixture.gates!r}: no bank {value!r}.{nearest(value, mixture.banks)}"
                    )


def _check_peft(mixture: Mixture, path: str) -> None:
    bank: Any = next(iter(mixture.banks.values()))
    if bank.kind != "lora" or bank.n != 1 or mixture.routed or len(mixture.banks) > 1:
        got = {name: f"{b.kind} n={b.n}" for name, b in mixture.banks.items()}
        raise ConfigError(
            f"{path}.experts={got}, {path}.router.kind={mixture.router.kind}: tuner=peft takes one "
            "lora with n=1 and no router."
        )
    if not isinstance(bank.r, int):
        raise ConfigError(
            f"{path}.experts.r={list(bank.r)}: expected one whole number, since tuner=peft has one expert."
        )
