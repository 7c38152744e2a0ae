"""The study files in experiments/: every run is valid, and its rows are called as the paper's figures are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

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
