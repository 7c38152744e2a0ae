"""Checkpoints: the state after a round in one safetensors file, from which a run goes on bit for bit.

Tensors in it: `global.<parameter>`, `personal.<parameter>` [clients, ...], and what the method keeps,
`server.<name>` and `client.<name>` [clients, ...]. Random choices are functions of (seed, purpose, client, round),
so no generator has a state to be saved.

Where the clients' rows lie in a table on disk, the checkpoint has the global part only, and in its metadata the
seal of that table (`fedperfix/run/slots.py`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from fedperfix.config import NOT_SAVED, RESUMABLE, TrainConfig
from fedperfix.engine.state import FederatedState
from fedperfix.engine.table import PERSONAL, DiskTable, MemoryTable, named_row
from fedperfix.methods.custom import short_name
from fedperfix.run.files import sync_folder
from fedperfix.run.slots import TABLE, SlotFile, TableError
from fedperfix.run.tensors import Format, TensorsError, VersionError, checksum, opened, read_tensors, write_tensors
from fedperfix_kernels import ParameterArena

CHECKPOINT = "checkpoint.safetensors"
FORMAT = Format("fedperfix-checkpoint", version=2)


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file and what is wrong with it."""


def save(path: Path, state: FederatedState, arena: ParameterArena, config: TrainConfig) -> None:
    """Write the state after its last finished round; an older file at `path` stays until the new one is whole.

    Raises:
        OSError: it cannot be written; what was there is intact.
    """
    table = state.table if isinstance(state.table, DiskTable) else None
    seal = {"table": table.seal(path.parent, state.round)} if table else {}  # safely on disk before the checkpoint
    tensors = {name: value.to("cpu", copy=True) for name, value in _named(state, arena)}
    metadata = {
        "round": str(state.round),
        "config": config_digest(config),
        "frozen": _frozen_checksum(arena),
        **seal,
    }
    write_tensors(FORMAT, path, tensors, metadata)
    if table:
        sync_folder(path.parent)  # the rows of the older checkpoint are free to be overwritten from here on
        table.checkpointed(state.round)


def load(path: Path, state: FederatedState, arena: ParameterArena, config: TrainConfig) -> None:
    """Read a checkpoint into `state`.

    Args:
        path: of the file.
        state: the initial one of the same configuration; overwritten.
        arena: for the names and places of the parameters.
        config: of the run that goes on.

    Raises:
        CheckpointError: no such file, not a checkpoint, one of another version or configuration, or a damaged one.
    """
    with _checked(path):
        tensors, metadata = read_tensors(FORMAT, path)
    if metadata.get("config") != config_digest(config):
        raise CheckpointError(f"'{path}' was made with another configuration than the folder's config.toml")
    if arena.frozen and metadata.get("frozen") != _frozen_checksum(arena):
        raise CheckpointError(f"'{path}' was made with another frozen backbone than the model starts with")
    _check_table(path, state, metadata.get("table"))
    places = dict(_named(state, arena))
    wrong = sorted(
        name
        for name in places.keys() | tensors.keys()
        if name not in places
        or name not in tensors
        or (places[name].shape, places[name].dtype) != (tensors[name].shape, tensors[name].dtype)
    )
    if wrong:
        raise CheckpointError(f"'{path}' does not fit this model and method ({wrong[0]} differs)")
    if isinstance(state.table, DiskTable):
        _open_table(path, state.table, int(metadata["round"]), metadata["table"])
    for name, place in places.items():
        place.copy_(tensors[name])
    state.round = int(metadata["round"])


def _check_table(path: Path, state: FederatedState, seal: str | None) -> None:
    """Whether checkpoint and state have the clients' rows in the same place."""
    if seal is not None and isinstance(state.table, MemoryTable):
        table = path.parent / TABLE
        missing = "" if table.exists() else ", which is missing"
        raise CheckpointError(f"'{path}' has its clients' rows on disk, in '{table}'{missing}")
    if seal is None and isinstance(state.table, DiskTable):
        raise CheckpointError(f"'{path}' has its clients' rows in itself; leave --personal-table out")


