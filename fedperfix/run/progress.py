"""What the person at the terminal sees: a header, the progress of the rounds, a summary."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from fedperfix.run.metrics import HEADLINES, RoundMetrics, headline_rounds


class Display(Protocol):
    """What the loop over rounds tells its display."""

    def client(self, phase: str, done: int, total: int) -> None:
        """`done` of `total` clients have taken their turn in this phase of the round."""

    def round(self, metrics: RoundMetrics) -> None:
        """A round is finished."""


@contextmanager
def display(console: Console, rounds: int, finished: int, samples: str = "images") -> Iterator[Display]:
    """Show the progress of a run: live on a terminal, one line per round elsewhere.

    Args:
        console: where to.
        rounds: how many the run has.
        finished: how many of them are already done.
        samples: what is counted per second.
    """
    if not console.is_terminal:
        yield Lines(console, rounds, finished, samples)
        return
    columns = (
        TextColumn("{task.description:<8}"),
        BarColumn(bar_width=14),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, refresh_per_second=4, speed_estimate_period=600) as progress:
        yield Live(progress, rounds, finished, samples)


class Live:
    """Two bars: rounds, with accuracy, speed and time left, and clients of the current round."""

    def __init__(self, progress: Progress, rounds: int, finished: int, samples: str) -> None:
        self._progress = progress
        self._samples = samples
        self._rounds = progress.add_task("rounds", total=rounds, completed=finished, figures="")
        self._clients = progress.add_task("clients", total=None, figures="")
        self._accuracy = ""

    def client(self, phase: str, done: int, total: int) -> None:
        self._progress.update(self._clients, completed=done, total=total, figures=phase)

    def round(self, metrics: RoundMetrics) -> None:
        if metrics.headline:
            self._accuracy = f"  {metrics.headline_of} {metrics.headline_mean:.1f} %"
        speed = f"{metrics.images_per_second:,.0f} {self._samples}/s"
        figures = f"local {metrics.local_mean:.1f} %{self._accuracy}  {speed}"
        self._progress.update(self._rounds, completed=metrics.round, figures=figures)
        if metrics.dropped:
            self._progress.console.print(dropped_line(metrics))


class Lines:
    """One plain line per round."""

    def __init__(self, console: Console, rounds: int, finished: int, samples: str) -> None:
        self._console = console
        self._samples = samples
        self._rounds = rounds
        self._first = finished
        self._start = time.monotonic()

    def client(self, phase: str, done: int, total: int) -> None:
        pass

    def round(self, metrics: RoundMetrics) -> None:
        elapsed = time.monotonic() - self._start
        left = elapsed / (metrics.round - self._first) * (self._rounds - metrics.round)
        parts = [f"local {metrics.local_mean:5.1f} %"]
        if metrics.headline:
            of = "" if metrics.tested_clients is None else f" of {metrics.headline_of}"
            parts.append(f"{HEADLINES[metrics.headline]}{of} {metrics.headline_mean:5.1f} %")
        parts += [f"{metrics.images_per_second:,.0f} {self._samples}/s", f"{clock(left)} left"]
        width = len(str(self._rounds))
        print_plain(self._console, f"round {metrics.round:>{width}}/{self._rounds}  " + "  ".join(parts))
        if metrics.dropped:
            print_plain(self._console, dropped_line(metrics))


def dropped_line(metrics: RoundMetrics) -> str:
    """A sentence about the clients that were left out of a round."""
    clients = metrics.dropped_clients.replace(" ", ", ")
    everyone = " (all of them: the global model stays as it was)" if metrics.dropped == metrics.sampled else ""
    return (
        f"round {metrics.round}: update not finite or too large, left out "
        f"{metrics.dropped} of {metrics.sampled} clients: {clients}{everyone}"
    )


def header(console: Console, facts: Iterable[tuple[str, str]]) -> None:
    """Print what the run is, a line per fact."""
    for name, text in facts:
        print_plain(console, f"{name:<12} {text}")
    print_plain(console, "")


def summary(console: Console, rounds: Sequence[RoundMetrics], folder: Path) -> None:
    """Print the accuracies of the last and of the best round, and where the run's files are."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), collapse_padding=True)
    for name in ("test (%)", "round", "mean", "std", "worst", "weighted", "AUC", "F1"):
        table.add_column(name, justify="left" if name == "test (%)" else "right", no_wrap=True)
    if rounds:
        _row(table, "local, sampled", "last", rounds[-1], "local")
    found = headline_rounds(rounds)
    if found:
        last, best = found
        if last.sampled_mean is not None:
            _row(table, f"{HEADLINES['all']}, sampled", "last", last, "sampled")
        for prefix, name in HEADLINES.items():
            for which, record in (("last", last), ("best", best)):
                if getattr(record, f"{prefix}_mean") is not None:
                    _row(table, f"{name}, {record.headline_of}", which, record, prefix)
    console.print(table)
    print_plain(console, "local: after local training, before the aggregation")
    print_plain(console, "global+personal: after the aggregation, the new global parameters and each client's own")
    if found and found[0].mixed_mean is not None:
        print_plain(console, "authors' code: sampled clients as in local, the others with the parameters of before")
    print_plain(console, "mean, std, worst tenth, weighted: of the accuracy over clients; F1: macro-F1")
    print_plain(console, "best: chosen on the test images, for comparison with papers that report it\n")
    total = {key: sum(getattr(m, f"seconds_{key}") for m in rounds) for key in _PHASES}
    seconds = ", ".join(f"{key} {value:.1f} s" for key, value in total.items())
    print_plain(console, f"time         {sum(total.values()):.1f} s: {seconds}")
    up, down = (sum(getattr(m, f"bytes_{way}") for m in rounds) / 1e6 for way in ("up", "down"))
    print_plain(console, f"sent         {up:,.1f} MB up, {down:,.1f} MB down")
    left_out = sum(metrics.dropped for metrics in rounds)
    if left_out:
        print_plain(console, f"left out     {left_out} updates that were not finite or too large")
    if rounds and rounds[-1].epsilon is not None:
        print_plain(console, f"privacy      epsilon {rounds[-1].epsilon:.3g} for every client's data")
    print_plain(console, f"run folder   {folder}")


_PHASES = ("train", "aggregate", "evaluate", "other")


def _row(table: Table, name: str, which: str, metrics: RoundMetrics, prefix: str) -> None:
    keys = ("mean", "std", "worst", "weighted", "auc", "f1")
    values = (getattr(metrics, f"{prefix}_{key}") for key in keys)
    cells = ("–" if value is None else f"{value:.2f}" for value in values)
    table.add_row(name, f"{which} {metrics.round}", *cells)


def print_plain(console: Console, text: str) -> None:
    """Print a line as it is: no markup, no wrapping of paths, no colours."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def clock(seconds: float) -> str:
    """Seconds as minutes and seconds, or hours too."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
