"""Time and memory of one call, and the device's own ceilings, measured in the same way."""

from __future__ import annotations

import contextlib
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch
from torch.profiler import ProfilerActivity, profile

from bench.comparison import Comparison
from fedperfix.engine.device import cpu_computes_in_bf16


@dataclass(frozen=True)
class Spread:
    """Seconds of one call over several measurements."""

    median: float
    lowest: float
    highest: float
    count: int
    processor: float | None = None  # median of what all threads together computed, where that was measured

    @classmethod
    def of(cls, seconds: list[float], processor: list[float] | None = None) -> Spread:
        """Median and range of `seconds`, and the median of `processor` seconds."""
        computed = statistics.median(processor) if processor else None
        return cls(statistics.median(seconds), min(seconds), max(seconds), len(seconds), computed)

    def as_dict(self) -> dict[str, float]:
        """For the record, rounded to a nanosecond."""
        return {key: round(value, 9) for key, value in asdict(self).items() if value is not None}


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def wall_times(comparison: Comparison, device: torch.device, budget: float) -> dict[str, Spread]:
    """Wall time of the eager call of every variant, measured in turn so that drift meets all alike.

    On a CPU also the processor time, which says how much of the wall time was somebody else's.

    Args:
        comparison: what to time.
        device: where its inputs are.
        budget: seconds to spend, at least three rounds whatever they take.
    """
    seconds: dict[str, list[float]] = {name: [] for name in comparison.variants}
    processor: dict[str, list[float]] = {name: [] for name in comparison.variants}
    inner = {
        name: _repetitions(variant, comparison.input_sets, device) for name, variant in comparison.variants.items()
    }
    started = time.perf_counter()
    while len(seconds[comparison.baseline]) < 3 or (
        time.perf_counter() - started < budget and len(seconds[comparison.baseline]) < 100
    ):
        for name, variant in comparison.variants.items():
            synchronize(device)
            begin, computed = time.perf_counter(), time.process_time()
            for repetition in range(inner[name]):
                variant(repetition % comparison.input_sets)
            synchronize(device)
            seconds[name].append((time.perf_counter() - begin) / inner[name])
            processor[name].append((time.process_time() - computed) / inner[name])
    if device.type != "cpu":
        return {name: Spread.of(values) for name, values in seconds.items()}
    return {name: Spread.of(values, processor[name]) for name, values in seconds.items()}


def _repetitions(variant: Callable[[int], object], input_sets: int, device: torch.device) -> int:
    """Warm up; then as many calls as fill five milliseconds, so that the clock's own error does not count."""
    for index in range(input_sets):  # some prepare every set on its first call
        variant(index)
    variant(0)
    synchronize(device)
    begin = time.perf_counter()
    variant(0)
    synchronize(device)
    return max(1, min(1000, int(0.005 / max(time.perf_counter() - begin, 1e-9))))


def device_times(
    comparison: Comparison, device: torch.device, rounds: int = 9
) -> tuple[dict[str, Spread], dict[str, str]]:
    """Device time of every variant on a GPU: a CUDA graph of many calls over rotated inputs, replayed in turn.

    Returns:
        The spread of every variant that could be captured, and why the others could not.
    """
    graphs, reasons, calls = {}, {}, max(comparison.input_sets, 8)
    for name, variant in comparison.variants.items():
        try:
            graphs[name] = capture(variant, comparison.input_sets, calls, device)
        except Exception as error:  # what cannot be captured still has its wall time
            reasons[name] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    milliseconds: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(rounds):
        for name, graph in graphs.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            milliseconds[name].append(begin.elapsed_time(end) / calls)
    return {name: Spread.of([x / 1e3 for x in values]) for name, values in milliseconds.items()}, reasons


def capture(
    variant: Callable[[int], object], input_sets: int, calls: int, device: torch.device
) -> torch.cuda.CUDAGraph:
    """A CUDA graph of `calls` calls of `variant` over rotated inputs, replayed once.

    The calls before it run on the stream that is captured: autograd keeps to the stream of a forward pass.

    Raises:
        what a call raised while it was captured; the stream that was current is so again.
    """
    stream, before = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    stream.wait_stream(before)
    with torch.cuda.stream(stream):
        for repetition in range(max(3, input_sets)):
            variant(repetition % input_sets)
    before.wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream):
            for repetition in range(calls):
                variant(repetition % input_sets)
    except Exception as error:  # ending a broken capture fails in turn, hides why, and leaves its stream current
        torch.cuda.set_stream(before)
        raise error.__context__ or error from None
    graph.replay()
    torch.cuda.synchronize(device)
    return graph


def peak_memory(variant: Callable[[int], object], device: torch.device) -> int:
    """Bytes that one call has allocated at its peak, beyond what was there before."""
    variant(0)
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        variant(0)
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with _quiet_stderr(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        variant(0)
    recorded = profiler.profiler.kineto_results.events()
    changes = [(event.start_ns(), event.nbytes()) for event in recorded if event.name() == "[memory]"]
    held = peak = 0
    for _, change in sorted(changes, key=lambda item: item[0]):
        held += change
        peak = max(peak, held)
    return peak


@contextlib.contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Keep the profiler's own trace messages, which it writes to the file descriptor, off the terminal."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second of a large copy, read and written counted."""
    numel = (1 << 28) if device.type == "cuda" else (1 << 25)
    source = torch.rand(numel, device=device)
    target = torch.empty_like(source)
    seconds = _best(lambda: target.copy_(source), device)
    return 2 * source.nbytes / seconds


def matrix_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Operations per second of a large square matrix product through the fastest of PyTorch's libraries.

    A processor that does not compute in bfloat16 multiplies it as float32.
    """
    if device.type == "cpu" and dtype == torch.bfloat16 and not cpu_computes_in_bf16():
        dtype = torch.float32
    size = 8192 if device.type == "cuda" else 1536
    a = torch.randn(size, size, device=device).to(dtype)
    b = torch.randn(size, size, device=device).to(dtype)
    seconds = [_best(lambda: a @ b, device)]
    # Products in float32 go to MKL, which oneDNN may outdo; those in bfloat16 go to oneDNN anyway.
    onednn = device.type == "cpu" and dtype == torch.float32 and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    if onednn:
        seconds.append(_best(lambda: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], ""), device))
    return 2 * size**3 / min(seconds)


def _best(function: Callable[[], object], device: torch.device, rounds: int = 10) -> float:
    function()
    seconds = []
    for _ in range(rounds):
        synchronize(device)
        begin = time.perf_counter()
        for _ in range(3):
            function()
        synchronize(device)
        seconds.append((time.perf_counter() - begin) / 3)
    return statistics.median(seconds)
