"""`python -m bench.linear` prints a row for every layer, and refuses what it cannot do."""

from __future__ import annotations

import pytest
import torch

from bench import linear
from fedperfix_kernels.linear import onednn_obstacle, resolve_linear


@pytest.mark.skipif(bool(onednn_obstacle()), reason="this PyTorch has no oneDNN operator")
def test_every_layer_has_a_row(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "MODELS", {"small": (2, 3, ((4, 8), (8, 4)))})
    threads = torch.get_num_threads()
    try:
        assert linear.main(["--threads", "1", "--seconds", "0.01"]) == 0
    finally:
        torch.set_num_threads(threads)
    output = capsys.readouterr().out
    assert output.count("| small |") == 2
    assert output.count("GFLOP/s") == 4
    assert f"--linear auto takes {resolve_linear()} here." in output


@pytest.mark.parametrize("arguments", [["--threads", "0"], ["--seconds", "0"], ["--seconds", "nan"]])
def test_wrong_numbers_are_refused(arguments: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        linear.main(arguments)
    assert "takes a number of at least 1, --seconds one above 0" in capsys.readouterr().err


def test_it_is_refused_without_the_operator(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "onednn_obstacle", lambda: "this build has none")
    with pytest.raises(SystemExit):
        linear.main([])
    assert "this build has none" in capsys.readouterr().err
