"""The file of clients' rows, against a model of it in which nothing is ever overwritten."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fedperfix.run import slots
from fedperfix.run.slots import SlotFile, TableError

CLIENTS, SIZE = 5, 5000


def start(size: int = SIZE) -> np.ndarray:
    return np.full(size, 7, np.uint8)


def create(folder: Path, clients: int = CLIENTS, size: int = SIZE) -> SlotFile:
    table = SlotFile.create(folder / slots.TABLE, clients, start(size), {"columns": {}})
    table.seal(0)
    return table


class Reckless(Exception):
    """Stands for the end of the process in the middle of a write."""


class History:
    """Every row of every round: what a file that keeps everything would hold."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, int, np.ndarray]] = []

    def row(self, client: int, round: int) -> np.ndarray:
        found = [row for of, written, row in self.rows if of == client and written <= round]
        return found[-1] if found else start()

    def cut(self, round: int) -> None:
        self.rows = [entry for entry in self.rows if entry[1] <= round]


@pytest.mark.parametrize("seed", range(12))
def test_any_sequence_of_rounds_checkpoints_and_crashes_gives_the_rows_of_the_checkpoint(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = np.random.default_rng(seed)
    table, history = create(tmp_path), History()
    seal, durable, round = table.seal(0), 0, 0
    write = os.pwrite
    for _ in range(60):
        action = generator.choice(["round", "round", "round", "checkpoint", "crash", "torn"])
        if action in ("round", "torn"):
            chosen = generator.choice(CLIENTS, generator.integers(1, CLIENTS + 1), replace=False).tolist()
            rows = {client: generator.integers(0, 256, SIZE, dtype=np.uint8) for client in chosen}
            round += 1
            if action == "round":
                table.write(round, rows)
                history.rows += [(client, round, row) for client, row in rows.items()]
        elif action == "checkpoint":
            seal, durable = table.seal(round), round
            table.checkpointed(round)
        if action == "torn":  # some writes happen, one of them in part, then the process ends
            left = int(generator.integers(0, 2 * len(rows)))

            def torn(handle: int, data, place: int, left: list[int] = [left]) -> int:  # noqa: B006
                left[0] -= 1
                if left[0] < 0:
                    write(handle, data[: len(data) // 3], place)
                    raise Reckless
                return write(handle, data, place)

            with monkeypatch.context() as patch:
                patch.setattr(os, "pwrite", torn)
                with pytest.raises(Reckless):
                    table.write(round, rows)
            with pytest.raises(OSError, match="an earlier write to it failed"):
                table.read_row(0)
        if action in ("torn", "crash"):
            table.close()
            table = SlotFile.open(tmp_path / slots.TABLE, durable, seal, write=True)
            round = durable
            history.cut(durable)
        for client in range(CLIENTS):
            assert np.array_equal(table.read_row(client), history.row(client, round)), (seed, action, client)
    # Beside the writer, a reader sees the checkpoint.
    reader = SlotFile.open(tmp_path / slots.TABLE, durable, seal, write=False)
    for client in range(CLIENTS):
        assert np.array_equal(reader.read_row(client), history.row(client, durable))


def test_a_row_of_a_life_before_the_resumption_never_comes_back(tmp_path: Path) -> None:
    table = create(tmp_path)
    seal = table.seal(0)
    table.write(3, {1: start() + 1})
    table.close()
    table = SlotFile.open(tmp_path / slots.TABLE, 0, seal, write=True)
    table.write(1, {0: start() + 2})  # the second time, client 1 takes no part
    seal = table.seal(5)
    table.checkpointed(5)
    table.close()
    table = SlotFile.open(tmp_path / slots.TABLE, 5, seal, write=True)
    assert np.array_equal(table.read_row(1), start())
    assert np.array_equal(table.read_row(0), start() + 2)


def test_parts_of_rows_and_rows_of_no_bytes(tmp_path: Path) -> None:
    table = create(tmp_path)
    row = np.arange(SIZE).astype(np.uint8)
    table.write(1, {2: row})
    part = np.empty(11, np.uint8)
    table.read(2, 4093, part)
    assert np.array_equal(part, row[4093:4104])
    (tmp_path / "empty").mkdir()
    empty = create(tmp_path / "empty", size=0)
    empty.write(1, {0: np.empty(0, np.uint8)})
    assert len(empty.read_row(0)) == 0


def test_clients_that_never_took_part_take_no_space(tmp_path: Path) -> None:
    table = create(tmp_path, clients=10_000, size=100_000)
    table.write(1, {9_999: np.ones(100_000, np.uint8), 3: np.ones(100_000, np.uint8)})
    table.seal(1)
    taken = os.stat(tmp_path / slots.TABLE).st_blocks * 512
    assert os.stat(tmp_path / slots.TABLE).st_size > 2e9
    assert taken < 2e6


def sealed(folder: Path) -> tuple[Path, str]:
    table = create(folder)
    table.write(1, {2: start() + 1})
    seal = table.seal(1)
    table.close()
    return folder / slots.TABLE, seal


def refused(path: Path, seal: str, match: str, round: int = 1) -> None:
    with pytest.raises(TableError, match=match) as caught:
        SlotFile.open(path, round, seal, write=True)
    assert "\n" not in str(caught.value)


def change(path: Path, place: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(place)
        file.write(data)


def test_truncated_foreign_and_other_files_are_refused(tmp_path: Path) -> None:
    path, seal = sealed(tmp_path)
    whole = path.read_bytes()
    for size in (10, 35, len(slots.FORMAT) + 16, 50, 4096, len(whole) - 1):
        path.write_bytes(whole[:size])
        refused(path, seal, "is not a table of this program|is damaged: it ends in its header|bytes instead of")
    path.write_bytes(b"hello" * 9999)
    refused(path, seal, "is not a table of this program")
    path.write_bytes(whole)
    change(path, len(slots.FORMAT), b"\2")
    refused(path, seal, "has table version 2, this program reads 1; use the version of fedperfix that wrote it")
    path.unlink()
    refused(path, seal, "there is no table")


def test_every_changed_byte_that_matters_is_found(tmp_path: Path) -> None:
    path, seal = sealed(tmp_path)
    whole = path.read_bytes()
    rows = whole.index(bytes(start() + 1))
    entries = whole.index(np.array(1, "<i8").tobytes(), 4096 * 2)
    places = {
        "its header cannot be read|does not belong": len(slots.FORMAT) + 16,
        "its start row does not match": 4096,
        "does not belong to the checkpoint beside it": entries,
        "the row of client 2 does not match its checksum": rows + 4999,
        "the row of client 2 .*": rows,
    }
    for match, place in places.items():
        change(path, place, bytes([whole[place] ^ 1]))
        refused(path, seal, match)
        path.write_bytes(whole)
    SlotFile.open(path, 1, seal, write=True).close()


def test_a_table_of_another_run_or_of_an_older_checkpoint_is_refused(tmp_path: Path) -> None:
    path, seal = sealed(tmp_path)
    refused(path, seal, "does not belong to the checkpoint beside it", round=0)
    older = path.read_bytes()
    table = SlotFile.open(path, 1, seal, write=True)
    table.write(2, {0: start()})
    newer = table.seal(2)
    table.close()
    path.write_bytes(older)
    refused(path, newer, "does not belong to the checkpoint beside it", round=2)


def test_an_existing_file_is_not_overwritten_and_one_process_writes(tmp_path: Path) -> None:
    table = create(tmp_path)
    with pytest.raises(FileExistsError):
        create(tmp_path)
    with pytest.raises(OSError, match="another process is writing to it"):
        SlotFile.open(tmp_path / slots.TABLE, 0, table.seal(0), write=True)


def test_a_folder_in_which_nothing_can_be_written_gets_nothing(tmp_path: Path, monkeypatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            create(tmp_path)
    assert os.listdir(tmp_path) == []


_LIMITED = """
import resource, signal, sys
from pathlib import Path
import numpy as np
from fedperfix.run.slots import SlotFile
path, seal, limit = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
table = SlotFile.open(path, 1, seal, write=True)
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    table.write(2, {client: np.full(5000, 90 + client, np.uint8) for client in range(5)})
except OSError as error:
    print(error)
    sys.exit(7)
"""


def test_a_write_beyond_the_limit_of_file_sizes_loses_nothing(tmp_path: Path) -> None:
    path, seal = sealed(tmp_path)
    limit = os.stat(path).st_size - 3 * 8192 - 100  # in the middle of a row of client 3
    run = subprocess.run(
        [sys.executable, "-c", _LIMITED, str(path), seal, str(limit)],
        capture_output=True,
        text=True,
        cwd=os.getcwd(),
    )
    assert (run.returncode, run.stderr) == (7, "")
    assert "File too large" in run.stdout
    table = SlotFile.open(path, 1, seal, write=True)
    for client in range(CLIENTS):
        assert np.array_equal(table.read_row(client), start() + (client == 2))
