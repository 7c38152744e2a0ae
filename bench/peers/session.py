"""A session: contestants take turns, one round each, so that whatever else the machine does meets all alike."""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from bench.peers.processes import cpu_seconds, watched
from bench.peers.work import Work
from bench.timing import Spread

_ROOT = Path(__file__).parents[2]
_LOG_LINES = 8


class ContestantError(RuntimeError):
    """A contestant's process ended early; the message holds the end of its log."""


@dataclass
class Timings:
    """What was measured of one contestant: one number per round that counts.

    Args:
        seconds, cpu_seconds: of the clock, and of all cores together in all its processes.
        accuracy: percent, the mean over the tested clients.
        phases: seconds by phase, where the contestant says so.
        peak_bytes: most memory of all its processes in the first round, which does not count.
        gpu_bytes: most memory that its process had allocated on the GPU.
        shared: its parameters at the end.
    """

    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    phases: list[dict[str, float]] = field(default_factory=list)
    peak_bytes: int | None = None
    gpu_bytes: int | None = None
    shared: dict[str, Tensor] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """For a record."""
        phases = {name: Spread.of([p[name] for p in self.phases]).median for name in self.phases[0]}
        return {
            "seconds": Spread.of(self.seconds).as_dict(),
            "cpu_seconds": Spread.of(self.cpu_seconds).as_dict() if self.cpu_seconds else None,
            "phases": {name: round(value, 4) for name, value in phases.items()},
            "accuracy": [round(value, 4) for value in self.accuracy],
            "peak_bytes": self.peak_bytes,
            "gpu_bytes": self.gpu_bytes,
        }


def hold(
    work: Work, names: Sequence[str], rounds: int, tell: Callable[[str], None] = lambda line: None
) -> dict[str, Timings]:
    """Play the rounds: one that does not count, then `rounds` that do; in each, every contestant in turn.

    Args:
        work: what is done in a round.
        names: of the contestants.
        rounds: how many rounds count.
        tell: called with a line for people after every round.

    Returns:
        What was measured, by name.

    Raises:
        ContestantError: one of them failed.
    """
    timings = {name: Timings() for name in names}
    with contextlib.ExitStack() as stack:
        players = {name: stack.enter_context(_player(name, work, 1 + rounds)) for name in names}
        for round in range(1 + rounds):
            for name, player in players.items():
                answer = player.warm_up() if round == 0 else player.round()
                _note(timings[name], answer, counts=round > 0)
            if round:
                tell(f"round {round}: " + ", ".join(f"{name} {timings[name].seconds[-1]:.2f} s" for name in names))
        for name, player in players.items():
            timings[name].shared = player.result()
    return timings


def difference(found: dict[str, Tensor], expected: dict[str, Tensor], start: dict[str, Tensor]) -> float:
    """How far two sets of shared parameters are from each other, as a part of the way from the start.

    Args:
        found, expected: by name; what is not in `start`, such as running statistics, does not count.
        start: the parameters that both began with, and perhaps others.
    """
    names = start.keys() & expected.keys()
    if names != start.keys() & found.keys():
        return math.inf
    apart = sum((found[name].double() - expected[name].double()).square().sum().item() for name in names)
    way = sum((expected[name].double() - start[name].double()).square().sum().item() for name in names)
    return math.sqrt(apart / way) if way else math.inf


class _Player:
    """A contestant's process."""

    def __init__(self, name: str, process: subprocess.Popen[str], folder: Path) -> None:
        self.name, self.process, self.folder = name, process, folder

    def round(self) -> dict[str, Any]:
        """Play one round: what the contestant tells, and the processor time that it took."""
        before = cpu_seconds(self.process.pid)
        answer = self._ask()
        after = cpu_seconds(self.process.pid)
        return answer | {"cpu_seconds": None if before is None or after is None else after - before}

    def warm_up(self) -> dict[str, Any]:
        """Play the first round, in which its memory is watched."""
        with watched(self.process.pid) as peak:
            answer = self._ask()
        return answer | {"peak_bytes": peak.seen}

    def result(self) -> dict[str, Tensor]:
        """Its shared parameters after the last round."""
        self._answer()
        return load_file(self.folder / "shared.safetensors")

    def _ask(self) -> dict[str, Any]:
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write("\n")
            self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            log = (self.folder / "log.txt").read_text(errors="replace").strip().splitlines()
            raise ContestantError(f"{self.name} ended early:\n" + "\n".join(log[-_LOG_LINES:]))
        return json.loads(line)


@contextlib.contextmanager
def _player(name: str, work: Work, rounds: int) -> Iterator[_Player]:
    """Start a contestant's process, and end it with the block."""
    with tempfile.TemporaryDirectory(prefix="peers-") as folder, open(Path(folder) / "log.txt", "w") as log:
        file = str(Path(folder) / "shared.safetensors")
        command = [sys.executable, "-m", "bench.peers.contestant", name, work.to_json(), str(rounds), file]
        environment = os.environ | {
            "OMP_NUM_THREADS": str(work.threads),
            "PFL_PYTORCH_DEVICE": work.device,
            "PYTHONPATH": os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH")))),
        }
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log}
        with subprocess.Popen(command, text=True, cwd=_ROOT, env=environment, **pipes) as process:
            try:
                yield _Player(name, process, Path(folder))
                process.stdin.close()
                process.wait(timeout=60)
            finally:
                process.kill()


def _note(timings: Timings, answer: dict[str, Any], *, counts: bool) -> None:
    timings.accuracy.append(answer["accuracy"])
    timings.gpu_bytes = answer.get("gpu_bytes")
    if not counts:
        timings.peak_bytes = answer["peak_bytes"]
        return
    timings.seconds.append(answer["seconds"])
    timings.phases.append(answer["phases"])
    if answer["cpu_seconds"] is not None:
        timings.cpu_seconds.append(answer["cpu_seconds"])
