"""`pytest bench/ --benchmark-only`: every comparison through pytest-benchmark, each variant checked first."""

from __future__ import annotations

import pytest
import torch

from bench.comparison import Comparison
from bench.comparisons import all_plans
from bench.conftest import RATES
from bench.timing import peak_memory, synchronize

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


PLANS = {plan.name: plan for plan in all_plans(DEVICE)}
CASES = [
    pytest.param(plan.name, variant, id=f"{plan.name} [{variant}]")
    for plan in PLANS.values()
    for variant in plan.variants
]


@pytest.fixture(scope="module")
def built() -> dict[str, tuple[Comparison, dict[str, str]]]:
    """The comparison in work, with its inputs, and its variants that failed their check."""
    return {}


@pytest.mark.parametrize(("plan", "name"), CASES)
def bench_variant(plan: str, name: str, built: dict, benchmark, request: pytest.FixtureRequest) -> None:
    if plan not in built:
        built.clear()
        torch._dynamo.reset()
        comparison = PLANS[plan].build()
        built[plan] = comparison, comparison.wrong()
    comparison, wrong = built[plan]
    assert name not in wrong, f"no speed for a wrong result: {wrong[name]}"
    variant = comparison.variants[name]
    benchmark.group = comparison.name
    peak = peak_memory(variant, DEVICE)

    def call() -> None:
        variant(0)
        synchronize(DEVICE)

    benchmark.pedantic(call, rounds=7, warmup_rounds=2, iterations=1)
    rate = comparison.work / benchmark.stats.stats.median
    benchmark.extra_info |= comparison.settings | {"peak_bytes": peak, f"{comparison.unit}_per_second": rate}
    entry = {"name": f"{plan} [{name}]", "unit": comparison.unit, "rate": rate, "peak_bytes": peak}
    request.config.stash[RATES].append(entry)
