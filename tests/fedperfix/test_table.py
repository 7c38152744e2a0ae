"""Clients' rows on disk: the same bits as in memory, whatever happens to the process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fedperfix.config import ConfigError
from fedperfix.engine import table as tables
from fedperfix.engine.round import run_round, sample_clients, tested_clients
from fedperfix.engine.table import DiskTable, MemoryTable, make_table
from fedperfix.methods import METHODS
from fedperfix.run import checkpoint
from fedperfix.run.metrics import RoundMetrics
from fedperfix.run.slots import TABLE
from fedperfix.run.tensors import checksum
from fedperfix_kernels import BlockLayout
from tests.fedperfix import tiny
from tests.fedperfix.test_round import Counting

OPTIONS = {"lr": 0.1, "batch_size": 4, "clients": 5, "client_data": tiny.data((5, 9, 12, 4, 7))}


def federation(method: object, folder: Path, table: str = "disk", **options: object):
    """A federation with the checkpoint of its start, which makes the table."""
    worker, state, config = tiny.federation(method, table=table, **(OPTIONS | options))
    folder.mkdir(exist_ok=True)
    checkpoint.save(folder / checkpoint.CHECKPOINT, state, worker.arena, config)
    return worker, state, config


def save(folder: Path, worker, state, config) -> None:
    checkpoint.save(folder / checkpoint.CHECKPOINT, state, worker.arena, config)


def resumed(method: object, folder: Path, table: str = "disk", **options: object):
    worker, state, config = tiny.federation(method, table=table, **(OPTIONS | options))
    checkpoint.load(folder / checkpoint.CHECKPOINT, state, worker.arena, config)
    return worker, state, config


def same(first, second) -> None:
    for name, value in first.tensors().items():
        assert torch.equal(second.tensors()[name], value), name
    assert first.round == second.round


@pytest.mark.parametrize("method", [*METHODS, Counting], ids=str)
def test_the_two_tables_give_the_same_bits_and_so_does_a_resumption(method: object, tmp_path: Path) -> None:
    worker, state, config = federation(method, tmp_path)
    other, expected, _ = federation(method, tmp_path / "memory", "memory")
    for round in range(4):
        result = run_round(worker, state, config, evaluate_all=True)
        wanted = run_round(other, expected, config, evaluate_all=True)
        assert np.array_equal(result.personalised.loss, wanted.personalised.loss)
        same(expected, state)
        if round == 1:
            save(tmp_path, worker, state, config)
            size = (tmp_path / checkpoint.CHECKPOINT).stat().st_size
    state.table.close()  # rounds 3 and 4 are lost
    worker, state, config = resumed(method, tmp_path)
    assert state.round == 2
    for _ in range(2):
        run_round(worker, state, config, evaluate_all=False)
    same(expected, state)
    save(tmp_path, worker, state, config)
    assert (tmp_path / checkpoint.CHECKPOINT).stat().st_size == size


def test_a_column_is_read_like_a_tensor(tmp_path: Path) -> None:
    worker, state, config = federation(Counting, tmp_path)
    run_round(worker, state, config, evaluate_all=False)
    column = state.client_state["count"]
    whole = column[:]
    assert (column.shape, len(column), column.dtype) == ((5, 2), 5, torch.float32)
    clients = sample_clients(config, 1)
    assert torch.equal(whole, torch.zeros(5, 2).index_fill(0, torch.tensor(clients), 1.0))
    for rows in (3, -1, slice(1, 4), [4, 0, 0], [], torch.tensor([2]), torch.tensor(2), np.int64(1)):
        assert torch.equal(column[rows], whole[rows]), rows
    assert torch.equal(torch.stack(list(column)), whole)
    column[0].add_(5)  # a copy
    assert torch.equal(column[:], whole)
    with pytest.raises(IndexError):
        column[5]


@pytest.mark.parametrize("batches", [0, 1, 3, 5])
def test_an_interrupted_round_leaves_the_last_finished_one(tmp_path: Path, batches: int) -> None:
    worker, state, config = federation("fedper", tmp_path, batch_size=64)
    run_round(worker, state, config, evaluate_all=False)
    before = {name: value.clone() for name, value in state.tensors().items()}
    count = iter(range(100))

    def poll() -> None:
        if next(count) == batches:
            raise InterruptedError

    worker.poll = poll
    with pytest.raises(InterruptedError):
        run_round(worker, state, config, evaluate_all=True)
    assert state.round == 1
    assert all(torch.equal(value, before[name]) for name, value in state.tensors().items())


def test_a_round_that_cannot_be_stored_never_happened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker, state, config = federation("fedper", tmp_path)
    run_round(worker, state, config, evaluate_all=False)
    save(tmp_path, worker, state, config)
    shared = state.server.shared.clone()
    personal = state.personal[:]
    with monkeypatch.context() as patch:
        patch.setattr("os.pwrite", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(OSError, match="No space left") as caught:
            run_round(worker, state, config, evaluate_all=False)
    assert caught.value.filename == str(tmp_path / TABLE)
    assert (state.round, state.server.shared.equal(shared)) == (1, True)
    state.table.close()
    assert torch.equal(resumed("fedper", tmp_path)[1].personal[:], personal)


def test_a_round_before_the_first_checkpoint_is_refused() -> None:
    worker, state, config = tiny.federation("fedper", table="disk", **OPTIONS)
    with pytest.raises(RuntimeError, match="save a checkpoint of the start first"):
        run_round(worker, state, config, evaluate_all=False)
    assert state.round == 0


_KILLED = """
import os, sys
from pathlib import Path
import torch
from fedperfix.engine.round import run_round
from fedperfix.run import checkpoint
from tests.fedperfix import tiny
from tests.fedperfix.test_table import OPTIONS, federation, resumed, save
torch.set_num_threads(1)

