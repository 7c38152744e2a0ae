"""Tensors in one safetensors file that says what it is, and notices when it was changed."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fedperfix.run.files import replacing

VERSION = 1


class TensorsError(ValueError):
    """A file that cannot be used; the message names it and what is wrong with it."""


def write_tensors(format: str, path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Write a file in one step; what was there stays until the new one is whole.

    Args:
        format: what kind of file it is.
        path: of the file.
        tensors: by name.
        metadata: texts that belong to them.

    Returns:
        The checksum over all of it, which is in the metadata as well.

    Raises:
        OSError: it cannot be written.
    """
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    metadata = {"format": format, "version": str(VERSION), **metadata}
    mark = _checksum(tensors, metadata)
    with replacing(path) as temporary:
        try:
            save_file(tensors, temporary, {**metadata, "checksum": mark})
        except SafetensorError as error:  # the library wraps the system's error in text
            code = re.search(r"os error (\d+)", str(error))
            if code is None:
                raise
            raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error
    return mark


def read_tensors(format: str, path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a file that `write_tensors` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        TensorsError: it is damaged, of another kind or version, or was changed.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            # Copies: the file's memory would change with the file.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError) as error:
        raise TensorsError(f"'{path}' is damaged or no safetensors file ({str(error).splitlines()[0]})") from error
    if metadata.get("format") != format:
        raise TensorsError(f"'{path}' is no file of the kind {format}")
    if metadata.get("version") != str(VERSION):
        raise TensorsError(f"'{path}' has version {metadata.get('version')}, this program reads {VERSION}")
    plain = {name: value for name, value in metadata.items() if name != "checksum"}
    if metadata.get("checksum") != _checksum(tensors, plain):
        raise TensorsError(f"'{path}' is damaged: its content does not match its checksum")
    return tensors, metadata


def _checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(dict(metadata), sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
