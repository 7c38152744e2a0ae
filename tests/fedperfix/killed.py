"""Runs of the training command that are killed at random moments: `python -m tests.fedperfix.killed DIR`.

Every command runs in a fork of this process, which has everything imported, so that a start takes little time.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from fedperfix.data import DATASETS
from fedperfix.models import PRESETS
from fedperfix.run.checkpoint import CHECKPOINT
from fedperfix.train import main
from tests.fedperfix import tiny

KILLS, ROUNDS = 20, 24


def started(words: Sequence[str]) -> int:
    """Start a command of its own; returns its process."""
    process = os.fork()
    if process == 0:
        code = 1
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            code = main(list(words))
        finally:
            os._exit(code)
    return process


def ended(process: int) -> int:
    """How it ended: its code, or the signal's number, negative."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def play(folder: Path, options: Sequence[str]) -> float:
    """A run without a disturbance; returns its seconds."""
    begin = time.perf_counter()
    assert ended(started([*options, "--run-dir", str(folder)])) == 0
    return time.perf_counter() - begin


def play_killed(folder: Path, options: Sequence[str], seconds: float, seed: int) -> int:
    """The same run, killed `KILLS` times and resumed each time; returns in how many of them it had a checkpoint.

    A run that was killed before it had its first checkpoint has lost nothing and begins anew.
    """
    moments = np.random.default_rng(seed).uniform(0.0, seconds / 3, KILLS)
    resumed = 0
    for moment in moments:
        process = started(_words(folder, options))
        time.sleep(moment)
        os.kill(process, signal.SIGKILL)
        code = ended(process)
        if code == 0:  # it was at its end before
            break
        assert code == -signal.SIGKILL, code
        resumed += (folder / CHECKPOINT).exists()
    assert ended(started(_words(folder, options))) == 0
    return resumed


def _words(folder: Path, options: Sequence[str]) -> list[str]:
    if (folder / CHECKPOINT).exists():
        return ["--resume", str(folder)]
    shutil.rmtree(folder, ignore_errors=True)
    return [*options, "--run-dir", str(folder)]


if __name__ == "__main__":
    torch.set_num_threads(1)
    DATASETS["cifar10"] = lambda data_dir: tiny.dataset()
    PRESETS["tiny"] = {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
    where, chosen = Path(sys.argv[1]), sys.argv[2:]
    whole = play(where / "whole", chosen)
    print(play_killed(where / "killed", chosen, whole, seed=3), f"of {KILLS} kills after the first checkpoint")
