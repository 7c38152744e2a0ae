"""The rows that clients keep from round to round, in memory or in a file of the run's folder.

Both tables give the same rows to the bit. In memory a row of every client exists from the start, and a checkpoint
holds them all; on disk only the rows of clients that have trained take space, the rows of a round are in memory
until its end, and a checkpoint has the size of the global model.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedperfix.config import ConfigError
from fedperfix.engine.group import ALONE, Group
from fedperfix.run.slots import TABLE, SlotFile, TableError, available
from fedperfix_kernels import BlockLayout

# Names of the columns: the local parameters, and what a method keeps besides, after this prefix.
PERSONAL, CLIENT = "personal", "client."
# A table larger than this part of the host's memory lies on disk, if `--personal-table` leaves the choice: a
# checkpoint of a table in memory takes two to three times its size.
HOST_SHARE = 0.25
# A table larger than this part of a GPU's free memory stays in the host's.
_GPU_SHARE = 0.25
_ALIGNED = 64


class ClientTable(ABC):
    """One row per client in every column; rows are read by index, written within a round, and kept at its end."""

    @property
    @abstractmethod
    def columns(self) -> Mapping[str, Tensor | Column]:
        """By name: `column[client]` is a row [*shape], `column[clients]` are rows [n, *shape]."""

    @abstractmethod
    def write(self, clients: Sequence[int], values: Mapping[str, Tensor]) -> None:
        """Give clients new rows, by column [n, *shape]; reads see them at once, and `undo` takes them back."""

    @abstractmethod
    def commit(self, round: int) -> None:
        """The round is finished: what was written in it stays.

        Raises:
            OSError: it cannot be stored.
        """

    @abstractmethod
    def undo(self) -> None:
        """Forget what was written since the last `commit`."""

    def checkpointed(self, round: int) -> None:  # noqa: B027  (a table in memory has nothing to do)
        """A checkpoint of this round is safely on disk."""


class MemoryTable(ClientTable):
    """Columns as tensors [clients, *shape].

    Args:
        start: every client's first row, by column.
        clients: how many there are.
        device: where the columns lie.
    """

    def __init__(self, start: Mapping[str, Tensor], clients: int, device: torch.device) -> None:
        self._columns = {
            name: row.detach().to(device).expand(clients, *row.shape).clone() for name, row in start.items()
        }
        self._before: list[tuple[Tensor, Tensor, Tensor]] = []

    @property
    def columns(self) -> Mapping[str, Tensor]:
        return self._columns

    def write(self, clients: Sequence[int], values: Mapping[str, Tensor]) -> None:
        for name, new in values.items():
            column = self._columns[name]
            rows = torch.tensor(clients, device=column.device)
            self._before.append((column, rows, column[rows]))
            column[rows] = new.to(column.device)

    def commit(self, round: int) -> None:
        self._before.clear()

    def undo(self) -> None:
        while self._before:
            column, rows, old = self._before.pop()
            column[rows] = old


@dataclass(frozen=True)
class _Field:
    """Where a column's values lie in the bytes of a row."""

    first: int
    shape: torch.Size
    dtype: torch.dtype

    @property
    def size(self) -> int:
        return self.shape.numel() * self.dtype.itemsize

    def of(self, row: Tensor) -> Tensor:
        """The values in a row, uint8 [bytes], as a view."""
        if not self.size:
            return torch.empty(self.shape, dtype=self.dtype)
        return row[self.first : self.first + self.size].view(self.dtype).view(self.shape)


