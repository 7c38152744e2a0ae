"""One process at a time works in a run's folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedperfix.config import ConfigError

try:
    import fcntl
except ImportError:  # not on Windows, which cannot lock a folder
    fcntl = None  # type: ignore[assignment]


@contextmanager
def locked(folder: Path, option: str) -> Iterator[None]:
    """Keep other processes of this program out of a folder that exists; nothing is written into it.

    The lock ends with the process that has it, however that ends. File systems without locks have none.

    Args:
        folder: of a run.
        option: that named it, for the message.

    Raises:
        ConfigError: another process works in it.
    """
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        _take(handle, folder, option)
        yield
    finally:
        os.close(handle)


def _take(handle: int, folder: Path, option: str) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ConfigError(
            f"{option}: '{folder}' is in use by another process; wait for its end, or name another folder"
        ) from error
    except OSError:  # network file systems lock files that are open for writing only
        return
