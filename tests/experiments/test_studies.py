"""The study files in experiments/: every run is valid, and its rows are called as the paper's figures are."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fedperfix.data.partition.dirichlet import dirichlet_partition
from fedperfix.report import layers
from fedperfix.report.__main__ import read_published
from fedperfix.report.runs import by_row, read_runs
from fedperfix.sweep import read_command
from tests.fedperfix.report.made import make_run

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
TABLES = sorted(path.stem for path in EXPERIMENTS.glob("table*.toml") if path.stem != "table1")
NINE = {
    "fedavg", "local", "apfl", "per-fedavg", "fedbn", "fedbabu", "fedrep", "vanilla-attention", "fedperfix"
}  # fmt: skip


@pytest.mark.parametrize("path", sorted(EXPERIMENTS.glob("*-cpu.toml")), ids=lambda path: path.stem)
def test_the_studies_for_a_processor(path: Path) -> None:
    rows = layers.ROWS if path.stem == "sensitivity-cpu" else None
    runs = read_command([str(path), "--data-dir", "file.npz"], methods=rows)[0].runs()
    assert {run.config.device for run in runs} == {"cpu"}
    if path.stem != "sensitivity-cpu":
        assert {run.row for run in runs if run.config.seed == 2} == NINE
        assert {run.row for run in runs if run.config.seed == 0} > NINE
    first = read_command([str(path), "--config", str(EXPERIMENTS / "cpu-subset.toml")], methods=rows)[0].runs()[0]
    assert first.config.image_size == 32


@pytest.mark.parametrize("table", TABLES)
def test_a_tables_rows_are_called_as_its_published_figures(table: str, tmp_path: Path) -> None:
    runs = read_command([str(EXPERIMENTS / f"{table}.toml"), "--data-dir", "folder"])[0].runs()
    for run in runs:
        changed = {name: value for name, value in vars(run.config).items() if name != "rounds"}
        make_run(tmp_path / run.name, [1.0], rounds=(1.0,), **changed)
    (tmp_path / "study.json").write_text(json.dumps({"runs": {run.name: {"row": run.row} for run in runs}}))
    assert set(by_row(read_runs([tmp_path])[0])) == set(read_published(f"paper:{table}"))
    assert {run.config.rounds for run in runs} == {50}
    assert {run.config.lr for run in runs if run.config.method == "per-fedavg"} <= {0.001}


def test_the_released_codes_settings_are_each_methods_own() -> None:
    runs = read_command([str(EXPERIMENTS / "authors-cifar100.toml"), "--data-dir", "folder"])[0].runs()
    found = {run.row: run.config for run in runs}
    assert set(found) == NINE - {"fedrep"} | {"fedper"}
    assert [row for row, config in found.items() if config.local_modules] == ["fedperfix"]
    assert {(config.alpha, config.rounds, config.protocol) for config in found.values()} == {(0.5, 50, "both")}


@pytest.mark.parametrize("table", [table for table in TABLES if table != "table5"])
def test_every_table_has_a_division_on_a_processor(table: str) -> None:
    """Of 12,000 images of 100 classes, as CIFAR-100's are; what takes another data set says so by its options."""
    options = [str(EXPERIMENTS / f"{table}.toml"), "--config", str(EXPERIMENTS / "cpu-subset.toml")]
    runs = read_command([*options, "--data-dir", "folder"])[0].runs()
    labels = np.arange(12_000) % 100
    for clients, alpha, smallest in {(r.config.clients, r.config.alpha, r.config.min_client_size) for r in runs}:
        parts = dirichlet_partition(labels, clients, alpha, smallest, seed=0)
        assert min(map(len, parts)) >= (smallest or 2)
