"""Checkpoints: exact, whole or refused."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from fedperfix.engine.round import run_round
from fedperfix.run import checkpoint, files, tensors
from fedperfix.run.tensors import checksum
from tests.fedperfix import tiny
from tests.fedperfix.test_round import Counting


def trained(method: object = "fedper", rounds: int = 1, **options: object):
    worker, state, config = tiny.federation(method, **options)
    for _ in range(rounds):
        run_round(worker, state, config, evaluate_all=False)
    return worker, state, config


def saved(tmp_path: Path, method: object = "fedper") -> Path:
    worker, state, config = trained(method)
    path = tmp_path / "c.safetensors"
    checkpoint.save(path, state, worker.arena, config)
    return path


def rewrite(path: Path, change) -> None:
    """Change a checkpoint's metadata and tensors."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    del metadata["checksum"]
    change(metadata, tensors)
    save_file(tensors, path, metadata)


def load(path: Path, method: object = "fedper", **options: object):
    worker, state, config = tiny.federation(method, **options)
    checkpoint.load(path, state, worker.arena, config)
    return state


@pytest.mark.parametrize("method", ["fedavg", "fedper", "local", Counting], ids=str)
def test_a_checkpoint_brings_back_every_bit(tmp_path: Path, method: object) -> None:
    worker, state, config = trained(method, rounds=2)
    path = tmp_path / "c.safetensors"
    checkpoint.save(path, state, worker.arena, config)
    back = load(path, method)
    assert back.round == 2
    for name, value in state.tensors().items():
        assert torch.equal(value, back.tensors()[name]), name
    assert os.listdir(tmp_path) == ["c.safetensors"]


def test_the_tensors_have_the_parameters_names_and_shapes(tmp_path: Path) -> None:
    tensors = load_file(saved(tmp_path, Counting))
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    assert shapes == {
        "global.body.weight": (4, 4),
        "global.head.weight": (3, 4),
        "server.sum": (2,),
        "server.offset": (7,),
        "client.count": (3, 2),
    }
    tensors = load_file(saved(tmp_path, "fedper"))
    assert tensors["personal.head.weight"].shape == (3, 3, 4)


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    with pytest.raises(checkpoint.CheckpointError, match="is damaged or no safetensors file"):
        load(path)
    path.write_bytes(whole[:-7] + bytes([whole[-7] ^ 1]) + whole[-6:])
    with pytest.raises(checkpoint.CheckpointError, match="does not match its checksum"):
        load(path)
    path.write_text("hello")
    with pytest.raises(checkpoint.CheckpointError, match="is damaged or no safetensors file"):
        load(path)
    path.unlink()
    with pytest.raises(checkpoint.CheckpointError, match="there is no checkpoint"):
        load(path)


def test_a_foreign_file_and_another_version_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path)
    rewrite(path, lambda metadata, _: metadata.update(version="0"))
    with pytest.raises(checkpoint.CheckpointError, match="has version 0, this program reads 2; use the version"):
        load(path)
    save_file({"weight": torch.ones(2)}, path)
    with pytest.raises(checkpoint.CheckpointError, match="is no file of the kind fedperfix-checkpoint"):
        load(path)


def test_another_configuration_or_model_is_refused_but_more_rounds_are_not(tmp_path: Path) -> None:
    path = saved(tmp_path)
    assert load(path, rounds=50, device="auto", checkpoint_every=1).round == 1
    with pytest.raises(checkpoint.CheckpointError, match="another configuration"):
        load(path, lr=0.3)

    def narrower(metadata: dict, tensors: dict) -> None:
        tensors["global.body.weight"] = tensors["global.body.weight"][:3].contiguous()
        metadata["checksum"] = checksum(tensors, metadata)

    rewrite(path, narrower)
    with pytest.raises(checkpoint.CheckpointError, match=r"does not fit .*global\.body\.weight differs"):
        load(path)


def test_a_refused_checkpoint_leaves_the_state_as_it_was(tmp_path: Path) -> None:
    path = saved(tmp_path)
    rewrite(path, lambda _, tensors: tensors["personal.head.weight"].add_(1))
    worker, state, config = tiny.federation("fedper")
    before = {name: value.clone() for name, value in state.tensors().items()}
    with pytest.raises(checkpoint.CheckpointError):
        checkpoint.load(path, state, worker.arena, config)
    assert state.round == 0
    assert all(torch.equal(value, before[name]) for name, value in state.tensors().items())


def test_the_digest_ignores_what_a_resumed_run_may_change() -> None:
    config = tiny.CONFIG
    digest = checkpoint.config_digest(config)
    assert checkpoint.config_digest(replace(config, rounds=9, run_dir="x", tensorboard=True)) == digest
    assert checkpoint.config_digest(replace(config, seed=9)) != digest


def test_a_full_disk_leaves_the_older_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path)
    before = path.read_bytes()
    worker, state, config = trained(rounds=2)

    def full(tensors: dict, filename: Path, metadata: dict) -> None:
        Path(filename).write_bytes(b"half a checkp")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(tensors, "save_file", full)
    with pytest.raises(OSError, match="No space left") as caught:
        checkpoint.save(path, state, worker.arena, config)
    assert caught.value.errno == errno.ENOSPC
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


def test_writing_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "text"
    files.write_text(path, "old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            files.write_text(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["text"]
    files.write_text(path, "new")
    assert path.read_text() == "new"


def test_an_appended_line_is_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "lines"
    files.append_line(path, json.dumps({"a": 1}))
    write = os.write
    calls = iter(range(9))

    def nearly_full(handle: int, data: bytes) -> int:
        if next(calls) == 0:
            return write(handle, data[:3])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", nearly_full)
        with pytest.raises(OSError, match="No space left"):
            files.append_line(path, json.dumps({"b": 2}))
    assert path.read_text() == '{"a": 1}\n'

    halves = iter((4, 100))  # a short write is not an error: the rest follows
    monkeypatch.setattr(os, "write", lambda handle, data: write(handle, data[: next(halves)]))
    files.append_line(path, json.dumps({"c": 3}))
    assert path.read_text() == '{"a": 1}\n{"c": 3}\n'
