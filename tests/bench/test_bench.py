"""The benchmarks themselves: wrong results get no speed, records are complete, tables say what records say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench import record, report
from bench.comparison import Comparison, Plan
from bench.comparisons import all_plans
from bench.timing import Spread, peak_memory, wall_times

CPU = torch.device("cpu")
X = torch.arange(1.0, 1001.0)


def doubling(**variants) -> Comparison:
    return Comparison(
        name="doubling",
        variants={"loop": lambda _: (X + X,)} | variants,
        input_sets=1,
        exact=lambda: (2 * X.double(),),
        work=2 * X.nbytes,
        unit="bytes",
        dtype=torch.float32,
        bytes_moved=2 * X.nbytes,
    )


def test_wrong_and_nan_results_are_found() -> None:
    comparison = doubling(good=lambda _: (X * 2,), wrong=lambda _: (X * 2.001,), nan=lambda _: (X * float("nan"),))
    assert set(comparison.wrong()) == {"wrong", "nan"}


def test_a_wrong_variant_gets_no_speed() -> None:
    comparison = doubling(wrong=lambda _: (X * 2.001,), fedperfix=lambda _: (X * 2,))
    entry = record.measure(comparison, CPU, 0.01, {"copy_bytes_per_second": 1e9})
    assert list(entry["variants"]) == ["loop", "wrong", "fedperfix"]
    assert set(entry["variants"]["wrong"]) == {"failed"}
    own = entry["variants"]["fedperfix"]
    assert own["fraction_of_limit"] == pytest.approx(2 * X.nbytes / 1e9 / own["wall_seconds"]["median"], rel=1e-2)
    assert "no speed" in report.comparison_table(entry)


def test_spread_is_median_and_range() -> None:
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0, 3)


def test_every_variant_is_timed_in_turn() -> None:
    calls: list[str] = []

    def variant(name: str):
        return lambda _: (calls.append(name), torch.zeros(200_000).cumsum(0))[1:]

    comparison = Comparison(**{**vars(doubling()), "variants": {"a": variant("a"), "b": variant("b")}})
    times = wall_times(comparison, CPU, budget=0.0)
    assert times["a"].count == times["b"].count == 3
    assert times["a"].lowest > 0


def test_peak_memory_counts_a_temporary() -> None:
    assert peak_memory(lambda _: torch.ones(1 << 20).add(1).sum(), CPU) >= 4 << 20


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_plans_have_unique_names_and_a_baseline(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plans = list(all_plans(torch.device(device)))
    names = [plan.name for plan in plans]
    assert len(set(names)) == len(names)
    assert {plan.variants[0] for plan in plans} == {"eager", "loop"}
    assert {name.split()[0] for name in names} == {"attention", "aggregation", "training"}


def small_plans() -> list[Plan]:
    """One plan of each operation that builds within a second on two cores."""
    plans = list(all_plans(CPU))
    attention = [p for p in plans if "B=32" in p.name and "float32" in p.name and "attention" in p.name]
    return [
        *attention,
        next(p for p in plans if "per layer" in p.name),
        next(p for p in plans if "vit-mini" in p.name),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("plan", small_plans(), ids=lambda plan: plan.name)
def test_what_is_compared_computes_the_same(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(
        torch, "compile", lambda function, **_: function
    )  # compiled code is checked by the recorder
    comparison = plan.build()
    assert tuple(comparison.variants) == plan.variants
    assert comparison.wrong() == {}


def committed_records() -> list[Path]:
    return sorted(record.RESULTS.glob("*.json"))


def test_there_is_a_committed_record() -> None:
    assert committed_records()


@pytest.mark.parametrize("path", committed_records(), ids=lambda path: path.stem)
def test_committed_records_are_complete(path: Path) -> None:
    content = json.loads(path.read_text())
    assert record.slug(content["device"]) == path.stem
    assert content["commit"] != "unknown"
    device = "cpu" if content["threads"] else "cuda"
    planned = {plan.name for plan in all_plans(torch.device(device))}
    assert {entry["name"] for entry in content["comparisons"]} == planned
    for entry in content["comparisons"]:
        for name, variant in entry["variants"].items():
            assert "failed" in variant or report.seconds(variant)["median"] > 0, (entry["name"], name)


def test_the_readme_shows_the_committed_records() -> None:
    readme = (report.ROOT / "README.md").read_text()
    assert report.updated(readme, report.load_records()) == readme, "run: python -m bench.report"