def play(worker, state, config, folder):
    while state.round < 5:
        run_round(worker, state, config, evaluate_all=False)
        if state.round % 2 == 0:
            save(folder, worker, state, config)

def die_at(step):
    left, calls = [step], {name: getattr(os, name) for name in ("pwrite", "fsync", "replace")}
    def counted(name):
        def call(*arguments):
            left[0] -= 1
            if left[0] < 0:
                if name == "pwrite":
                    calls[name](arguments[0], arguments[1][: len(arguments[1]) // 2], arguments[2])
                os._exit(9)
            return calls[name](*arguments)
        return call
    for name in calls:
        setattr(os, name, counted(name))

def child(work):
    process = os.fork()
    if process == 0:
        try:
            work()
        except BaseException as error:
            print(repr(error))
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])

def killed(folder, step):
    parts = federation("scaffold", folder)
    die_at(step)
    play(*parts, folder)

def finished(folder, expected):
    parts = resumed("scaffold", folder)
    print(folder.name, "resumed at", parts[1].round)
    play(*parts, folder)
    for name, value in parts[1].tensors().items():
        assert torch.equal(value, expected[name]), name

def main(root):
    torch.manual_seed(1)
    def whole():
        parts = federation("scaffold", root / "whole")
        play(*parts, root / "whole")
        from safetensors.torch import save_file
        save_file({name: value.contiguous() for name, value in parts[1].tensors().items()}, root / "expected")
    assert child(whole) == 0
    from safetensors.torch import load_file
    expected = load_file(root / "expected")
    for step in range(1000):
        folder = root / str(step)
        code = child(lambda: killed(folder, step))
        if code == 0:
            return step
        assert code == 9, code
        assert child(lambda: finished(folder, expected)) == 0, step
