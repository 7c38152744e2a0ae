"""Runs of the training command that are killed at random moments: `python -m tests.fedperfix.killed DIR`.

Every command runs in a fork of this process, which has everything imported, so that a start takes little time.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

from fedperfix.data import DATASETS
from fedperfix.models import PRESETS
from fedperfix.run.checkpoint import CHECKPOINT
from fedperfix.train import main
from tests.fedperfix import tiny

KILLS, ROUNDS = 20, 24


def started(work: Callable[[], int]) -> int:
    """Start work in a process of its own; returns that process."""
    process = os.fork()
    if process == 0:
        code = 1
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            code = work()
        finally:
            os._exit(code)
    return process


def ended(process: int) -> int:
    """How it ended: its code, or the signal's number, negative."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def play(work: Callable[[], int]) -> float:
    """Work without a disturbance; returns its seconds."""
    begin = time.perf_counter()
    assert ended(started(work)) == 0
    return time.perf_counter() - begin


def killed_after(work: Callable[[], int], seconds: float) -> bool:
    """Start work and kill it after some time; whether it was still going on."""
    process = started(work)
    time.sleep(seconds)
    os.kill(process, signal.SIGKILL)
    code = ended(process)
    assert code in (0, -signal.SIGKILL), code
    return code != 0


def play_killed(work: Callable[[], int], folder: Path, begun: Path, longest: float, seed: int) -> int:
    """The same work, which goes on where it is, killed `KILLS` times and then left alone.

    How long a round takes depends on what else the machine does: if the work came to its end before the last kill,
    or had not begun at most of them, it starts anew with half the time, or half as much again.

    Args:
        work: what it does.
        folder: all of its files.
        begun: the file that is there when the first round is safe.
        longest: seconds after which it is killed, at most.
        seed: of the moments.

    Returns:
        After how many kills it had begun.
    """
    moments = np.random.default_rng(seed).uniform(0.0, 1.0, KILLS)
    for _ in range(10):
        found = _kills(work, begun, moments * longest)
        if found is not None and found > KILLS / 2:
            assert ended(started(work)) == 0
            return found
        longest *= 0.5 if found is None else 1.5
        shutil.rmtree(folder, ignore_errors=True)
    raise AssertionError(f"the machine is too uneven: no {KILLS} kills fit into a run")


def _kills(work: Callable[[], int], begun: Path, moments: Iterable[float]) -> int | None:
    """After how many of the kills the work had begun; None if it came to its end before the last one."""
    count = 0
    for moment in moments:
        if not killed_after(work, moment):
            return None
        count += begun.exists()
    return count


def train(folder: Path, options: Sequence[str]) -> int:
    """The training command; a run that was killed before its first checkpoint has lost nothing and begins anew."""
    if (folder / CHECKPOINT).exists():
        return main(["--resume", str(folder)])
    shutil.rmtree(folder, ignore_errors=True)
    return main([*options, "--run-dir", str(folder)])


def prepare() -> None:
    """Compute on one thread, which a fork can go on with, and give `cifar10` and `tiny` the size of a test."""
    torch.set_num_threads(1)
    DATASETS["cifar10"] = lambda data_dir: tiny.dataset()
    PRESETS["tiny"] = {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}


if __name__ == "__main__":
    prepare()
    where, chosen = Path(sys.argv[1]), sys.argv[2:]
    whole, killed = where / "whole", where / "killed"
    took = play(lambda: train(whole, chosen))
    count = play_killed(lambda: train(killed, chosen), killed, killed / CHECKPOINT, took / 3, seed=3)
    print(count, f"of {KILLS} kills after the first checkpoint")
