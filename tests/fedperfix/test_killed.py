"""A run that is killed, 20 times at random moments, and resumed has the result of one that was left alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fedperfix.run.checkpoint import CHECKPOINT, read_client
from tests.fedperfix.killed import KILLS, ROUNDS
from tests.fedperfix.test_train_cli import ROOT, SMALL, curves

CLIENTS = 3


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize(("method", "table"), [("fedperfix", "memory"), ("scaffold", "disk")])
def test_a_run_killed_at_20_random_moments_loses_nothing(method: str, table: str, tmp_path: Path) -> None:
    options = [*SMALL, "--rounds", str(ROUNDS), "--method", method, "--optimizer", "sgd", "--personal-table", table]
    command = [sys.executable, "-m", "tests.fedperfix.killed", str(tmp_path), *options, "--checkpoint-every", "1"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout + run.stderr
    assert int(run.stdout.split()[0]) > KILLS / 2  # most of them found a run that had begun

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert curves(killed) == curves(whole)
    assert len(curves(whole)) == ROUNDS
    assert (killed / "clients.csv").read_bytes() == (whole / "clients.csv").read_bytes()
    expected, found = load_file(whole / CHECKPOINT), load_file(killed / CHECKPOINT)
    assert expected.keys() == found.keys()
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
    for client in range(CLIENTS):
        kept, other = read_client(whole, client), read_client(killed, client)
        assert kept
        assert all(torch.equal(value, other[name]) for name, value in kept.items())
    left = {path.name for path in killed.iterdir()} ^ {path.name for path in whole.iterdir()}
    assert not left
