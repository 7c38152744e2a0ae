"""Spread over clients, the metrics files, the plot and the progress display."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from rich.console import Console

from fedperfix.engine.evaluate import Evaluation
from fedperfix.engine.round import run_round
from fedperfix.run import metrics
from fedperfix.run.metrics import RoundMetrics
from fedperfix.run.plots import draw_bars, plot_run
from fedperfix.run.progress import display, summary
from tests.fedperfix import tiny


def tested(correct: list[int], images: list[int]) -> Evaluation:
    n = len(correct)
    auc, f1 = np.array([50.0 + 10 * i for i in range(n)]), np.array([20.0 + i for i in range(n)])
    auc[-1] = np.nan
    return Evaluation(tuple(range(n)), np.arange(n, dtype=float), np.array(correct), np.array(images), auc, f1)


def played(rounds: int = 3) -> list[RoundMetrics]:
    worker, state, config = tiny.federation("fedper")
    return [
        RoundMetrics.of(run_round(worker, state, config, evaluate_all=round % 2 == 1), 2.0)
        for round in range(rounds)
    ]


@pytest.mark.parametrize(("clients", "bars"), [(500, 500), (501, 0)])
def test_bars_of_very_many_clients_are_drawn_as_one_outline(clients: int, bars: int) -> None:
    axes = Figure().subplots()
    bottom = np.full(clients, 2.0)
    draw_bars(axes, range(clients), np.arange(clients) % 7, bottom, color="red")
    assert len(axes.patches) == bars
    assert len(axes.collections) == (bars == 0)
    assert axes.dataLim.bounds[1:2] + axes.dataLim.bounds[3:] == (2.0, 6.0)


def test_the_spread_is_what_its_names_say() -> None:
    spread = tested([1, 8, 5], [10, 10, 20]).spread()
    accuracies = np.array([10.0, 80.0, 25.0])
    assert spread.mean == pytest.approx(accuracies.mean())
    assert spread.std == pytest.approx(np.sqrt(((accuracies - accuracies.mean()) ** 2).mean()))
    assert spread.worst == pytest.approx(10.0)
    assert spread.weighted == pytest.approx(100 * 14 / 40)
    assert (spread.auc, spread.auc_clients) == (pytest.approx(55.0), 2)
    assert spread.f1 == pytest.approx(21.0)


def test_without_any_area_under_the_curve_there_is_none() -> None:
    spread = tested([1], [10]).spread()
    assert (spread.auc, spread.auc_clients) == (None, 0)


@pytest.mark.parametrize(("clients", "worst"), [(1, 1), (9, 1), (19, 1), (20, 2), (64, 6)])
def test_the_worst_tenth_is_at_least_one_client(clients: int, worst: int) -> None:
    correct = list(range(clients))[::-1]
    expected = 100 * np.mean(range(worst)) / 100
    assert tested(correct, [100] * clients).spread().worst == pytest.approx(expected)


def test_some_of_the_tested_clients() -> None:
    some = tested([1, 8, 5], [10, 10, 20]).among((2, 0))
    assert some.accuracy.tolist() == [25.0, 10.0]
    assert some.mean_loss == pytest.approx((2 + 0) / 30)
    assert some.f1.tolist() == [22.0, 20.0]
    together = some.with_others(tested([1, 8, 5], [10, 10, 20]).among((1,)))
    assert together.clients == (0, 1, 2)
    assert together.accuracy.tolist() == [10.0, 80.0, 25.0]


def test_a_record_has_the_rounds_figures() -> None:
    worker, state, config = tiny.federation("fedper")
    result = run_round(worker, state, config, evaluate_all=True)
    record = RoundMetrics.of(result, 2.0)
    assert (record.round, record.sampled, record.dropped, record.dropped_clients) == (1, 2, 0, "")
    assert record.local_mean == result.local.spread().mean
    assert record.all_worst == result.personalised.spread().worst
    assert record.sampled_mean == result.personalised.among(result.sampled).spread().mean
    assert record.images == sum(len(worker.data.train[client]) for client in result.sampled)
    parts = record.seconds_train + record.seconds_aggregate + record.seconds_evaluate + record.seconds_other
    assert parts == pytest.approx(2.0, abs=1e-5)
    assert record.images_per_second == pytest.approx(record.images / record.seconds_train, rel=0.01)


def test_both_files_have_every_round_and_read_back_exactly(tmp_path: Path) -> None:
    records = [replace(record, dropped_clients="3 5") for record in played()]
    for record in records:
        metrics.append(tmp_path, record)
    assert metrics.read(tmp_path) == records
    rows = list(csv.DictReader(io.StringIO((tmp_path / metrics.CSV).read_text())))
    assert [row["round"] for row in rows] == ["1", "2", "3"]
    assert float(rows[1]["all_mean"]) == records[1].all_mean
    assert rows[0]["all_mean"] == ""
    assert rows[0]["dropped_clients"] == "3 5"


def test_infinite_losses_are_written_as_null(tmp_path: Path) -> None:
    worker, state, config = tiny.federation()
    result = replace(run_round(worker, state, config, evaluate_all=False), train_loss=float("nan"))
    metrics.append(tmp_path, RoundMetrics.of(result, 1.0))
    assert json.loads((tmp_path / metrics.JSON_LINES).read_text())["train_loss"] is None


def test_going_back_cuts_the_files_and_refuses_gaps(tmp_path: Path) -> None:
    records = played()
    for record in records:
        metrics.append(tmp_path, record)
    assert metrics.keep_rounds(tmp_path, 2) == records[:2]
    assert metrics.read(tmp_path) == records[:2]
    assert len((tmp_path / metrics.CSV).read_text().splitlines()) == 3
    metrics.append(tmp_path, records[2])  # and the run can go on
    assert metrics.read(tmp_path) == records
    with pytest.raises(metrics.MetricsError, match="has not all of the rounds 1 to 4"):
        metrics.keep_rounds(tmp_path, 4)
    (tmp_path / metrics.JSON_LINES).write_text('{"round": 1}\n')
    with pytest.raises(metrics.MetricsError, match="line 1 is not a round"):
        metrics.read(tmp_path)


@pytest.mark.parametrize(
    "rest", ['{"round": 3, "sampl', '{"round": 3, "sampled": 2}\n', "\0\0\0\n", '{"round": "3"}\n']
)
def test_what_a_crash_left_behind_the_last_checkpoint_is_cut(tmp_path: Path, rest: str) -> None:
    records = played(2)
    for record in records:
        metrics.append(tmp_path, record)
    whole = (tmp_path / metrics.JSON_LINES).read_bytes()
    (tmp_path / metrics.JSON_LINES).write_bytes(whole + rest.encode())
    assert metrics.keep_rounds(tmp_path, 2) == records
    assert (tmp_path / metrics.JSON_LINES).read_bytes() == whole
    (tmp_path / metrics.JSON_LINES).write_bytes(rest.encode())
    assert metrics.keep_rounds(tmp_path, 0) == []


def test_an_unfinished_last_line_is_no_round_and_a_foreign_one_is_named(tmp_path: Path) -> None:
    records = played(2)
    for record in records:
        metrics.append(tmp_path, record)
    path = tmp_path / metrics.JSON_LINES
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    assert metrics.read(tmp_path) == records[:1]
    with pytest.raises(metrics.MetricsError, match="has not all of the rounds 1 to 2"):
        metrics.keep_rounds(tmp_path, 2)
    for foreign in (b"\xff\xfe\n", whole.replace(b'"round": 2', b'"round": "2"'), b"[1]\n", b"\n"):
        path.write_bytes(foreign)
        with pytest.raises(metrics.MetricsError, match=r"metrics\.jsonl: line \d is not a round"):
            metrics.read(tmp_path)


def test_clients_are_written_with_their_sizes_and_domains(tmp_path: Path) -> None:
    data = replace(tiny.data(sizes=(30, 31, 60)), client_domains=("photo", 'a "b", c', ""))
    metrics.write_clients(tmp_path, tested([1, 8, 5], [10, 10, 20]), data)
    assert (tmp_path / metrics.CLIENTS).read_text().splitlines() == [
        "client,domain,train_images,test_images,accuracy,auc,f1",
        "0,photo,30,10,10.0000,50.0000,20.0000",
        '1,"a ""b"", c",31,10,80.0000,60.0000,21.0000',
        "2,,60,20,25.0000,,22.0000",
    ]
    assert metrics.read_clients(tmp_path)[1:] == [
        metrics.ClientMetrics(1, 'a "b", c', 31, 10, 80.0, 60.0, 21.0),
        metrics.ClientMetrics(2, "", 60, 20, 25.0, None, 22.0),
    ]


def test_files_of_before_the_newer_columns_are_read(tmp_path: Path) -> None:
    records = played()
    newer = ("mixed_", "_auc", "_f1", "_auc_clients")
    for record in records:
        old = {k: v for k, v in asdict(record).items() if not any(part in k for part in newer)}
        with (tmp_path / metrics.JSON_LINES).open("a") as file:
            file.write(json.dumps(old) + "\n")
    (tmp_path / metrics.CLIENTS).write_text("client,train_images,test_images,accuracy\n0,30,10,10.0000\n")
    assert [record.all_mean for record in metrics.read(tmp_path)] == [record.all_mean for record in records]
    assert metrics.read(tmp_path)[1].all_auc is None
    assert metrics.read_clients(tmp_path) == [metrics.ClientMetrics(0, "", 30, 10, 10.0, None, None)]


def test_a_table_of_clients_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / metrics.CLIENTS).write_text("client,accuracy\n0,x\n")
    with pytest.raises(metrics.MetricsError, match=r"clients\.csv: is not a table of clients"):
        metrics.read_clients(tmp_path)


def test_the_summary_file_has_the_last_and_the_best_round(tmp_path: Path) -> None:
    records = played(6)
    metrics.write_summary(tmp_path, records[:1], "final")
    assert not (tmp_path / metrics.SUMMARY).exists()  # no round tested all clients
    records[3] = replace(records[3], all_mean=99.0)
    metrics.write_summary(tmp_path, records, "final")
    content = json.loads((tmp_path / metrics.SUMMARY).read_text())
    assert (content["headline"], content["last"]["round"], content["best"]["round"]) == ("all_mean", 6, 4)
    assert (content["best"]["all_mean"], content["best_is_chosen_on"]) == (99.0, "test images")


def test_the_plot_is_a_picture_of_the_stated_size(tmp_path: Path) -> None:
    from matplotlib.image import imread

    path = tmp_path / "p.png"
    plot_run(path, played(), [40.0, 80.0, 60.0], "a title")
    picture = imread(path)
    assert picture.shape[:2] == (600, 1500)
    assert len(np.unique(picture[..., :3].reshape(-1, 3), axis=0)) > 20  # not blank
    assert [p.name for p in tmp_path.iterdir()] == ["p.png"]


def shown(terminal: bool, records: list[RoundMetrics]) -> str:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=120)
    with display(console, rounds=4, finished=0) as screen:
        for record in records:
            screen.client("training", 1, 2)
            screen.round(record)
    return console.file.getvalue()


def test_away_from_a_terminal_there_is_a_plain_line_per_round() -> None:
    records = played()
    records[2] = replace(records[2], dropped=2, dropped_clients="0 2")
    lines = shown(False, records).splitlines()
    assert [line.split("  ")[0] for line in lines[:3]] == ["round 1/4", "round 2/4", "round 3/4"]
    assert "global+personal" not in lines[0]
    assert f"global+personal {records[1].all_mean:5.1f} %" in lines[1]
    assert "images/s" in lines[1]
    assert "left" in lines[1]
    assert (
        lines[3]
        == "round 3: update not finite or too large, left out 2 of 2 clients: 0, 2 (all of them: the global model "
        "stays as it was)"
    )
    assert "\x1b" not in "".join(lines)


def test_on_a_terminal_the_display_is_live() -> None:
    text = shown(True, played())
    assert "\x1b[" in text
    for part in ("rounds", "clients", "local", "images/s", "3/4"):
        assert part in text


def test_the_summary_names_last_and_best_round() -> None:
    records = played(6)
    records[3] = replace(records[3], all_mean=99.0)
    console = Console(file=io.StringIO(), width=80)
    summary(console, records, Path("somewhere/run"))
    lines = console.file.getvalue().splitlines()
    rows = [line for line in lines if "global+personal, all" in line]
    assert "last 6" in rows[0]
    assert f"{records[5].all_mean:.2f}" in rows[0]
    assert "best 4" in rows[1]
    assert "99.00" in rows[1]
    assert any(line.startswith("run folder") and "somewhere/run" in line for line in lines)
