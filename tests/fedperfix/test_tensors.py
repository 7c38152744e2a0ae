"""Tensors in a file: exact, whole, of their format, or refused."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from fedperfix.run import tensors
from fedperfix.run.tensors import Format, TensorsError, VersionError, opened, read_tensors, write_tensors

FORMAT = Format("kind", version=3)
VALUES = {"a": torch.tensor([1.5, float("nan"), -0.0]), "b": torch.arange(6, dtype=torch.int64).view(2, 3).T}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "x.safetensors"
    write_tensors(FORMAT, path, VALUES, {"round": "7"})
    return path


def test_what_is_read_is_what_was_written(path: Path) -> None:
    found, metadata = read_tensors(FORMAT, path)
    assert found["b"].equal(VALUES["b"])
    assert found["a"].view(torch.int32).equal(VALUES["a"].view(torch.int32))  # the bits: a NaN, a negative zero
    assert (metadata["round"], metadata["format"], metadata["version"]) == ("7", "kind", "3")
    assert os.listdir(path.parent) == ["x.safetensors"]
    with opened(FORMAT, path) as (file, _):
        assert file.get_slice("b")[1:2].tolist() == [[1, 4]]


@pytest.mark.parametrize("changed", ["round", "b"])
def test_a_changed_value_or_text_is_noticed(path: Path, changed: str) -> None:
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    values = load_file(path)
    if changed == "b":
        values["b"][0, 0] += 1
    else:
        metadata["round"] = "8"
    save_file(values, path, metadata)
    with pytest.raises(TensorsError, match="x.safetensors' is damaged: its content does not match its checksum"):
        read_tensors(FORMAT, path)


def test_a_truncated_or_foreign_file_and_another_version_are_refused(path: Path) -> None:
    with pytest.raises(TensorsError, match="is no file of the kind other"):
        read_tensors(Format("other"), path)
    with pytest.raises(VersionError, match="has version 3, this program reads 4"):
        read_tensors(Format("kind", version=4), path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(TensorsError, match="is damaged or no safetensors file"):
        read_tensors(FORMAT, path)
    save_file({"a": torch.ones(1)}, path)
    with pytest.raises(TensorsError, match="is no file of the kind kind"):
        read_tensors(FORMAT, path)
    with pytest.raises(FileNotFoundError):
        read_tensors(FORMAT, path.with_name("none"))


def test_a_full_disk_is_the_systems_error_and_leaves_the_older_file(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(tensors, "save_file", full)
    with pytest.raises(OSError, match="No space left") as caught:
        write_tensors(FORMAT, path, VALUES, {})
    assert caught.value.errno == errno.ENOSPC
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == ["x.safetensors"]


def test_a_folder_that_cannot_be_written_is_named_by_the_file_that_was_meant(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), "x.part")

    monkeypatch.setattr(tempfile, "mkstemp", read_only)
    with pytest.raises(OSError, match="Read-only") as caught:
        write_tensors(FORMAT, path, VALUES, {})
    assert (caught.value.errno, caught.value.filename) == (errno.EROFS, str(path))


def test_a_private_file_is_its_owners_alone(path: Path) -> None:
    os.umask(mask := os.umask(0))  # reading it means setting it
    assert path.stat().st_mode & 0o777 == 0o666 & ~mask
    write_tensors(FORMAT, path, VALUES, {}, private=True)
    assert path.stat().st_mode & 0o777 == 0o600
