"""Processor time and memory of a process with all its descendants, from Linux's /proc; None elsewhere."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")
_PERIOD = 0.5


def family(pid: int) -> list[int]:
    """A process and its living descendants."""
    parents = {int(entry.name): int(stat[1]) for entry in _entries() if (stat := _stat(entry))}
    found = [pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found


def cpu_seconds(pid: int) -> float | None:
    """Seconds of processor time of a process, its descendants, and those of them that have ended."""
    stats = [stat for one in family(pid) if (stat := _stat(_PROC / str(one)))]
    if not stats:
        return None
    return sum(int(value) for stat in stats for value in stat[11:15]) / os.sysconf("SC_CLK_TCK")


def resident_bytes(pid: int) -> int:
    """Memory of a process and its descendants, what several share counted once (PSS)."""
    return sum(_pss(one) for one in family(pid))


@dataclass
class Peak:
    """The largest memory seen, in bytes; None where it cannot be read."""

    seen: int | None = None


@contextmanager
def watched(pid: int) -> Iterator[Peak]:
    """Look at the memory of a process and its descendants a few times a second, while the block runs."""
    peak, stop = Peak(), threading.Event()

    def look() -> None:
        while not stop.wait(_PERIOD):
            peak.seen = max(peak.seen or 0, resident_bytes(pid)) or None

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        stop.set()
        watcher.join()
        peak.seen = max(peak.seen or 0, resident_bytes(pid)) or None


def _entries() -> Iterator[Path]:
    return (entry for entry in _PROC.iterdir() if entry.name.isdigit()) if _PROC.exists() else iter(())


def _stat(entry: Path) -> list[str] | None:
    """The fields of `stat` after the program's name, which may contain spaces; None if the process is gone."""
    try:
        return (entry / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None


def _pss(pid: int) -> int:
    try:
        lines = (_PROC / str(pid) / "smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)
