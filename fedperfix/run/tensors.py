"""Tensors in one safetensors file that says what it is, and notices when it was changed."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fedperfix.run.files import replacing


@dataclass(frozen=True)
class Format:
    """What kind of file it is.

    Args:
        name: of the kind.
        version: of what is in it; files of another one are refused.
    """

    name: str
    version: int = 1


class TensorsError(ValueError):
    """A file that cannot be used; the message names it and what is wrong with it."""


class VersionError(TensorsError):
    """A file of another version of its format."""


def write_tensors(
    format: Format, path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], private: bool = False
) -> str:
    """Write a file in one step; what was there stays until the new one is whole.

    Args:
        format: of the file.
        path: where.
        tensors: by name.
        metadata: texts that belong to them.
        private: nobody else on this machine may read it.

    Returns:
        The checksum over all of it, which is in the metadata as well.

    Raises:
        OSError: it cannot be written.
    """
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    metadata = {"format": format.name, "version": str(format.version), **metadata}
    mark = checksum(tensors, metadata)
    with replacing(path, private) as temporary:
        try:
            save_file(tensors, temporary, {**metadata, "checksum": mark})
        except SafetensorError as error:  # the library wraps the system's error in text
            code = re.search(r"os error (\d+)", str(error))
            if code is None:
                raise
            raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error
    return mark


def read_tensors(format: Format, path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a file that `write_tensors` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        TensorsError: it is damaged, of another kind or version, or was changed.
    """
    with opened(format, path) as (file, metadata):
        # Copies: the file's memory would change with the file.
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    plain = {name: value for name, value in metadata.items() if name != "checksum"}
    if metadata.get("checksum") != checksum(tensors, plain):
        raise TensorsError(f"'{path}' is damaged: its content does not match its checksum")
    return tensors, metadata


@contextmanager
def opened(format: Format, path: Path) -> Iterator[tuple[Any, dict[str, str]]]:
    """A file, to read parts of it without the checksum over all: safetensors' handle and the metadata.

    Raises:
        FileNotFoundError: there is no such file.
        TensorsError: it is of another kind or version, or cannot be read, in the block as well.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != format.name:
                raise TensorsError(f"'{path}' is no file of the kind {format.name}")
            if metadata.get("version") != str(format.version):
                raise VersionError(
                    f"'{path}' has version {metadata.get('version')}, this program reads {format.version}"
                )
            yield file, metadata
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise TensorsError(f"'{path}' is damaged or no safetensors file ({reason})") from error


def checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """SHA-256 over names, dtypes, shapes and values of tensors on the CPU, and texts that belong to them."""
    digest = hashlib.sha256(json.dumps(dict(metadata), sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
