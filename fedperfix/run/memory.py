"""What a process does with memory that was freed."""

from __future__ import annotations

import ctypes
import os

# Names of malloc.h, and the most that glibc takes for the second.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_MOST_KEPT, _LARGEST_KEPT = 1 << 30, 1 << 25  # bytes
_USERS_OWN = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def keep_freed_memory() -> None:
    """Keep up to 1 GiB of freed memory in this process instead of returning it to the system.

    A pass over a batch takes and frees tens of megabytes again and again. By its own rule glibc returns them each
    time, and the system clears every page before it lends it again: a tenth to a quarter of a test pass of a small
    model on a CPU. Tensors above 32 MiB are returned as before. Does nothing with another C library, or where the
    user has set one of glibc's variables.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is None or any(name in os.environ for name in _USERS_OWN):
        return
    mallopt(_TRIM_THRESHOLD, _MOST_KEPT)
    mallopt(_MMAP_THRESHOLD, _LARGEST_KEPT)
