"""The benchmark of many clients, with few of them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from bench import record, scaling
from bench.peers import __main__ as peers


@pytest.mark.parametrize("table", ["disk", "memory"])
def test_a_row_has_its_measurements(table: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "_WARM_UP", 1)
    monkeypatch.setattr(scaling, "_ROUNDS", 4)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    row = scaling.measure(12, table)
    torch.set_num_threads(threads)
    assert (row["clients"], row["table"]) == (12, table)
    assert 0 < row["seconds_round_fastest"] <= row["seconds_round"]
    assert row["seconds_checkpoint"] > 0
    assert row["data_bytes"] == 12 * scaling.IMAGES * scaling.SIDE**2
    assert (row["table_bytes_on_disk"] > 0) == (table == "disk")
    own = 12 * row["row_bytes"]
    assert (row["checkpoint_bytes"] > own) == (table == "memory")
    text = scaling.table_of({"rows": [row, {"clients": 9, "table": "memory", "skipped": "not enough memory"}]})
    assert f"| 12 | {table} |" in text
    assert "| 9 | memory | not enough memory |" in text


@pytest.mark.parametrize("module", [scaling, record, peers])
def test_a_record_that_cannot_be_written_is_refused_before_anything_is_measured(
    module, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "file").touch()
    option = "--out" if module is peers else "--output"
    for path, reason in ((tmp_path / "file" / "x.json", "cannot be written"), (tmp_path, "is a folder")):
        with pytest.raises(SystemExit) as ended:
            module.main([option, str(path)])
        assert ended.value.code == 2
        assert f"{option}: '{path}' {reason}" in capsys.readouterr().err


def test_fewer_clients_than_a_round_has_are_refused(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        scaling.main(["--clients", "100", "7"])
    assert "--clients: got 7, takes at least 8" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("has", "words"),
    [
        ({"amx_tile": True, "avx512_f": True}, " with AMX, "),
        ({"amx_tile": False, "avx512_f": False}, " without AVX-512, "),
        ({"avx512_f": True}, ", "),
        ({"neon": True}, ", "),
    ],
)
def test_processors_of_one_name_have_records_of_their_own(
    has: dict[str, bool], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    name = record.device_name(torch.device("cpu"))
    assert name.endswith(f"{words}{os.cpu_count()} cores")
    assert ("with" in name) == ("with" in words)
