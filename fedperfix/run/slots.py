"""A file with one row per client that survives a crash at any moment.

Every client has two slots, and a slot holds a row, the round after which it was written, and its checksum. A write
goes to the slot that is not the newest one as of the last checkpoint: whatever happens after that checkpoint, its
row of every client stays as it was. Clients that never took part share one start row, and their slots are holes of
a sparse file.

    header | start row | index [clients, 2] of (round, SHA-256) | slots [clients, 2] of rows

The header says what the columns of a row are. Each part begins on a page. A checkpoint stores the file's seal, the
SHA-256 of the header and of the index as of its round, and so knows every byte that it depends on.

Rows are read and written by position, not through a mapping: on a full disk a write then fails with an error, where
a mapping of a sparse file ends the process, and no row stays resident.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from fedperfix.run.files import replacing, sync_folder

try:
    import fcntl
except ImportError:  # not a POSIX system; `available` says so
    fcntl = None  # type: ignore[assignment]

TABLE = "clients.table"
FORMAT = b"fedperfix-table\n"
VERSION = 1
_PAGE = 4096
_ENTRY = np.dtype([("round", "<i8"), ("digest", "u1", 32)])


class TableError(ValueError):
    """A table that cannot be used; the message names the file and what is wrong with it."""


def available() -> bool:
    """Whether this system reads and writes files by position."""
    return fcntl is not None and hasattr(os, "preadv")


class SlotFile:
    """An open table; use `create` or `open`.

    Attributes:
        path: of the file.
        about: what the header says: clients, bytes of a row, and what the creator added.
        start: uint8 [bytes], the row of clients that have written none.
    """

    def __init__(self, path: Path, write: bool) -> None:
        self.path = path
        self._file = open(path, "r+b" if write else "rb", buffering=0)  # noqa: SIM115  (closed with the object)
        with self._closed_on_error():
            if write:
                self._lock()
            self._read_header()
        self._index = np.zeros((self.clients, 2), _ENTRY)
        self._checkpoint = 0
        self._broken = False

    @classmethod
    def create(cls, path: Path, clients: int, start: np.ndarray, about: Mapping[str, Any]) -> SlotFile:
        """Make a table in which every client has the start row, and open it for writing.

        Args:
            path: of the file, which must not exist.
            clients: how many there are.
            start: uint8 [bytes], the row of all of them.
            about: what is said about the columns, of JSON's types.

        Raises:
            OSError: it cannot be made; nothing is left of it.
        """
        if path.exists():
            raise FileExistsError(17, "File exists", str(path))
        row = start.tobytes()
        about = {**about, "clients": clients, "row": len(row), "start": hashlib.sha256(row).hexdigest()}
        text = json.dumps(about, sort_keys=True).encode()
        header = FORMAT + np.array([VERSION, len(text)], "<u8").tobytes() + text
        with replacing(path) as temporary, open(temporary, "r+b") as file:
            file.write(header + bytes(-len(header) % _PAGE) + row)
            file.truncate(_layout(len(header), len(row), clients)[-1])
        sync_folder(path.parent)
        return cls(path, write=True)

    @classmethod
    def open(cls, path: Path, round: int, seal: str, *, write: bool) -> SlotFile:
        """Open a table as it was at a checkpoint, and check it.

        Args:
            path: of the file.
            round: the checkpoint's.
            seal: what `seal` returned for the checkpoint.
            write: check every row, drop those of later rounds and take new ones; otherwise rows are checked when
                they are read, and nothing is written.

        Raises:
            TableError: no such file, not a table, one of another version or checkpoint, or a damaged one.
            OSError: it cannot be read or written, or another process writes to it.
        """
        try:
            slots = cls(path, write)
        except FileNotFoundError as error:
            raise TableError(f"there is no table '{path}'") from error
        with slots._closed_on_error():
            slots._read_index(round, seal)
            if write:
                slots._check_rows()
                slots._drop_later()
        return slots

    @property
    def clients(self) -> int:
        """How many clients there are."""
        return self.about["clients"]

    @property
    def row_size(self) -> int:
        """Bytes of a row."""
        return self.about["row"]

    def read(self, client: int, first: int, out: np.ndarray) -> None:
        """Read a part of a client's newest row.

        Args:
            client: whose.
            first: position of the part's first byte in the row.
            out: uint8 [bytes], takes the part.
        """
        if self._broken:
            raise OSError(5, "an earlier write to it failed; resume the run from its checkpoint", str(self.path))
        slot = self._newest(client)
        if slot is None:
            out[:] = self.start[first : first + len(out)]
        else:
            self._pread(out, self._place(client, slot) + first)

    def read_row(self, client: int) -> np.ndarray:
        """A client's newest row, uint8 [bytes].

        Raises:
            TableError: it does not match its checksum.
        """
        row = np.empty(self.row_size, np.uint8)
        self.read(client, 0, row)
        slot = self._newest(client)
        if slot is not None:
            round, digest = self._index[client, slot].item()
            if _row_digest(client, round, row) != bytes(digest):
                raise TableError(
                    f"'{self.path}' is damaged: the row of client {client} does not match its checksum"
                )
        return row

    def write(self, round: int, rows: Mapping[int, np.ndarray]) -> None:
        """Write the rows, uint8 [bytes], that clients have after a round later than the last checkpoint's.

        Raises:
            OSError: one of them could not be written; this object is then of no more use, and the file is as good
                as it was for a run that goes on from the checkpoint.
        """
        assert round > self._checkpoint
        try:
            for client, row in rows.items():
                slot = self._free(client)
                entry = np.array((round, list(_row_digest(client, round, row))), _ENTRY)
                self._pwrite(row, self._place(client, slot))
                self._pwrite(np.frombuffer(entry.tobytes(), np.uint8), self._entry_place(client, slot))
                self._index[client, slot] = entry
        except BaseException:
            self._broken = True
            raise

    def follow(self, round: int, clients: Iterable[int]) -> None:
        """Another process has written, or will have before the next read, these clients' rows after a round."""
        for client in clients:
            self._index["round"][client, self._free(client)] = round

    def seal(self, round: int) -> str:
        """Bring everything written so far safely to disk; SHA-256 of the header and of the index as of `round`.

        Slots that the checkpoint needs stay protected once `checkpointed` is called.
        """
        os.fsync(self._file.fileno())
        return self._digest(round)

    def checkpointed(self, round: int) -> None:
        """A checkpoint of this round is safely on disk: from here on its rows are the ones that are not touched."""
        self._checkpoint = round

    def close(self) -> None:
        """Close the file, and let others write to it."""
        self._file.close()

    @contextmanager
    def _closed_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.close()
            raise

    def _newest(self, client: int, round: int | None = None) -> int | None:
        """The slot of a client's newest row (of `round` at the latest), or None if it has only the start row."""
        first, second = self._index["round"][client].tolist()
        if round is not None:
            first, second = (0 if written > round else written for written in (first, second))
        return None if first == second == 0 else int(second > first)

    def _free(self, client: int) -> int:
        """The slot that the last checkpoint does not need."""
        durable = self._newest(client, self._checkpoint)
        return 0 if durable is None else 1 - durable

    def _place(self, client: int, slot: int) -> int:
        return self._slots + (2 * client + slot) * _padded(self.row_size)

    def _entry_place(self, client: int, slot: int) -> int:
        return self._entries + (2 * client + slot) * _ENTRY.itemsize

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OSError(error.errno, "another process is writing to it", str(self.path)) from error

    def _read_header(self) -> None:
        """Check the parts that are the same for every round, and find where the others begin."""
        size = os.fstat(self._file.fileno()).st_size
        fixed = os.pread(self._file.fileno(), len(FORMAT) + 16, 0)
        if not fixed.startswith(FORMAT) or len(fixed) < len(FORMAT) + 16:
            raise TableError(f"'{self.path}' is not a table of this program")
        version, length = np.frombuffer(fixed[len(FORMAT) :], "<u8").tolist()
        if version != VERSION:
            raise TableError(
                f"'{self.path}' has table version {version}, this program reads {VERSION}; "
                "use the version of fedperfix that wrote it"
            )
        if len(fixed) + length > size:
            raise TableError(f"'{self.path}' is damaged: it ends in its header")
        text = os.pread(self._file.fileno(), length, len(fixed))
        try:
            self.about: dict[str, Any] = json.loads(text)
            parts = _layout(len(fixed) + length, self.about["row"], self.about["clients"])
            start = self.about["start"]
        except (KeyError, TypeError, ValueError) as error:
            raise TableError(f"'{self.path}' is damaged: its header cannot be read") from error
        begin, self._entries, self._slots, end = parts
        if size != end:
            raise TableError(f"'{self.path}' is damaged: it has {size:,} bytes instead of {end:,}")
        self._header = fixed + text
        self.start = np.empty(self.row_size, np.uint8)
        self._pread(self.start, begin)
        if hashlib.sha256(self.start).hexdigest() != start:
            raise TableError(f"'{self.path}' is damaged: its start row does not match its checksum")

    def _read_index(self, round: int, seal: str) -> None:
        """Read the index and forget what is later than `round`."""
        self._pread(self._index.view(np.uint8).reshape(-1), self._entries)
        self._later = np.argwhere(self._index["round"] > round).tolist()
        for client, slot in self._later:
            self._index[client, slot] = np.zeros((), _ENTRY)
        if self._digest(round) != seal:
            raise TableError(f"'{self.path}' does not belong to the checkpoint beside it, or is damaged")
        self._checkpoint = round

    def _check_rows(self) -> None:
        for client in np.flatnonzero(self._index["round"].any(axis=1)).tolist():
            self.read_row(client)

    def _drop_later(self) -> None:
        """Empty on disk too: a later checkpoint must not take a row that was written before the resumption."""
        for client, slot in self._later:
            self._pwrite(np.zeros(_ENTRY.itemsize, np.uint8), self._entry_place(client, slot))
        if self._later:
            os.fsync(self._file.fileno())

    def _digest(self, round: int) -> str:
        rounds = self._index["round"]
        known = np.where(rounds <= round, rounds, 0)
        newest = self._index[np.arange(self.clients), known.argmax(axis=1)]
        newest[known.max(axis=1) == 0] = np.zeros((), _ENTRY)
        return hashlib.sha256(self._header + newest.tobytes()).hexdigest()

    def _pread(self, out: np.ndarray, place: int) -> None:
        done = 0
        while done < len(out):
            got = os.preadv(self._file.fileno(), [memoryview(out)[done:]], place + done)
            if got == 0:
                raise OSError(5, "it ends before the row", str(self.path))
            done += got

    def _pwrite(self, data: np.ndarray, place: int) -> None:
        done = 0
        try:
            while done < len(data):
                done += os.pwrite(self._file.fileno(), memoryview(data)[done:], place + done)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error


def _row_digest(client: int, round: int, row: np.ndarray) -> bytes:
    digest = hashlib.sha256(np.array([client, round], "<i8"))
    digest.update(row)
    return digest.digest()


def _padded(size: int) -> int:
    return -(-size // _PAGE) * _PAGE


def _layout(header: int, row: int, clients: int) -> tuple[int, int, int, int]:
    """Where the start row, the index and the slots begin, and where the file ends."""
    start = _padded(header)
    index = start + _padded(row)
    slots = index + _padded(2 * clients * _ENTRY.itemsize)
    return start, index, slots, slots + 2 * clients * _padded(row)
