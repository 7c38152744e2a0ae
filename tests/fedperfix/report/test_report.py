"""The report of runs whose figures are known."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedperfix.config import load
from fedperfix.report.__main__ import main
from fedperfix.report.plots import spread_out
from fedperfix.report.tables import Table
from tests.fedperfix.report.made import make_run

CURVES = {0: (None, 30.0, 41.0, 40.0), 1: (None, 30.0, 41.0, 44.0)}


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """Two methods with two seeds, one of them a second time with another learning rate, which is not finished."""
    out = tmp_path / "study"
    for seed, rounds in CURVES.items():
        costs = {"parameters_stored": 1_234_567, "parameters_sent_up": 1000, "flops_forward_per_image": 2.5e9}
        extra = {"all_auc": 75.0}
        make_run(out / f"p{seed}", [40, 50], method="fedperfix", seed=seed, rounds=rounds, costs=costs, extra=extra)
        make_run(out / f"a{seed}", [30, 20], method="fedavg", seed=seed, rounds=(*rounds[:-1], 20.0 + seed))
    make_run(out / "slow", [1, 2], method="fedavg", lr=0.5, rounds=(5.0, 6.0))
    config = (out / "slow/config.toml").read_text().replace("rounds = 2", "rounds = 9")
    (out / "slow/config.toml").write_text(config)
    make_run(out / "young", [], method="local", rounds=(None,))
    runs = {"p0": {"row": "fedperfix"}, "p1": {"row": "fedperfix"}, "missing": {"row": "fedavg"}}
    (out / "study.json").write_text(json.dumps({"title": "A study", "commands": ["the command"], "runs": runs}))
    return out


def row(page: str, name: str) -> list[str]:
    line = next(line for line in page.splitlines() if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_page_has_the_runs_figures(study: Path, capsys) -> None:
    assert main([str(study)]) == 0
    page = (study / "report/README.md").read_text()
    assert "# A study" in page
    # mean of 40 and 44; t(0.975, 1 df) = 12.7062 times a standard error of 2
    assert row(page, "fedperfix")[:3] == ["fedperfix", "2", "**42.00 ± 25.41**"]
    assert row(page, "fedperfix")[3:] == ["4.00", "5.00", "75.00", "50.00", "42.50 (3, 4)"]
    assert row(page, "fedavg, lr 0.001")[2] == "20.50 ± 6.35"
    assert row(page, "fedavg, lr 0.5 *")[:3] == ["fedavg, lr 0.5 *", "1", "6.00"]
    assert "slow (2 of 9)" in page
    assert f"- {study / 'young'}: no evaluation over all clients yet" in page
    assert f"- {study / 'missing'}: not started" in page
    costs = page[page.index("## Costs") :]
    assert row(costs, "fedperfix")[1:] == ["1,234,567", "1,000", "6.00", "2.50", "16"]
    assert row(costs, "fedavg, lr 0.5")[1:] == ["–", "–", "6.00", "–", "8"]
    assert "fedavg, lr 0.001 | +20.00 | 100 % | 4 |" in page  # the slow run has other rounds: not paired
    assert "fedavg, lr 0.5 | +" not in page
    for fact in ("the command", "a device, 2 processors", "2026-01-02", "torch 2.15.0", "60 images for training"):
        assert fact in page


def test_records_make_the_same_tables_and_hold_no_path_of_the_machine(study: Path, tmp_path: Path) -> None:
    config = study / "p0/config.toml"
    config.write_text(config.read_text() + 'data_dir = "/somewhere/private/photos.npz"\n')
    (study / "p0/checkpoint.safetensors").write_bytes(b"large")
    out = tmp_path / "published"
    assert main([str(study), "--out", str(out), "--records"]) == 0
    records = out / "records"
    assert {item.name for item in records.iterdir()} == {"study.json", "p0", "p1", "a0", "a1", "slow"}
    kept = {"config.toml", "metrics.jsonl", "clients.csv", "environment.json", "costs.json"}
    assert {item.name for item in (records / "p0").iterdir()} == kept
    assert load(records / "p0/config.toml").data_dir == "photos.npz"
    assert main([str(records), "--out", str(tmp_path / "again")]) == 0
    for name in ("accuracy.csv", "tests.csv"):
        assert (tmp_path / "again" / name).read_text() == (out / name).read_text()


def test_records_are_of_one_study(study: Path, capsys) -> None:
    assert main([str(study), str(study), "--records"]) == 2
    assert "--records: got 2 folders, takes one study" in capsys.readouterr().err


def test_tables_in_csv_and_latex(study: Path) -> None:
    assert main([str(study), "--out", str(study / "here")]) == 0
    with open(study / "here/accuracy.csv", newline="") as file:
        first = {line["row"]: line for line in csv.DictReader(file)}["fedperfix"]
    assert float(first["accuracy"]) == 42.0
    assert float(first["accuracy_ci95"]) == pytest.approx(25.4124, abs=1e-4)
    assert (first["best_rounds"], first["f1"], float(first["bytes_per_round"])) == ("3 4", "", 6e6)
    latex = (study / "here/accuracy.tex").read_text()
    assert r"\textbf{42.00 $\pm$ 25.41}" in latex
    assert r"worst 10 \%" in latex
    assert Table(("a_b", "c"), (("1", "2|3"),)).markdown() == "| a_b | c |\n| --- | ---: |\n| 1 | 2\\|3 |\n"
    assert r"a\_b & c \\" in Table(("a_b", "c"), ()).latex()


def test_the_plots_are_small_and_not_empty(study: Path) -> None:
    main([str(study)])
    for name in ("curves", "bytes", "seconds", "gains"):
        path = study / f"report/{name}.png"
        assert path.stat().st_size < 150_000
        colours = np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3)
        assert (np.abs(colours.astype(int) - (0, 0x72, 0xB2)).max(1) < 8).sum() > 50  # the reference's blue
        assert f"![{name}]({name}.png)" in (study / "report/README.md").read_text()


def test_published_figures_stand_beside_and_rows_without_ours_are_listed(study: Path, tmp_path: Path) -> None:
    (tmp_path / "paper.toml").write_text("source = 'x'\n[table]\nfedperfix = [48.1, 7.76]\nfedrep = 44.4\n")
    assert main([str(study), "--published", f"{tmp_path / 'paper.toml'}:table"]) == 0
    page = (study / "report/README.md").read_text()
    assert row(page, "fedperfix")[3] == "48.10"
    assert row(page, "fedrep") == ["fedrep", "–", "–", "44.40", "–", "–", "–", "–", "–"]
    assert "Rows with a dash are not measured here" in page


def test_the_authors_protocol_and_domains(tmp_path: Path) -> None:
    columns = {
        f"mixed_{name}": value for name, value in (("mean", 70.0), ("std", 1.0), ("worst", 2.0), ("weighted", 3.0))
    }
    both = make_run(tmp_path / "both", [40, 50, 60], method="fedper", extra=columns)
    made = make_run(tmp_path / "authors", [40, 50, 60], rounds=(None, None), extra=columns)
    for folder in (both, made):
        lines = (folder / "clients.csv").read_text().splitlines()
        domains = ["domain", "art", "photo", "photo"]
        (folder / "clients.csv").write_text("\n".join(map(",".join, zip(lines, domains, strict=True))) + "\n")
    assert main([str(tmp_path)]) == 0
    page = (tmp_path / "report/README.md").read_text()
    assert row(page, "fedavg")[2:5] == ["70.00", "1.00", "2.00"]
    assert row(page, "fedper")[2] == "**20.00**"  # the one above was tested in another way
    assert row(page, "fedper")[5] == "70.00"
    assert "but fedavg tested as the authors' released code does" in page
    by_domain = page[page.index("## By domain") :]
    assert "| method | art | photo |" in by_domain
    assert row(by_domain, "fedper") == ["fedper", "40.00", "55.00"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["nowhere"], "DIR: there is no folder 'nowhere'"),
        (["empty"], "DIR: 'empty' has no run in it"),
        (["study", "--reference", "fedperfx"], "--reference: got 'fedperfx', takes one of fedperfix;"),
        (["study", "--out", "mine"], "--out: 'mine/README.md' is not a report of this program"),
        (["study", "--published", "paper"], "--published: got 'paper', takes FILE.toml:TABLE or paper:TABLE"),
        (["study", "--published", "no.toml:t"], "--published: cannot read 'no.toml'"),
        (["study", "--published", "p.toml:t"], "--published: 'p.toml' has no table 't', takes one of u"),
        (["young"], "no run in 'young' has an evaluation yet"),
        ([], "the following arguments are required: DIR"),
    ],
)
def test_what_does_not_fit_is_one_sentence(options, sentence, study: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(study.parent)
    Path("empty").mkdir()
    Path("mine").mkdir()
    Path("mine/README.md").write_text("my own\n")
    Path("p.toml").write_text("[u]\na = 1\n")
    make_run(Path("young/run"), [], rounds=(None,))
    assert main(options) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1
    assert Path("mine/README.md").read_text() == "my own\n"


def test_the_highest_is_among_rows_with_the_same_seeds_and_rounds(tmp_path: Path) -> None:
    for seed in (0, 1):
        make_run(tmp_path / f"b{seed}", [30], method="fedavg", seed=seed, rounds=(30.0,))
        make_run(tmp_path / f"c{seed}", [40], method="fedper", seed=seed, rounds=(40.0,))
        make_run(tmp_path / f"d{seed}", [90], method="local", seed=seed, rounds=(50.0, 90.0))
    make_run(tmp_path / "a", [80], method="fedperfix", rounds=(80.0,))
    assert main([str(tmp_path)]) == 0
    page = (tmp_path / "report/README.md").read_text()
    bold = [line for line in page.splitlines() if "**" in line]
    assert len(bold) == 1
    assert bold[0].startswith("| fedper | 2 | **40.00")


def test_each_reference_is_compared_with_the_rows_of_as_many_rounds(tmp_path: Path) -> None:
    for name, rounds in (("short", (10.0,)), ("long", (10.0, 20.0))):
        runs = {}
        for method, accuracy in (("fedavg", 20.0), ("fedper", 30.0)):
            make_run(tmp_path / f"{method}-{name}", [accuracy, accuracy + 2], method=method, rounds=rounds)
            runs[f"{method}-{name}"] = {"row": f"{method}-{name}"}
        known = json.loads((tmp_path / "study.json").read_text())["runs"] if name == "long" else {}
        (tmp_path / "study.json").write_text(json.dumps({"runs": known | runs}))
    assert main([str(tmp_path), "--reference", "fedper-short", "--reference", "fedper-long"]) == 0
    page = (tmp_path / "report/README.md").read_text()
    for name in ("short", "long"):
        part = page[page.index(f"## fedper-{name} against the others") :]
        assert row(part, f"fedavg-{name}")[1] == "+10.00"
    assert (tmp_path / "report/tests-2.tex").exists()
    assert (tmp_path / "report/tests.csv").read_text().count("fedavg-") == 2


def test_settings_that_most_rows_have_and_those_of_a_row(tmp_path: Path) -> None:
    make_run(tmp_path / "a", [30], method="fedperfix", lr=0.5, gate=3.0, apfl_alpha=0.9)
    make_run(tmp_path / "b", [30], method="fedavg", lr=0.5, partition="domains", apfl_alpha=0.9)
    make_run(tmp_path / "c", [30], method="apfl", lr=0.5, partition="domains", apfl_alpha=0.9)
    make_run(tmp_path / "d", [30], method="fedper", lr=0.25, partition="domains")
    assert main([str(tmp_path)]) == 0
    page = (tmp_path / "report/README.md").read_text()
    (common,) = [line for line in page.splitlines() if line.startswith("- Settings, where a row has none")]
    assert "lr 0.5, " in common
    assert "partition domains" in common
    assert "apfl_alpha" not in common  # of another method than most
    assert "alpha 0.1" not in common  # which this partition does not read
    own = page[page.index("Settings that a row has by itself") :]
    assert row(own, "fedperfix")[1] == "gate 3, partition dirichlet"
    assert row(own, "apfl")[1] == "apfl_alpha 0.9"
    assert row(own, "fedper")[1] == "lr 0.25"
    assert "| fedavg |" not in own


def test_versions_that_differ_are_named_with_their_rows(tmp_path: Path) -> None:
    for name, method in (("a", "fedavg"), ("b", "fedper")):
        make_run(tmp_path / name, [30], method=method)
    assert main([str(tmp_path)]) == 0
    assert (
        "- Versions: fedperfix 0.1.0, python 3.11.7, torch 2.15.0." in (tmp_path / "report/README.md").read_text()
    )
    path = tmp_path / "b/environment.json"
    path.write_text(path.read_text().replace("2.15.0", "2.14.1"))
    assert main([str(tmp_path)]) == 0
    page = (tmp_path / "report/README.md").read_text()
    assert "- Versions differ" in page
    assert "  - fedperfix 0.1.0, python 3.11.7, torch 2.14.1: fedper" in page


def test_clients_drawn_at_random_are_not_called_all(tmp_path: Path) -> None:
    make_run(tmp_path / "a", [30], extra={"tested_clients": 7, "all_auc_clients": 5})
    make_run(tmp_path / "b", [30], method="fedper", extra={"tested_clients": 7, "all_auc_clients": 6})
    assert main([str(tmp_path)]) == 0
    page = (tmp_path / "report/README.md").read_text()
    assert "in the last evaluated round over 7 clients drawn at random, each" in page
    assert "of the 5 to 6 clients with test images of several classes" in page


DAMAGED = {
    "metrics.jsonl": ('{"round": 1\n', "[1]\n", '{"round": 1}\n', "3\n"),
    "clients.csv": ("client,accuracy\n0,1\n", "client,train_images,test_images,accuracy\n0,1\n"),
    "environment.json": ("[", "{}x", '[{"time": 3}]'),
    "costs.json": ("{", "3"),
    "config.toml": (b"\xff", "rounds = "),
}


@pytest.mark.parametrize(("name", "content"), [(name, text) for name, texts in DAMAGED.items() for text in texts])
def test_a_damaged_file_of_a_run_is_named(name: str, content: str | bytes, study: Path, capsys) -> None:
    path = study / "p0" / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert main([str(study)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert str(path) in error


@pytest.mark.parametrize("content", ["{", "[]", '{"runs": []}', '{"runs": {"p0": 1}}'])
def test_a_damaged_list_of_the_runs_is_named(content: str, study: Path, capsys) -> None:
    (study / "study.json").write_text(content)
    assert main([str(study)]) == 2
    assert f"'{study / 'study.json'}' is damaged; remove it" in capsys.readouterr().err


@pytest.mark.parametrize("value", ['"much"', "[]", "true", '["a"]', "{}"])
def test_published_figures_are_numbers(value: str, study: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "mine.toml").write_text(f"[table]\nfedavg = {value}\n")
    assert main([str(study), "--published", f"{tmp_path / 'mine.toml'}:table"]) == 2
    assert "--published: 'fedavg' of table 'table' is" in capsys.readouterr().err


def test_labels_are_moved_apart_and_stay_in_order() -> None:
    assert spread_out([1.0, 5.0], 1.0) == [1.0, 5.0]
    assert spread_out([2.0, 2.0, 2.0], 1.0) == [1.0, 2.0, 3.0]
    places = spread_out([0.0, 0.1, 1.2, 9.0], 1.0)
    assert places == sorted(places)
    assert min(np.diff(places)) >= 1 - 1e-9
    assert places[-1] == 9.0
