"""A run of 200 rounds needs no more memory at its end than after its warm-up."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROUNDS, WARM_UP, LIMIT = 200, 30, 0.02

_RUN = """
import json, sys
import torch
import fedperfix.train as train
from bench.scaling import resident_bytes
from fedperfix.data import DATASETS
from fedperfix.models import PRESETS
from tests.fedperfix import tiny
torch.set_num_threads(int(sys.argv[1]))
DATASETS["cifar10"] = lambda data_dir: tiny.dataset(2000)
PRESETS["tiny"] = {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
resident = []
append = train.metrics.append
def measured(*arguments):
    append(*arguments)
    resident.append(resident_bytes())
train.metrics.append = measured
assert train.main(sys.argv[2:]) == 0
print(json.dumps(resident))
"""


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("threads", [1, 2], ids=["one at a time", "side by side"])
@pytest.mark.parametrize("table", ["disk", "memory"])
@pytest.mark.parametrize("method", ["fedperfix", "scaffold"])
def test_resident_memory_is_flat(table: str, method: str, threads: int, tmp_path: Path) -> None:
    options = {
        "--dataset": "cifar10",
        "--model": "tiny",
        "--method": method,
        "--optimizer": "sgd",
        "--clients": "64",
        "--sampled": "8",
        "--partition": "iid",
        "--local-steps": "1",
        "--rounds": str(ROUNDS),
        "--device": "cpu",
        "--precision": "fp32",
        "--personal-table": table,
        "--run-dir": str(tmp_path / "run"),
    }
    command = [sys.executable, "-c", _RUN, str(threads), *(word for option in options.items() for word in option)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    resident = json.loads(run.stdout.splitlines()[-1])
    assert len(resident) == ROUNDS
    assert ("2 clients at a time" in run.stdout) == (threads == 2)
    settled = resident[WARM_UP:]
    growth = max(settled) / min(settled) - 1
    span = f"{min(settled) / 1e6:.1f} to {max(settled) / 1e6:.1f} MB, {100 * growth:.2f} %"
    print(f"{method}, {table}, {threads} at a time: {span}")
    assert growth <= LIMIT
