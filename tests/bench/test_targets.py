"""Targets are evaluated on what a record says: nothing that failed, or was not run, is ever met."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.comparisons import all_plans, attention, step
from bench.targets import TARGETS, Target, evaluate, summary, value_text

SPEED = Target("cuda", ("attention ",), "fused", "speed", 1.5, ("SDPA", "SDPA flash"), "the fastest SDPA")
MEMORY = Target("cuda", ("attention ",), "fused", "memory", 0.25, ("SDPA",), "SDPA")
LIMIT = Target("cuda", ("attention ",), "fused", "limit", 0.6)


def timed(wall: float, device: float | None = None, peak: int | None = 100, limit: float | None = None) -> dict:
    variant: dict[str, Any] = {"wall_seconds": {"median": wall}, "peak_bytes": peak}
    if device is not None:
        variant["device_seconds"] = {"median": device}
    return variant | ({} if limit is None else {"fraction_of_limit": limit})


def entry(**variants: dict) -> dict[str, Any]:
    named = {name.replace("_", " "): variant for name, variant in variants.items()}
    return {"name": "attention gated", "unit": "images", "settings": {"kind": "forward"}, "variants": named}


def verdict(target: Target, **variants: dict) -> dict[str, Any]:
    (found,) = evaluate(entry(**variants), "cuda", [target])
    return found


def test_speed_is_over_the_fastest_rival() -> None:
    found = verdict(SPEED, SDPA=timed(4.0), SDPA_flash=timed(3.2), fused=timed(2.0))
    assert (found["result"], found["value"], found["rival"]) == ("met", 1.6, "SDPA flash")
    assert value_text(found) == "1.60x of SDPA flash"
    assert verdict(SPEED, SDPA=timed(2.9), SDPA_flash=timed(9.0), fused=timed(2.0))["result"] == "missed"


def test_the_threshold_itself_is_enough() -> None:
    assert verdict(SPEED, SDPA=timed(3.0), SDPA_flash=timed(3.0), fused=timed(2.0))["result"] == "met"
    assert verdict(LIMIT, fused=timed(1.0, limit=0.6))["result"] == "met"
    assert verdict(MEMORY, SDPA=timed(1.0, peak=400), fused=timed(1.0, peak=100))["result"] == "met"


def test_a_value_that_only_rounds_to_the_threshold_is_missed() -> None:
    assert verdict(LIMIT, fused=timed(1.0, limit=0.5999999))["result"] == "missed"


def test_the_same_clock_times_both() -> None:
    both = verdict(SPEED, SDPA=timed(1.0, 1.0), SDPA_flash=timed(1.0, 1.0), fused=timed(1.0, 0.5))
    assert both["value"] == 2.0
    one = verdict(SPEED, SDPA=timed(1.0), SDPA_flash=timed(1.0), fused=timed(1.0, 0.5))
    assert one["value"] == 1.0


@pytest.mark.parametrize(
    ("target", "variants", "result"),
    [
        (SPEED, {"SDPA": timed(9.0), "SDPA flash": timed(9.0), "fused": {"failed": "wrong"}}, "missed"),
        (SPEED, {"SDPA": timed(9.0), "SDPA flash": timed(9.0), "fused": {"unavailable": "no"}}, "missed"),
        (SPEED, {"SDPA": timed(9.0), "SDPA flash": timed(9.0)}, "not measured"),
        (SPEED, {"SDPA": {"failed": "wrong"}, "SDPA flash": timed(9.0), "fused": timed(1.0)}, "not measured"),
        (SPEED, {"SDPA": {"failed": "wrong"}, "SDPA flash": timed(1.0), "fused": timed(1.0)}, "missed"),
        (SPEED, {"SDPA flash": timed(9.0), "fused": timed(1.0)}, "not measured"),
        (SPEED, {"SDPA": timed(9.0), "SDPA flash": {"unavailable": "no"}, "fused": timed(1.0)}, "met"),
        (
            SPEED,
            {"SDPA": {"unavailable": "no"}, "SDPA flash": {"unavailable": "no"}, "fused": timed(1.0)},
            "not measured",
        ),
        (SPEED, {"fused": timed(1.0)}, "not measured"),
        (MEMORY, {"SDPA": timed(1.0, peak=100), "fused": timed(1.0, peak=26)}, "missed"),
        (MEMORY, {"SDPA": timed(1.0, peak=100), "fused": timed(1.0, peak=None)}, "not measured"),
        (MEMORY, {"SDPA": timed(1.0, peak=0), "fused": timed(1.0, peak=0)}, "not measured"),
        (MEMORY, {"SDPA": {"failed": "wrong"}, "fused": timed(1.0, peak=1)}, "not measured"),
        (LIMIT, {"fused": timed(1.0)}, "not measured"),
        (LIMIT, {"fused": timed(1.0, limit=0.59)}, "missed"),
    ],
)
def test_nothing_without_a_figure_is_met(target: Target, variants: dict, result: str) -> None:
    found = verdict(target, **variants)
    assert found["result"] == result
    assert found["why"] or found["value"] is not None


def test_a_rival_that_may_be_absent_makes_no_target() -> None:
    target = Target("cuda", ("attention ",), "fused", "speed", 1.0, ("torch.mv",), "torch.mv", where_present=True)
    assert evaluate(entry(fused=timed(1.0)), "cuda", [target]) == []
    assert verdict(target, **{"torch.mv": {"failed": "wrong"}, "fused": timed(1.0)})["result"] == "not measured"


def test_a_target_applies_to_its_device_work_and_settings_only() -> None:
    target = Target("cuda", ("attention ",), "fused", "limit", 0.6, settings={"prefix_len": None})
    given = entry(fused=timed(1.0, limit=1.0))
    assert not target.applies(given, "cuda")  # a setting that is absent is not None
    given["settings"]["prefix_len"] = None
    assert target.applies(given, "cuda")
    assert not target.applies(given, "cpu")
    assert not target.applies(given | {"name": "aggregation"}, "cuda")


def test_the_summary_counts_every_result() -> None:
    results = ["met", "missed", "met", "not measured"]
    assert summary({"result": result} for result in results) == "2 of 4 met, 1 missed, 1 not measured"
    assert summary([{"result": "missed"}]) == "0 of 1 met, 1 missed"


def planned(device: str) -> dict[str, set[str]]:
    return {plan.name: set(plan.variants) for plan in all_plans(torch.device(device))}


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: f"{target.device} {target.work[0]} {target}")
def test_every_target_names_work_and_variants_that_are_planned(target: Target) -> None:
    for work in target.work:
        found = [variants for name, variants in planned(target.device).items() if name.startswith(work)]
        assert found, work
        assert target.where_present or any({target.ours, *target.rivals} <= variants for variants in found), work


@pytest.mark.parametrize("shape", attention.GPU_SHAPES, ids=str)
@pytest.mark.parametrize(
    ("kind", "thresholds"),
    [("forward", {0.6}), ("backward", {0.45}), ("forward + backward", {6.0, 1.6, 1.4, 1.5, 0.25})],
)
def test_every_gpu_size_of_attention_has_its_targets(
    shape: attention.Shape, kind: str, thresholds: set[float]
) -> None:
    settings = attention.settings(shape, "gated", torch.bfloat16, kind)
    found = evaluate({"name": "attention gated", "settings": settings, "variants": {}}, "cuda")
    expected = {6.0, 1.8, 1.5, 0.25} if shape.prefix_len and kind == "forward + backward" else thresholds
    assert {verdict["threshold"] for verdict in found} == expected
    assert {verdict["result"] for verdict in found} == {"not measured"}


def test_every_step_with_a_target_has_it() -> None:
    def thresholds(case: step.Case, device: str) -> set[float]:
        entry = {"name": str(case), "settings": case.settings(), "variants": {}}
        return {verdict["threshold"] for verdict in evaluate(entry, device)}

    assert [thresholds(case, "cuda") for case in step.GPU_CASES] == [{1.6, 1.15, 0.6}] * 2
    assert [thresholds(case, "cpu") for case in step.CPU_CASES] == [{1.25}, {1.15, 1.25, 1.5}, {1.15, 1.25, 1.5}]
    by_onednn = {"name": str(step.CPU_CASES[1]), "variants": {}}
    by_onednn["settings"] = step.CPU_CASES[1].settings() | {"linear": "onednn"}
    assert {verdict["threshold"] for verdict in evaluate(by_onednn, "cpu")} >= {2.0, 1.7}