def _open_table(path: Path, table: DiskTable, round: int, seal: str) -> None:
    """Take the clients' rows from the table beside a checkpoint."""
    try:
        table.open(path.parent, round, seal)
    except TableError as error:
        raise CheckpointError(f"{error}") from error


def read_global(folder: Path) -> tuple[int, dict[str, Tensor]]:
    """The round of a run's checkpoint, and the global parameters and statistics in it, by name.

    Raises:
        CheckpointError: no such file, not a checkpoint, one of another version, or a damaged one.
    """
    path = folder / CHECKPOINT
    with _checked(path):
        tensors, metadata = read_tensors(FORMAT, path)
    found = {name.removeprefix("global."): value for name, value in tensors.items() if name.startswith("global.")}
    return int(metadata["round"]), found


def read_client(folder: Path, client: int) -> dict[str, Tensor]:
    """What a client of a run keeps, as of the run's checkpoint, wherever the run has its rows.

    Args:
        folder: of the run.
        client: its number.

    Returns:
        On the CPU, by name: `personal.<parameter>`, and `client.<name>` of what the method keeps.

    Raises:
        CheckpointError: a checkpoint or a table that cannot be used, or no such client.
    """
    path = folder / CHECKPOINT
    with _checked(path), opened(FORMAT, path) as (file, metadata):
        if "table" not in metadata:
            return _rows_of(file, path, client)
    try:
        slots = SlotFile.open(folder / TABLE, int(metadata["round"]), metadata["table"], write=False)
        _check_client(client, slots.clients, folder)
        return named_row(slots, client)
    except TableError as error:
        raise CheckpointError(str(error)) from error


def _rows_of(file: Any, path: Path, client: int) -> dict[str, Tensor]:
    """One client's rows of a checkpoint that has them all."""
    names = [name for name in file.keys() if name.startswith(("personal.", "client."))]  # noqa: SIM118
    rows = {name: file.get_slice(name) for name in names}
    clients = min((row.get_shape()[0] for row in rows.values()), default=0)
    if rows:
        _check_client(client, clients, path.parent)
    return {name: row[client : client + 1][0] for name, row in rows.items()}


def _check_client(client: int, clients: int, folder: Path) -> None:
    if not 0 <= client < clients:
        raise CheckpointError(
            f"client: got {client}, takes 0 to {clients - 1}, the clients of the run in '{folder}'"
        )


def config_digest(config: TrainConfig) -> str:
    """A short digest of everything in a configuration that a resumed run may not change.

    Options at their defaults are left out, so that an option that a later version adds changes no digest. Of a
    method in the user's file only the names of file and class count: a run and its file may move.
    """
    named = replace(config, method=short_name(config.method))
    chosen = {
        item.name: getattr(named, item.name)
        for item in fields(TrainConfig)
        if item.name not in (*RESUMABLE, *NOT_SAVED) and getattr(named, item.name) != item.default
    }
    chosen["method"] = short_name(config.method)
    return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()[:16]


@contextmanager
def _checked(path: Path) -> Iterator[None]:
    """What is wrong with the file, found in the block, is a `CheckpointError`."""
    try:
        yield
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no checkpoint '{path}'") from error
    except VersionError as error:
        raise CheckpointError(f"{error}; use the version of fedperfix that wrote it") from error
    except TensorsError as error:
        raise CheckpointError(str(error)) from error


def _named(state: FederatedState, arena: ParameterArena) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the state by its name in the file, as a view of the state's own memory."""
    for name, view in arena.shared_layout.views(state.server.shared).items():
        yield f"global.{name}", view
    for name, value in state.server.state.items():
        yield f"server.{name}", value
    if isinstance(state.table, MemoryTable):
        for name, view in arena.local_layout.row_views(state.table.columns[PERSONAL]).items():
            yield f"{PERSONAL}.{name}", view
        for name, value in state.table.columns.items():
            if name != PERSONAL:
                yield name, value


def _frozen_checksum(arena: ParameterArena) -> str:
    return checksum({name: value.detach().cpu() for name, value in arena.frozen.items()}, {})