class DiskTable(ClientTable):
    """Rows in a `SlotFile` of the run's folder, which the first checkpoint makes.

    Args:
        start: every client's first row, by column.
        clients: how many there are.
        layout: of the column `PERSONAL`, for those who read the file without the model.
        follows: whether another process writes the file, and this one reads it.
    """

    def __init__(
        self, start: Mapping[str, Tensor], clients: int, layout: BlockLayout, *, follows: bool = False
    ) -> None:
        self.clients = clients
        self.follows = follows
        self._fields: dict[str, _Field] = {}
        end = 0
        for name, row in start.items():
            self._fields[name] = _Field(end, row.shape, row.dtype)
            end += -(-self._fields[name].size // _ALIGNED) * _ALIGNED
        self._start = torch.zeros(end, dtype=torch.uint8)
        for name, row in start.items():
            self._fields[name].of(self._start).copy_(row.detach())
        self._layout = layout
        self._slots: SlotFile | None = None
        self._written: dict[int, Tensor] = {}

    @property
    def columns(self) -> Mapping[str, Column]:
        return {
            name: Column(self, name, self.clients, field.shape, field.dtype) for name, field in self._fields.items()
        }

    @property
    def row_size(self) -> int:
        """Bytes of a client's row."""
        return len(self._start)

    @property
    def is_large(self) -> bool:
        """Whether `--personal-table auto` takes a table of this size to disk."""
        return self.clients * self.row_size > HOST_SHARE * host_memory()

    def read(self, client: int, name: str) -> Tensor:
        """A client's row in one column, [*shape] on the CPU, a tensor of its own."""
        field = self._fields[name]
        if client in self._written:
            return field.of(self._written[client]).clone()
        if self._slots is None:
            return field.of(self._start).clone()
        out = torch.empty(field.size, dtype=torch.uint8)
        self._slots.read(client, field.first, out.numpy())
        return out.view(field.dtype).view(field.shape)

    def write(self, clients: Sequence[int], values: Mapping[str, Tensor]) -> None:
        for position, client in enumerate(clients):
            row = torch.zeros_like(self._start)
            for name, field in self._fields.items():
                field.of(row).copy_(values[name][position] if name in values else self.read(client, name))
            self._written[client] = row

    def commit(self, round: int) -> None:
        if self._written:
            if self._slots is None:
                raise RuntimeError("DiskTable: has no file yet; save a checkpoint of the start first")
            if self.follows:
                self._slots.follow(round, self._written)
            else:
                self._slots.write(round, {client: row.numpy() for client, row in self._written.items()})
        self._written.clear()

    def undo(self) -> None:
        self._written.clear()

    def seal(self, folder: Path, round: int) -> str:
        """Bring all rows safely to disk in a run's folder, before a checkpoint of the round takes its place there.

        Returns:
            What `open` takes to know the table again.

        Raises:
            OSError: they cannot be written.
        """
        if self._slots is None:
            self._slots = SlotFile.create(folder / TABLE, self.clients, self._start.numpy(), self._about())
        if self._slots.path != folder / TABLE:
            raise ValueError(f"folder: got '{folder}', takes that of the table, '{self._slots.path.parent}'")
        return self._slots.seal(round)

    def checkpointed(self, round: int) -> None:
        """The checkpoint for which the table was sealed is safely on disk: its rows are the ones to keep."""
        assert self._slots is not None
        self._slots.checkpointed(round)

    def open(self, folder: Path, round: int, seal: str) -> None:
        """Take the rows of a run's folder, as they were at its checkpoint.

        Raises:
            TableError: the file is missing, foreign or damaged, or of another model or method.
            OSError: it cannot be read or written.
        """
        slots = SlotFile.open(folder / TABLE, round, seal, write=not self.follows)
        about = self._about()
        if slots.clients != self.clients or any(slots.about.get(key) != value for key, value in about.items()):
            slots.close()
            raise TableError(f"'{slots.path}' does not fit this model and method")
        self.close()
        self._slots = slots
        self._start = torch.from_numpy(slots.start)

    def close(self) -> None:
        """Close the file."""
        if self._slots is not None:
            self._slots.close()
        self._slots = None

    def _about(self) -> dict[str, object]:
        """What the header of the file says about a row."""
        columns = {
            name: {
                "first": field.first,
                "shape": list(field.shape),
                "dtype": str(field.dtype).removeprefix("torch."),
            }
            for name, field in self._fields.items()
        }
        layout = zip(self._layout.names, self._layout.shapes, self._layout.offsets, strict=True)
        return {
            "columns": columns,
            "parameters": {name: {"shape": list(shape), "first": start} for name, shape, start in layout},
        }


@dataclass(frozen=True)
class Column:
    """A column of a table on disk, read as if it were a tensor [clients, *shape] on the CPU.

    Args:
        table: whose column it is.
        name: its name.
        clients: how many rows it has.
        row_shape, dtype: of a row.
    """

    table: DiskTable
    name: str
    clients: int
    row_shape: torch.Size
    dtype: torch.dtype

    device = torch.device("cpu")

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.clients, *self.row_shape))

    def __len__(self) -> int:
        return self.clients

    def __getitem__(self, rows: int | slice | Tensor | Iterable[int]) -> Tensor:
        """A client's row [*shape], or the rows [n, *shape] of several; each call reads them anew."""
        if isinstance(rows, (Tensor, np.ndarray)):
            rows = rows.tolist()
        everyone = range(self.clients)
        if isinstance(rows, (int, np.integer)):
            return self.table.read(everyone[rows], self.name)
        chosen = everyone[rows] if isinstance(rows, slice) else [everyone[row] for row in rows]
        values = torch.empty((len(chosen), *self.row_shape), dtype=self.dtype)
        for position, client in enumerate(chosen):
            values[position] = self.table.read(client, self.name)
        return values


def named_row(slots: SlotFile, client: int) -> dict[str, Tensor]:
    """A client's row of a table's file, by the names that a checkpoint gives its tensors.

    Raises:
        TableError: the row does not match its checksum.
    """
    row = torch.from_numpy(slots.read_row(client))
    named = {}
    for name, about in slots.about["columns"].items():
        dtype = getattr(torch, about["dtype"])
        values = _Field(about["first"], torch.Size(about["shape"]), dtype).of(row)
        if name != PERSONAL:
            named[name] = values
            continue
        for parameter, place in slots.about["parameters"].items():
            shape = torch.Size(place["shape"])
            named[f"{PERSONAL}.{parameter}"] = values[place["first"] :][: shape.numel()].view(shape)
    return named


def make_table(
    wanted: str,
    start: Mapping[str, Tensor],
    clients: int,
    layout: BlockLayout,
    device: torch.device,
    group: Group = ALONE,
) -> ClientTable:
    """The table of a new federation.

    Args:
        wanted: `memory`, `disk`, or `auto`: on disk if the tables of the host's processes would take more than
            `HOST_SHARE` of its memory.
        start: every client's first row, by column.
        clients: how many there are.
        layout: of the column `PERSONAL`.
        device: of the model.
        group: the processes of the run; of a table on disk the first one is the writer.

    Raises:
        ConfigError: this system has no table on disk.
    """
    size = clients * sum(row.numel() * row.element_size() for row in start.values())
    if wanted == "auto":
        wanted = "disk" if available() and group.local_size * size > HOST_SHARE * host_memory() else "memory"
    if wanted == "memory":
        return MemoryTable(start, clients, _memory_device(size, device))
    if not available():
        raise ConfigError("--personal-table: got disk, takes memory on this system, which lacks preadv and flock")
    return DiskTable(start, clients, layout, follows=not group.leader)


def host_memory() -> float:
    """Bytes of memory that this machine has, infinity if it does not say."""
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, OSError, ValueError):
        return float("inf")


def _memory_device(size: int, device: torch.device) -> torch.device:
    if device.type == "cuda" and size > _GPU_SHARE * torch.cuda.mem_get_info(device)[0]:
        return torch.device("cpu")
    return device
