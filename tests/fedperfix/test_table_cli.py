"""`--personal-table` and `--eval-clients` on the command line."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fedperfix.config import ConfigError, parse_args
from fedperfix.engine.group import Group
from fedperfix.run import checkpoint, metrics
from fedperfix.run.slots import TABLE
from fedperfix.train import _personal_table, main
from tests.fedperfix.test_train_cli import (
    FILES,
    _small,  # noqa: F401  (a fixture)
    curves,
    run,
)


def resume(*options: str) -> int:
    return main(["--resume", *options])


def sentence(capsys: pytest.CaptureFixture) -> str:
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    return captured.err


def test_a_run_on_disk_has_the_results_of_one_in_memory(capsys: pytest.CaptureFixture) -> None:
    assert run("--run-dir", "memory", "--personal-table", "memory", rounds=4) == 0
    assert "on disk" not in capsys.readouterr().out
    assert run("--run-dir", "disk", "--personal-table", "disk", rounds=4) == 0
    assert f"clients      3 rows of 0.05 MB on disk, in {TABLE}" in capsys.readouterr().out
    assert set(os.listdir("disk")) == FILES | {TABLE}
    assert curves("disk") == curves("memory")
    assert Path("disk/clients.csv").read_text() == Path("memory/clients.csv").read_text()
    memory, disk = (load_file(f"{folder}/checkpoint.safetensors") for folder in ("memory", "disk"))
    assert {name for name in memory if not name.startswith("personal.")} == set(disk)
    assert all(torch.equal(memory[name], value) for name, value in disk.items())
    for client in range(3):
        kept = [checkpoint.read_client(Path(folder), client) for folder in ("memory", "disk")]
        assert kept[0].keys() == kept[1].keys()
        assert all(torch.equal(value, kept[1][name]) for name, value in kept[0].items())


def test_a_run_goes_on_where_its_rows_are(capsys: pytest.CaptureFixture) -> None:
    run("--run-dir", "whole", "--personal-table", "disk", rounds=4)
    run("--run-dir", "parts", "--personal-table", "disk", rounds=2)
    capsys.readouterr()
    assert resume("parts", "--personal-table", "memory") == 2
    assert "--personal-table: got memory, but the run in 'parts' has disk" in sentence(capsys)
    assert resume("parts", "--rounds", "4") == 0
    assert curves("parts") == curves("whole")
    for client in range(3):
        parts, whole = (checkpoint.read_client(Path(folder), client) for folder in ("parts", "whole"))
        assert all(torch.equal(value, whole[name]) for name, value in parts.items())
    capsys.readouterr()
    os.unlink(Path("parts") / TABLE)
    assert resume("parts", "--rounds", "6") == 2
    assert "there is no table 'parts/clients.table'" in sentence(capsys)


def test_a_run_of_auto_on_a_small_machine_goes_on_on_a_large_one(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("fedperfix.engine.table.host_memory", lambda: 1000.0)
        run("--run-dir", "a", rounds=2)
    assert "on disk, in clients.table (more than a quarter of this machine's memory)" in capsys.readouterr().out
    assert resume("a", "--rounds", "4") == 0
    assert "on disk, in clients.table" in capsys.readouterr().out
    run("--run-dir", "b", rounds=4)
    assert curves("a") == curves("b")


def test_a_full_disk_leaves_the_run_as_it_was_at_its_checkpoint(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    run("--run-dir", "a", "--personal-table", "disk", rounds=2)
    capsys.readouterr()

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        assert resume("a", "--rounds", "4") == 2
    assert "cannot write or read 'a/clients.table': No space left on device" in sentence(capsys)
    assert resume("a", "--rounds", "4") == 0
    run("--run-dir", "b", rounds=4)
    assert curves("a") == curves("b")


def test_an_evaluation_of_some_clients_is_named_as_such(capsys: pytest.CaptureFixture) -> None:
    assert run("--run-dir", "a", "--eval-clients", "2", "--eval-every", "1", rounds=2) == 0
    output = capsys.readouterr().out
    assert "global+personal of 2 random" in output
    assert "global+personal, 2 random" in output
    assert "global+personal, all" not in output
    records = metrics.read(Path("a"))
    assert [(record.tested_clients, record.sampled_mean) for record in records] == [(2, None)] * 2
    assert len(metrics.read_clients(Path("a"))) == 2
    assert run("--run-dir", "b", "--eval-clients", "4") == 2
    assert "--eval-clients: got 4, takes at most --clients, which is 3" in sentence(capsys)


def test_several_hosts_have_the_rows_in_memory() -> None:
    one, several = Group(size=3, local_size=3), Group(size=3, local_size=1)
    assert _personal_table(parse_args([]), several) == "memory"
    with pytest.raises(ConfigError, match="--personal-table: got disk, takes memory with several hosts; start all"):
        _personal_table(parse_args(["--personal-table=disk"]), several)
    assert _personal_table(parse_args([]), one) == "auto"
    assert _personal_table(parse_args(["--personal-table=disk"]), one) == "disk"
