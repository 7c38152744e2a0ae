"""Checkpoints: the state after a round in one safetensors file, from which a run goes on bit for bit.

Tensors in it: `global.<parameter>`, `personal.<parameter>` [clients, ...], and what the method keeps,
`server.<name>` and `client.<name>` [clients, ...]. Random choices are functions of (seed, purpose, client, round),
so no generator has a state to be saved.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fedperfix.config import NOT_SAVED, RESUMABLE, TrainConfig
from fedperfix.engine.state import FederatedState
from fedperfix.methods.custom import short_name
from fedperfix.run.files import replacing
from fedperfix_kernels import BlockLayout, ParameterArena

CHECKPOINT = "checkpoint.safetensors"
FORMAT = "fedperfix-checkpoint"
VERSION = "1"


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file and what is wrong with it."""


def save(path: Path, state: FederatedState, arena: ParameterArena, config: TrainConfig) -> None:
    """Write the state after its last finished round; an older file at `path` stays until the new one is whole.

    Raises:
        OSError: it cannot be written; what was there is intact.
    """
    tensors = {name: value.to("cpu", copy=True).contiguous() for name, value in _named(state, arena)}
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "round": str(state.round),
        "config": config_digest(config),
        "frozen": _frozen_checksum(arena),
        "checksum": _checksum(tensors),
    }
    with replacing(path) as temporary:
        try:
            save_file(tensors, temporary, metadata)
        except SafetensorError as error:  # the library wraps the system's error in text
            code = re.search(r"os error (\d+)", str(error))
            if code is None:
                raise
            raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error


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
    metadata, tensors = _read(path)
    if metadata.get("format") != FORMAT:
        raise CheckpointError(f"--resume: '{path}' is not a checkpoint of this program")
    if metadata.get("version") != VERSION:
        raise CheckpointError(
            f"--resume: '{path}' has checkpoint version {metadata.get('version')}, this program reads {VERSION}; "
            "use the version of fedperfix that wrote it"
        )
    if metadata.get("checksum") != _checksum(tensors):
        raise CheckpointError(f"--resume: '{path}' is damaged: its content does not match its checksum")
    if metadata.get("config") != config_digest(config):
        raise CheckpointError(
            f"--resume: '{path}' was made with another configuration than the folder's config.toml"
        )
    if arena.frozen and metadata.get("frozen") != _frozen_checksum(arena):
        raise CheckpointError(
            f"--resume: '{path}' was made with another frozen backbone than the model starts with"
        )
    places = dict(_named(state, arena))
    wrong = sorted(
        name
        for name in places.keys() | tensors.keys()
        if name not in places
        or name not in tensors
        or (places[name].shape, places[name].dtype) != (tensors[name].shape, tensors[name].dtype)
    )
    if wrong:
        raise CheckpointError(f"--resume: '{path}' does not fit this model and method ({wrong[0]} differs)")
    for name, place in places.items():
        place.copy_(tensors[name])
    state.round = int(metadata["round"])


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


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise CheckpointError(f"--resume: there is no checkpoint '{path}'") from error
    except (SafetensorError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"--resume: '{path}' is damaged or is not a checkpoint ({reason})") from error


def _named(state: FederatedState, arena: ParameterArena) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the state by its name in the file, as a view of the state's own memory."""
    for name, view in arena.shared_layout.views(state.server.shared).items():
        yield f"global.{name}", view
    for name, view in _columns(arena.local_layout, state.personal).items():
        yield f"personal.{name}", view
    for name, value in state.server.state.items():
        yield f"server.{name}", value
    for name, value in state.client_state.items():
        yield f"client.{name}", value


def _columns(layout: BlockLayout, table: Tensor) -> dict[str, Tensor]:
    """The named tensors of every row of a table [clients, numel], as views [clients, *shape]."""
    return {
        name: table[:, start : start + shape.numel()].unflatten(1, shape) if shape else table[:, start]
        for name, shape, start in zip(layout.names, layout.shapes, layout.offsets, strict=True)
    }


def _frozen_checksum(arena: ParameterArena) -> str:
    return _checksum({name: value.detach().cpu() for name, value in arena.frozen.items()})


def _checksum(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
