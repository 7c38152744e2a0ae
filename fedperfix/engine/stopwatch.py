"""Seconds by phase."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

from fedperfix.engine.device import synchronize


class Stopwatch:
    """Adds up the seconds of named phases."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the block's time as `name`'s."""
        start = time.perf_counter()
        yield
        synchronize(self.device)
        self._add(name, time.perf_counter() - start)

    def add(self, parts: Iterable[Stopwatch], whole: float) -> None:
        """Count what went on side by side, each phase as its part of the clock.

        Args:
            parts: what was counted meanwhile, of every worker or every turn.
            whole: how many seconds all of it took by the clock.
        """
        counted = [item for part in parts for item in part.seconds.items()]
        total = sum(seconds for _, seconds in counted)
        scale = min(1.0, whole / total) if total else 0.0
        for name, seconds in counted:
            self._add(name, scale * seconds)

    def _add(self, name: str, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds
