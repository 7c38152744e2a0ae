"""What the library promises, as data: each target is evaluated on the comparison that measures it.

The GPU thresholds were set for an H100; another GPU's record shows them all the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from bench.comparisons.round import PASSES
from bench.comparisons.serving import ONE_MODEL
from bench.entries import Entry, is_sound, speed

MET, MISSED, NOT_MEASURED = "met", "missed", "not measured"


@dataclass(frozen=True)
class Target:
    """A bar for one number of every comparison that it applies to.

    Args:
        device: `cuda` or `cpu`.
        work: beginnings of the comparisons' names.
        ours: the variant that has to reach it.
        quantity: `speed` (how many times faster than the fastest rival), `limit` (fraction of the limit, from 0 to
            1) or `memory` (peak bytes over those of the first rival).
        threshold: the least value; of `memory`, the largest.
        rivals: variants, none for `limit`.
        against: the rivals, for people.
        settings: what the comparison's settings must say.
        where_present: does not apply to a comparison without its rivals.
    """

    device: str
    work: tuple[str, ...]
    ours: str
    quantity: str
    threshold: float
    rivals: tuple[str, ...] = ()
    against: str = ""
    settings: Mapping[str, object] = field(default_factory=dict)
    where_present: bool = False

    def __str__(self) -> str:
        which = "compiled: " if self.ours.startswith("compiled") else ""
        if self.quantity == "limit":
            return f"{which}≥ {self.threshold:.0%} of the limit"
        if self.quantity == "memory":
            return f"{which}≤ {self.threshold:g}x the memory of {self.against}"
        return f"{which}≥ {self.threshold:g}x {self.against}"

    def applies(self, entry: Entry, device: str) -> bool:
        """Whether it is a target of this comparison, on a device of this type."""
        return (
            self.device == device
            and entry["name"].startswith(self.work)
            and all(entry["settings"].get(key, _ABSENT) == value for key, value in self.settings.items())
            and (not self.where_present or any(rival in entry["variants"] for rival in self.rivals))
        )


_ABSENT = object()
_PLAIN = ("SDPA", "SDPA flash", "SDPA efficient", "SDPA cuDNN")
_COMPILED = tuple(f"compiled {name}" for name in _PLAIN)


def _attention(quantity: str, threshold: float, kind: str, **options: Any) -> Target:
    """A target of the fused attention in bfloat16 at head size 64, at every size of the plans."""
    settings = {"dtype": "torch.bfloat16", "head_dim": 64, "kind": kind} | options.pop("settings", {})
    return Target("cuda", ("attention ",), "fused", quantity, threshold, settings=settings, **options)


def _step(
    quantity: str, threshold: float, rival: str, settings: Mapping[str, object], ours: str = "fedperfix"
) -> Target:
    """A target of the training step on a GPU, in bfloat16; `--compile` runs it as `compiled fedperfix`."""
    settings = settings | {"dtype": "torch.bfloat16"}
    return Target("cuda", ("training step",), ours, quantity, threshold, (rival,), rival, settings)


def _cpu_attention(dtype: str, over_eager: float, over_others: float, limit: float) -> Iterator[Target]:
    """Targets of the native attention on a CPU, forward + backward at every size of the plans."""
    settings = {"dtype": f"torch.{dtype}", "kind": _BOTH}
    common = {"settings": settings, "where_present": True}
    others = ("SDPA", "compiled eager", "compiled SDPA")
    yield Target("cpu", ("attention ",), "fused", "speed", over_eager, **common, **_EAGER)
    for rivals in (others, others[:1]):  # few sizes are compiled
        applies = common | {"settings": settings | {"compiled": len(rivals) > 1}}
        yield Target("cpu", ("attention ",), "fused", "speed", over_others, rivals, "the best other", **applies)
    for tokens in (65, 197, 257):
        yield Target(
            "cpu", ("attention ",), "fused", "limit", limit, settings=settings | {"tokens": tokens, "threads": None}
        )
    forward = {"settings": settings | {"kind": "forward"}}
    yield Target("cpu", ("attention ",), "fused", "speed", 2.0, **forward, **_EAGER)
    yield Target("cpu", ("attention ",), "fused", "speed", 1.3, ("SDPA",), "SDPA", **forward)


_BOTH = "forward + backward"
_MEAN = ("aggregation per client", "aggregation per layer")
_RULES = tuple(f"aggregation {rule}" for rule in ("median", "clipped mean", "Krum", "int8 mean"))
_EAGER = {"rivals": ("eager",), "against": "eager"}
_ADAPTER, _TOKENS = {"prefix_len": None}, {"prefix_len": 10}
_VIT_S = {"model": "vit_small_patch16_224", "image_size": 224}
_VIT_TI = {"model": "vit_tiny_patch16_224", "image_size": 32}
_ONEDNN = {"linear": "onednn", "dtype": "torch.float32"}
_COMPILED_STEPS = ("compiled eager", "compiled SDPA")

TARGETS: tuple[Target, ...] = (
    _attention("speed", 6.0, _BOTH, **_EAGER),
    _attention("speed", 1.6, _BOTH, rivals=_PLAIN, against="the fastest SDPA", settings=_ADAPTER),
    _attention("speed", 1.8, _BOTH, rivals=_PLAIN, against="the fastest SDPA", settings=_TOKENS),
    _attention("speed", 1.4, _BOTH, rivals=_COMPILED, against="the fastest compiled SDPA", settings=_ADAPTER),
    _attention("speed", 1.5, _BOTH, rivals=_COMPILED, against="the fastest compiled SDPA", settings=_TOKENS),
    _attention("speed", 1.5, _BOTH, rivals=("FlexAttention",), against="FlexAttention"),
    _attention("memory", 0.25, _BOTH, **_EAGER),
    _attention("limit", 0.60, "forward"),
    _attention("limit", 0.45, "backward"),
    *(_step("speed", 1.6, "eager", model) for model in (_VIT_S, _VIT_TI)),
    *(_step("speed", 1.15, "compiled eager", model) for model in (_VIT_S, _VIT_TI)),
    *(_step("speed", 1.6, "eager", model, "compiled fedperfix") for model in (_VIT_S, _VIT_TI)),
    *(_step("speed", 1.15, "compiled eager", model, "compiled fedperfix") for model in (_VIT_S, _VIT_TI)),
    *(_step("memory", 0.6, "eager", model) for model in (_VIT_S, _VIT_TI)),
    Target("cuda", _MEAN, "fedperfix", "limit", 0.88),
    Target("cuda", _MEAN, "fedperfix", "speed", 10.0, ("loop",), "the loop"),
    Target("cuda", _MEAN, "fedperfix", "speed", 2.5, ("torch._foreach",), "torch._foreach"),
    Target("cuda", _MEAN, "fedperfix", "speed", 1.0, ("torch.mv",), "torch.mv", where_present=True),
    Target("cpu", ("training step",), "fedperfix", "speed", 1.25, **_EAGER),
    # Where oneDNN computes the linear layers, MKL leaves half of the processor to be gained: AMD from Zen 5 on.
    Target("cpu", ("training step",), "fedperfix", "speed", 2.0, settings=_ONEDNN, **_EAGER),
    Target("cpu", ("training step",), "fedperfix", "speed", 1.7, _COMPILED_STEPS, "compiled PyTorch", _ONEDNN),
    Target("cpu", ("training step",), "compiled fedperfix", "speed", 1.5, settings=_VIT_TI, **_EAGER),
    Target(
        "cpu",
        ("training step",),
        "compiled fedperfix",
        "speed",
        1.15,
        _COMPILED_STEPS[:1],
        "compiled eager",
        _VIT_TI,
    ),
    *_cpu_attention("float32", 2.2, 1.5, 0.60),
    *_cpu_attention("bfloat16", 1.7, 1.4, 0.30),
    Target("cpu", _MEAN, "fedperfix", "limit", 0.80),
    Target("cpu", _RULES, "fedperfix", "limit", 0.70),
    # A round is its passes plus at most 5 %.
    *(Target(d, ("federated round",), "fedperfix", "speed", 1 / 1.05, (PASSES,), PASSES) for d in ("cpu", "cuda")),
    # Many clients' own models cost at most 1.3 times one model on a GPU, and hardly more than it on a CPU.
    Target("cuda", ("serving",), "fedperfix", "speed", 1 / 1.3, (ONE_MODEL,), ONE_MODEL),
    Target("cpu", ("serving",), "fedperfix", "speed", 0.95, (ONE_MODEL,), ONE_MODEL),
)


def evaluate(entry: Entry, device: str, targets: Iterable[Target] = TARGETS) -> list[dict[str, Any]]:
    """What became of every target of one comparison.

    Args:
        entry: of a record.
        device: type of the record's device, `cuda` or `cpu`.
        targets: to choose from.

    Returns:
        Per target its text, the value (None without one), the rival that it was measured against (None for the
        limit), the result (`met`, `missed` or `not measured`), and why there is no verdict.
    """
    return [_verdict(target, entry["variants"]) for target in targets if target.applies(entry, device)]


def _verdict(target: Target, variants: dict[str, dict[str, Any]]) -> dict[str, Any]:
    verdict = {"target": str(target), "threshold": target.threshold, "value": None, "rival": None, "why": ""}
    own = variants.get(target.ours)
    if own is None:
        return verdict | {"result": NOT_MEASURED, "why": f"no variant {target.ours}"}
    if not is_sound(own):
        return verdict | {"result": MISSED, "why": f"{target.ours} {_trouble(own)}"}
    rivals = {name: variants[name] for name in target.rivals if name in variants and is_sound(variants[name])}
    value, rival = _value(target, own, rivals)
    if value is None:
        return verdict | {"result": NOT_MEASURED, "why": _missing(target, variants) or "no figure"}
    verdict |= {"value": round(value, 4), "rival": rival}
    if not (value <= target.threshold if target.quantity == "memory" else value >= target.threshold):
        return verdict | {"result": MISSED}
    why = _missing(target, variants)  # a rival without a figure might have been the fastest
    return verdict | {"result": NOT_MEASURED if why else MET, "why": why}


def _value(
    target: Target, own: dict[str, Any], rivals: dict[str, dict[str, Any]]
) -> tuple[float | None, str | None]:
    """The measured value and the rival that it was measured against."""
    if target.quantity == "limit":
        return own.get("fraction_of_limit"), None
    if not rivals:
        return None, None
    if target.quantity == "speed":
        return min((speed(own, variant), name) for name, variant in rivals.items())
    name, variant = next(iter(rivals.items()))
    if own.get("peak_bytes") is None or not variant.get("peak_bytes"):
        return None, name
    return own["peak_bytes"] / variant["peak_bytes"], name


def _missing(target: Target, variants: dict[str, dict[str, Any]]) -> str:
    """The rivals that should have a figure and have none; one that is unavailable here is no rival here."""
    absent = [f"no variant {name}" for name in target.rivals if name not in variants]
    failed = [f"{name} {_trouble(variants[name])}" for name in target.rivals if "failed" in variants.get(name, {})]
    if not absent + failed and target.rivals and all(not is_sound(variants[name]) for name in target.rivals):
        return "every rival is unavailable"
    return "; ".join(absent + failed)


def _trouble(variant: dict[str, Any]) -> str:
    return "failed" if "failed" in variant else "is unavailable"


def value_text(verdict: Mapping[str, Any]) -> str:
    """The measured value for people: `1.52x of SDPA cuDNN`, `48.3%`, or `–`."""
    if verdict["value"] is None:
        return "–"
    if verdict["rival"] is None:
        return f"{verdict['value']:.1%}"
    return f"{verdict['value']:.2f}x of {verdict['rival']}"


def summary(verdicts: Iterable[Mapping[str, Any]]) -> str:
    """`3 of 5 met, 1 missed, 1 not measured`."""
    count = Counter(verdict["result"] for verdict in verdicts)
    rest = [f"{count[result]} {result}" for result in (MISSED, NOT_MEASURED) if count[result]]
    return ", ".join([f"{count[MET]} of {sum(count.values())} met", *rest])
