"""Writing files so that a full disk or a crash leaves what was there intact."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_PART = ".part"


@contextmanager
def replacing(path: Path, private: bool = False) -> Iterator[Path]:
    """A temporary file beside `path`, which takes its place, safely on disk, when the block ends normally.

    Args:
        path: of the file.
        private: nobody else on this machine may read it.

    Yields:
        The temporary file's path; it exists and is empty.

    Raises:
        OSError: it cannot be written; `path` is as it was, and no temporary file is left.
    """
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=_PART)
    except OSError as error:  # which names the temporary file
        raise OSError(error.errno, error.strerror, str(path)) from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        if not private:  # as which it was made
            os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def remove_parts(folder: Path) -> None:
    """Remove the temporary files that a process left in a folder when it was killed."""
    for path in folder.glob(f".*{_PART}"):
        path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Bring a folder's entries safely to disk: names of files that were made or replaced in it."""
    if os.name != "posix":  # other systems do not open folders
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str, private: bool = False) -> None:
    """Write a text file in one step: afterwards it is the old one or the new one, never a part."""
    with replacing(path, private) as temporary:
        temporary.write_text(text, encoding="utf-8")


def append_line(path: Path, line: str) -> None:
    """Append one line, or nothing at all if it cannot be written.

    Raises:
        OSError: it cannot be written; the file is as it was.
    """
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        size = os.fstat(handle).st_size
        data = f"{line}\n".encode()
        try:
            while data:
                data = data[os.write(handle, data) :]
            os.fsync(handle)
        except BaseException:
            os.ftruncate(handle, size)
            raise
    finally:
        os.close(handle)


def _umask() -> int:
    """The process's mask for new files (mkstemp ignores it); reading it means setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
