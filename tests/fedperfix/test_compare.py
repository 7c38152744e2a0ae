"""Methods times seeds, and their table."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest
import torch

from fedperfix.compare import main
from fedperfix.data import DATASETS
from fedperfix.models import PRESETS
from fedperfix.run import metrics
from tests.fedperfix import tiny
from tests.fedperfix.test_train_cli import SMALL

OPTIONS = ["--methods", "fedavg", "local", "--seeds", "0", "3", "--out", "out", *SMALL, "--rounds", "2"]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setitem(DATASETS, "cifar10", lambda data_dir: tiny.dataset())
    monkeypatch.setitem(PRESETS, "tiny", {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2})
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_the_table_has_the_runs_figures_and_the_command() -> None:
    assert main(OPTIONS) == 0
    page = Path("out/README.md").read_text()
    for method in ("fedavg", "local"):
        values = [metrics.read(Path(f"out/{method}-seed{seed}"))[-1].all_mean for seed in (0, 3)]
        row = next(line for line in page.splitlines() if line.startswith(f"| {method} |"))
        assert f"**{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}**" in row
        assert f"{values[0]:.1f} / {values[1]:.1f}" in row
    assert "python -m fedperfix.compare " + " ".join(OPTIONS) in page
    assert f"PyTorch {torch.__version__.split('+')[0]}" in page


def test_finished_runs_are_kept_and_unfinished_ones_go_on(capsys: pytest.CaptureFixture) -> None:
    assert main(OPTIONS) == 0
    page = Path("out/README.md").read_text()
    untouched = Path("out/local-seed0/metrics.jsonl").stat().st_mtime_ns
    metrics.keep_rounds(Path("out/fedavg-seed3"), 1)
    assert main(OPTIONS) == 2  # its checkpoint is of round 2, so round 2 is missing
    assert "has not all of the rounds" in capsys.readouterr().err
    for file in Path("out/fedavg-seed3").iterdir():
        file.unlink()
    assert main(OPTIONS) == 0
    assert Path("out/local-seed0/metrics.jsonl").stat().st_mtime_ns == untouched

    def without_seconds(text: str) -> list[str]:
        return [line.rsplit("|", 2)[0] for line in text.splitlines()]

    assert without_seconds(Path("out/README.md").read_text()) == without_seconds(page)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--seed", "1"], "--seed: --methods, --seeds and --out say it"),
        (["--lr", "7"], "has a run with other options"),
        (["--lr", "-1"], "--lr: got -1"),
        (["--methods", "nothing"], "--methods: invalid choice: 'nothing'"),
    ],
)
def test_what_does_not_fit_is_one_sentence(options: list[str], sentence: str, capsys) -> None:
    assert main(OPTIONS) == 0
    capsys.readouterr()
    assert main([*OPTIONS, *options]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1
