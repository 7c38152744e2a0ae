"""The benchmarks themselves: wrong results get no speed, records are complete, tables say what records say."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch

from bench import record, report
from bench.comparison import Comparison, Plan, Unavailable
from bench.comparisons import all_plans, attention, step
from bench.timing import Spread, capture, peak_memory, wall_times

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
    refused = comparison.refused()
    assert set(refused) == {"wrong", "nan"}
    assert all(set(why) == {"failed"} for why in refused.values())


def refuse(_: int) -> tuple[torch.Tensor, ...]:
    raise Unavailable("head size 3 is odd")


def test_what_cannot_run_is_unavailable_and_what_raises_has_failed() -> None:
    comparison = doubling(backend=refuse, broken=lambda _: (torch.ones(2) + torch.ones(3),))
    refused = comparison.refused()
    assert refused["backend"] == {"unavailable": "head size 3 is odd"}
    assert refused["broken"]["failed"].startswith("RuntimeError: The size of tensor a")
    entry = record.measure(comparison, CPU, 0.01, {"copy_bytes_per_second": 1e9})
    assert entry["variants"]["backend"] == refused["backend"]
    assert "no speed, unavailable: head size 3 is odd" in report.comparison_table(entry)


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
    assert {plan.variants[0] for plan in plans} == {"eager", "loop", "passes alone", "one model"}
    assert {name.split()[0] for name in names} == {"attention", "aggregation", "training", "federated", "serving"}


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
    assert comparison.refused() == {}


def test_compiled_graphs_on_a_gpu_are_as_many_as_the_module_says() -> None:
    plans = [plan for plan in all_plans(torch.device("cuda")) if plan.name.startswith("attention")]
    per_call = {plan.name: 2 if "forward + backward" in plan.name else 1 for plan in plans}
    graphs = sum(
        per_call[plan.name]
        for plan in plans
        for variant in plan.variants
        if variant.startswith("compiled") or variant == "FlexAttention"
    )
    assert f"{graphs} in all" in attention.__doc__


@pytest.mark.parametrize("prefix_len", [None, 10])
@pytest.mark.parametrize("mode", ["gated", "concat", "additive"])
def test_flex_attention_is_composed_to_the_same_function(mode: str, prefix_len: int | None) -> None:
    if mode == "additive" and prefix_len:
        prefix_len = 50  # one per token
    shape = attention.Shape(2, 3, 50, 16, prefix_len)
    inputs = attention._inputs(shape, torch.float32, CPU, 0, False)[:3]
    expected = attention._backend(mode, "reference")(*inputs)
    torch.testing.assert_close(attention._flex(mode)(*inputs), expected)


def test_a_refused_sdpa_backend_says_so_and_other_errors_pass() -> None:
    shape = attention.Shape(2, 3, 5, 16)
    *inputs, _ = attention._inputs(shape, torch.float32, CPU, 0, False)
    functions = {
        name: attention._available(attention._backend("gated", "torch", kernel))
        for name, kernel in attention._KERNELS.items()
    }
    expected = attention._backend("gated", "reference")(*inputs)
    torch.testing.assert_close(functions["SDPA flash"](*inputs), expected)
    with pytest.raises(Unavailable, match="No viable backend"):  # as on a GPU that the kernel does not support
        functions["SDPA cuDNN"](*inputs)

    def broken(*_: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        attention._available(broken)(*inputs)


def test_backward_alone_runs_no_forward_after_the_first() -> None:
    inputs = [attention._inputs(attention.Shape(2, 3, 5, 16), torch.float32, CPU, s, True) for s in range(2)]
    calls: list[int] = []

    def function(*leaves: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return attention._backend("gated", "torch")(*leaves)

    backward = attention._call(function, "backward", inputs)
    both = attention._call(attention._backend("gated", "torch"), "forward + backward", inputs)
    for index in (0, 1, 0, 1):
        for found, expected in zip(backward(index), both(index)[1:], strict=True):
            torch.testing.assert_close(found, expected)
    assert len(calls) == 2


def test_a_backward_pass_on_another_stream_has_leaves_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves that a held graph used on the default stream cannot be captured on another one."""
    inputs = [attention._inputs(attention.Shape(2, 3, 5, 16), torch.float32, CPU, 0, True)]
    used: list[torch.Tensor] = []

    def function(*leaves: torch.Tensor) -> torch.Tensor:
        used.extend(leaves)
        return attention._backend("gated", "torch")(*leaves)

    backward = attention._call(function, "backward", inputs)
    found = []
    for stream in (0, 7):
        monkeypatch.setattr(attention, "_stream", lambda _, stream=stream: stream)
        found.append(backward(0))
    assert len({id(x) for x in used} | {id(x) for x in inputs[0][:3]}) == 9
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


