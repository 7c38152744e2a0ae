"""One contestant in a process of its own: it plays a round when it is told to, and says how long that took.

`python -m bench.peers.contestant NAME WORK ROUNDS FILE`: the parent writes a line before each round and reads one
JSON line after it. At the end the contestant writes its shared parameters to FILE.
"""

from __future__ import annotations

import fedperfix.run.threads  # noqa: F401  # isort: skip  (before torch)

import importlib
import json
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

import torch
from safetensors.torch import save_file
from torch import Tensor

from bench.peers.work import Work
from bench.timing import synchronize

# Names of contestants: the modules that play them, and in what they compute: fp32, bf16, or this package's default.
# A module's `play(work, rounds, turns)` does all rounds.
PLAYERS = {
    "ours": ("ours", "auto"),
    "ours fp32": ("ours", "fp32"),
    "authors-pattern": ("authors_pattern", "fp32"),
    "pfl-research": ("pfl_research", "fp32"),
    "pfl-research bf16": ("pfl_research", "bf16"),
    "flower": ("flower_simulation", "fp32"),
}


@dataclass
class Turns:
    """Waits before a round and tells of it afterwards; this one neither waits nor tells.

    Attributes:
        precision: in which the contestant computes, as in `PLAYERS`.
        accuracy: percent, after every round: the mean over the clients that were tested.
    """

    precision: str = "fp32"
    accuracy: list[float] = field(default_factory=list)

    def begin(self) -> None:
        """Wait until the next round may begin."""

    def end(self, accuracy: float, seconds: Mapping[str, float] | None = None) -> None:
        """Tell that the round is over: its accuracy, and its seconds by phase where they are known."""
        self.accuracy.append(accuracy)


class PipedTurns(Turns):
    """Turns that a parent process gives, line by line."""

    def __init__(self, orders: TextIO, answers: TextIO, device: torch.device, precision: str) -> None:
        super().__init__(precision)
        self._orders, self._answers, self._device = orders, answers, device
        self._start = 0.0

    def begin(self) -> None:
        if not self._orders.readline():
            os._exit(0)  # the parent is gone; threads and processes of a peer must not keep this one alive
        self._start = time.perf_counter()

    def end(self, accuracy: float, seconds: Mapping[str, float] | None = None) -> None:
        synchronize(self._device)
        whole = time.perf_counter() - self._start
        super().end(accuracy, seconds)
        answer = {"seconds": whole, "accuracy": accuracy, "phases": dict(seconds or {})}
        if self._device.type == "cuda":
            answer["gpu_bytes"] = torch.cuda.max_memory_allocated(self._device)
        self._answers.write(json.dumps(answer) + "\n")
        self._answers.flush()


def play(name: str, work: Work, rounds: int, turns: Turns) -> dict[str, Tensor]:
    """All rounds of one contestant.

    Args:
        name: a key of `PLAYERS`.
        work: what is done in a round.
        rounds: how many.
        turns: asked before and told after every round.

    Returns:
        The shared parameters at the end, by name, float32 on the CPU.
    """
    torch.set_num_threads(work.threads)
    shared = importlib.import_module(f"bench.peers.{PLAYERS[name][0]}").play(work, rounds, turns)
    return {key: value.detach().to("cpu", torch.float32).contiguous() for key, value in shared.items()}


def main() -> None:
    """Command line; the module says what it does."""
    name, work, rounds, file = sys.argv[1:]
    # Libraries print: the two pipes get descriptors of their own, the old ones lead to nothing and to the log.
    orders, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    task = Work.from_json(work)
    turns = PipedTurns(orders, answers, torch.device(task.device), PLAYERS[name][1])
    save_file(play(name, task, int(rounds), turns), Path(file))
    answers.write("{}\n")
    answers.flush()


if __name__ == "__main__":
    main()