print("steps", main(Path(sys.argv[1])))
"""


@pytest.mark.slow
def test_a_process_that_ends_at_any_step_of_a_commit_or_a_checkpoint_loses_nothing(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", _KILLED, str(tmp_path)], capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, run.stdout + run.stderr
    # 5 rounds of 2 clients: a row and its entry each; 2 checkpoints: the table, the file, its name, the folder.
    assert run.stdout.splitlines()[-1] == f"steps {5 * 2 * 2 + 2 * 4}"


def refused(folder: Path, match: str, table: str = "disk", method: object = "fedper", **options: object) -> None:
    worker, state, config = tiny.federation(method, table=table, **(OPTIONS | options))
    before = state.server.shared.clone()
    with pytest.raises(checkpoint.CheckpointError, match=match) as caught:
        checkpoint.load(folder / checkpoint.CHECKPOINT, state, worker.arena, config)
    assert "\n" not in str(caught.value)
    assert torch.equal(state.server.shared, before)


def played(folder: Path, method: object = "fedper", table: str = "disk"):
    worker, state, config = federation(method, folder, table)
    for _ in range(2):
        run_round(worker, state, config, evaluate_all=False)
    save(folder, worker, state, config)
    if table == "disk":
        state.table.close()
    return worker, state, config


def test_a_checkpoint_and_a_table_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    a, b = tmp_path / "a", tmp_path / "b"
    played(a)
    worker, state, config = federation("fedper", b, seed=4)
    run_round(worker, state, config, evaluate_all=False)
    run_round(worker, state, config, evaluate_all=False)
    save(b, worker, state, config)
    state.table.close()
    own, foreign = (a / TABLE).read_bytes(), (b / TABLE).read_bytes()
    (a / TABLE).write_bytes(foreign)
    refused(a, "does not belong to the checkpoint beside it")
    (a / TABLE).write_bytes(own[:-1])
    refused(a, "is damaged: it has .* bytes instead of")
    (a / TABLE).unlink()
    refused(a, "there is no table")
    refused(a, "has its clients' rows on disk, in .*clients.table', which is missing", table="memory")
    played(tmp_path / "c", table="memory")
    refused(tmp_path / "c", "has its clients' rows in itself", table="disk")


def test_a_table_of_another_method_is_refused(tmp_path: Path) -> None:
    played(tmp_path)
    path = tmp_path / checkpoint.CHECKPOINT
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    worker, _, config = tiny.federation("local", table="disk", **OPTIONS)
    del metadata["checksum"]
    metadata["config"] = checkpoint.config_digest(config)
    tensors = {
        f"global.{name}": value for name, value in worker.arena.shared_layout.views(worker.arena.shared).items()
    }
    metadata["checksum"] = checksum(tensors, metadata)
    save_file(tensors, path, metadata)
    refused(tmp_path, "does not fit this model and method", method="local")


def test_any_clients_row_is_read_from_a_run_folder(tmp_path: Path) -> None:
    for method in ("fedper", "ditto", Counting, "fedavg"):
        folder = tmp_path / str(method)
        folder.mkdir()
        played(folder / "disk", method)
        _, _, config = played(folder / "memory", method, "memory")
        whole = load_file(folder / "memory" / checkpoint.CHECKPOINT)
        kept = {name: value for name, value in whole.items() if name.startswith(("personal.", "client."))}
        for client in range(config.clients):
            for kind in ("disk", "memory"):
                found = checkpoint.read_client(folder / kind, client)
                assert found.keys() == kept.keys()
                assert all(torch.equal(found[name], value[client]) for name, value in kept.items())
    for kind in ("disk", "memory"):
        with pytest.raises(checkpoint.CheckpointError, match="client: got 5, takes 0 to 4"):
            checkpoint.read_client(tmp_path / "fedper" / kind, 5)
    folder, client = tmp_path / "fedper" / "disk", sample_clients(config, 2)[0]
    row = checkpoint.read_client(folder, client)["personal.head.weight"].numpy().tobytes()
    data = (folder / TABLE).read_bytes()
    (folder / TABLE).write_bytes(data.replace(row, row[::-1]))
    with pytest.raises(checkpoint.CheckpointError, match="the row of client .* does not match its checksum"):
        checkpoint.read_client(folder, client)


def test_auto_takes_the_disk_when_the_rows_would_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    start = {"personal": torch.ones(1024)}
    layout = BlockLayout.of({"weight": torch.Size((1000,))})

    def chosen(clients: int) -> type:
        return type(make_table("auto", start, clients, layout, tiny.CPU))

    monkeypatch.setattr(tables, "host_memory", lambda: 4.0 * 4096 * 100)
    assert (chosen(100), chosen(101)) == (MemoryTable, DiskTable)
    monkeypatch.setattr(tables, "available", lambda: False)
    assert chosen(101) is MemoryTable
    with pytest.raises(ConfigError, match="--personal-table: got disk, takes memory on this system"):
        make_table("disk", start, 3, layout, tiny.CPU)
    assert tables.host_memory() > 0


def test_an_evaluation_of_some_clients_tests_new_ones_each_time(tmp_path: Path) -> None:
    worker, state, config = tiny.federation("fedper", eval_clients=3, protocol="both", **OPTIONS)
    whole_worker, whole, everyone = tiny.federation("fedper", protocol="both", **OPTIONS)
    chosen = []
    for round in (1, 2, 3):
        result = run_round(worker, state, config, evaluate_all=True)
        expected = run_round(whole_worker, whole, everyone, evaluate_all=True)
        chosen.append(tested_clients(config, round))
        for found, wanted in ((result.personalised, expected.personalised), (result.mixed, expected.mixed)):
            assert found.clients == tuple(chosen[-1])
            assert np.array_equal(found.loss, wanted.among(chosen[-1]).loss)
        record = RoundMetrics.of(result, 1.0)
        assert (record.tested_clients, record.headline_of, record.sampled_mean) == (3, "3 random", None)
        assert record.all_mean == result.personalised.spread().mean
        assert RoundMetrics.of(expected, 1.0).tested_clients is None
    same(whole, state)
    assert len({tuple(clients) for clients in chosen}) > 1
    assert json.loads(json.dumps(chosen)) == [sorted(set(clients)) for clients in chosen]