def test_a_capture_that_breaks_says_why_and_gives_the_stream_back(monkeypatch: pytest.MonkeyPatch) -> None:
    current = ["default"]

    class Stream(str):
        def wait_stream(self, _: object) -> None:
            pass

    @contextmanager
    def graph(_: object, stream: str) -> Iterator[None]:
        current[0] = stream
        try:
            yield
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    stubs = {
        "Stream": lambda _: Stream("side"),
        "current_stream": lambda _: Stream(current[0]),
        "set_stream": lambda stream: current.__setitem__(0, stream),
        "stream": lambda _: nullcontext(),
        "CUDAGraph": object,
        "graph": graph,
    }
    for name, stub in stubs.items():
        monkeypatch.setattr(torch.cuda, name, stub)

    def variant(_: int) -> None:
        if current[0] == "side":
            raise ValueError("this cannot be captured")

    with pytest.raises(ValueError, match="this cannot be captured"):
        capture(variant, 1, 8, CPU)
    assert current == ["default"]


def test_limits_of_the_kinds_add_up() -> None:
    shape = attention.Shape(1, 1, 4, 8, 2)  # 32 elements per tensor of tokens, 16 per prefix
    assert attention._elements(shape, "forward") == 4 * 32 + 2 * 16
    assert attention._elements(shape, "backward") == 7 * 32 + 4 * 16
    assert attention._elements(shape, "forward + backward") == 11 * 32 + 6 * 16
    assert attention._product(shape, "gated") == attention._product(shape, "concat") == 2 * 4 * (4 + 2) * 8


@pytest.mark.slow
def test_the_parts_of_a_step_are_those_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    comparison = step._comparison(step.CPU_CASES[0], CPU)
    assert list(comparison.parts) == ["attention", "adapter", "projections", "MLP", "optimizer"]
    shares = record.shares(comparison, CPU, 0.0, {})
    assert all(seconds > 0 for seconds in shares["parts"].values())
    assert sum(shares["parts"].values()) + shares["rest"] == pytest.approx(shares["seconds"])
    assert sum(shares["parts"].values()) > 0.3 * shares["seconds"]
    table = report.comparison_table(
        {"name": "x", "unit": "images", "variants": {"a": {"failed": ""}}, "shares": shares}
    )
    assert "| rest |" in table
    refused = record.shares(comparison, CPU, 0.0, {"fedperfix": {"failed": "wrong"}})
    assert refused == {"of": "fedperfix", "failed": "wrong"}


def committed_records() -> list[Path]:
    return sorted(record.RESULTS.glob("*.json"))


def test_there_is_a_committed_record() -> None:
    assert committed_records()


@pytest.mark.parametrize("path", committed_records(), ids=lambda path: path.stem)
def test_committed_records_are_of_planned_comparisons(path: Path) -> None:
    content = json.loads(path.read_text())
    assert record.slug(content["device"]) == path.stem
    assert content["commit"] != "unknown"
    device = "cpu" if content["threads"] else "cuda"
    planned = {plan.name for plan in all_plans(torch.device(device))}
    names = [entry["name"] for entry in content["comparisons"]]
    assert names
    assert len(set(names)) == len(names)
    assert (
        set(names) <= planned
    )  # one that was cut short, or is older than a plan, lacks some: the pages say how many
    for entry in content["comparisons"]:
        for name, variant in entry["variants"].items():
            timed = not variant.keys() & {"failed", "unavailable"}
            assert not timed or report.seconds(variant)["median"] > 0, (entry["name"], name)


def test_the_pages_show_the_committed_records() -> None:
    for path, text in report.pages().items():
        assert path.read_text() == text, f"{path.name}: run python -m bench.report"
