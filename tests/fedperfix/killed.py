"""Runs of the training command that are killed at random moments: `python -m tests.fedperfix.killed DIR`.

Every command runs in a fork of this process, which has everything imported, so that a start takes little time.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
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


def play_killed(work: Callable[[], int], begun: Callable[[], bool], longest: float, seed: int) -> int:
    """The same work, which goes on where it is, killed `KILLS` times, each after so many seconds at most.

    Returns:
        How often it had then begun.
    """
    moments = np.random.default_rng(seed).uniform(0.0, longest, KILLS)
    resumed = 0
    for moment in moments:
        if not killed_after(work, moment):
            break
        resumed += begun()
    assert ended(started(work)) == 0
    return resumed


def train(folder: Path, options: Sequence[str]) -> int:
    """The training command; a run that was killed before its first checkpoint has lost nothing and begins anew."""
    if (folder / CHECKPOINT).exists():
        return main(["--resume", str(folder)])
    shutil.rmtree(folder, ignore_errors=True)
    return main([*options, "--run-dir", str(folder)])


if __name__ == "__main__":
    torch.set_num_threads(1)
    DATASETS["cifar10"] = lambda data_dir: tiny.dataset()
    PRESETS["tiny"] = {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
    where, chosen = Path(sys.argv[1]), sys.argv[2:]
    whole, killed = where / "whole", where / "killed"
    took = play(lambda: train(whole, chosen))
    count = play_killed(lambda: train(killed, chosen), (killed / CHECKPOINT).exists, took / 3, seed=3)
    print(count, f"of {KILLS} kills after the first checkpoint")
