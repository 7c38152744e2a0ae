"""`pytest bench/ --benchmark-only`: every comparison through pytest-benchmark, each variant checked first."""

from __future__ import annotations

import pytest
import torch

from bench.comparison import Comparison
from bench.comparisons import all_plans
from bench.conftest import DEVICE_TYPE, ENTRIES
from bench.record import ceilings, figures
from bench.timing import Spread, peak_memory, synchronize

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


PLANS = {plan.name: plan for plan in all_plans(DEVICE)}
CASES = [
    pytest.param(plan.name, variant, id=f"{plan.name} [{variant}]")
    for plan in PLANS.values()
    for variant in plan.variants
]


class Bench:
    """The comparison in work, with its inputs, and its variants that get no speed."""

    def __init__(self) -> None:
        self.limits = ceilings(DEVICE)
        self.comparison: Comparison | None = None
        self.refused: dict[str, dict[str, str]] = {}

    def load(self, name: str) -> Comparison:
        """The comparison of this name; its variants are checked when it is built."""
        if self.comparison is None or self.comparison.name != name:
            self.comparison = None  # its inputs make room for the next ones
            torch._dynamo.reset()
            self.comparison = PLANS[name].build()
            self.refused = self.comparison.refused()
        return self.comparison


@pytest.fixture(scope="session")
def bench(request: pytest.FixtureRequest) -> Bench:
    """One for the session: it holds one comparison at a time."""
    request.config.stash[DEVICE_TYPE] = DEVICE.type
    return Bench()


@pytest.mark.parametrize(("plan", "name"), CASES)
def bench_variant(plan: str, name: str, bench: Bench, benchmark, request: pytest.FixtureRequest) -> None:
    comparison = bench.load(plan)
    empty = {"name": plan, "unit": comparison.unit, "settings": comparison.settings, "variants": {}}
    entry = request.config.stash[ENTRIES].setdefault(plan, empty)
    refused = bench.refused.get(name, {})
    if refused:
        entry["variants"][name] = refused
    if "unavailable" in refused:
        pytest.skip(refused["unavailable"])
    assert not refused, f"no speed for a wrong result: {refused['failed']}"
    variant = comparison.variants[name]
    benchmark.group = comparison.name
    peak = None if name in comparison.unweighed else peak_memory(variant, DEVICE)

    def call() -> None:
        variant(0)
        synchronize(DEVICE)

    benchmark.pedantic(call, rounds=7, warmup_rounds=2, iterations=1)
    found = figures(comparison, Spread.of(benchmark.stats.stats.data), None, peak, bench.limits)
    benchmark.extra_info |= comparison.settings | found
    entry["variants"][name] = found
