"""The benchmark of many clients, with few of them."""

from __future__ import annotations

import pytest
import torch

from bench import scaling


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


def test_fewer_clients_than_a_round_has_are_refused(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        scaling.main(["--clients", "100", "7"])
    assert "--clients: got 7, takes at least 8" in capsys.readouterr().err
