"""Which runs are started, when, and what becomes of them; the runs themselves are stand-ins, but for one test."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from fedperfix import sweep as module
from fedperfix.config import ConfigError
from fedperfix.run import metrics
from fedperfix.study import Study
from fedperfix.sweep import INTERRUPTED, OUT_OF_TIME, SOME_FAILED, Place, main, read_command, sweep

ROOT = Path(__file__).parents[2]
STUDY = Study(rows=("fedavg", "local"), seeds=(0, 1), base={"rounds": 1})

# Writes when it began and ended; on SIGINT it says so and ends with 130, as a training run does.
STAND_IN = """
import pathlib, signal, sys, time
where, seconds, code = pathlib.Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
def stop(*_):
    (where / "saved").touch()
    sys.exit(130)
signal.signal(signal.SIGINT, stop)
where.mkdir(parents=True, exist_ok=True)
(where / "began").write_text(str(time.time()))
time.sleep(seconds)
(where / "ended").write_text(str(time.time()))
print("fedperfix: error: --lr: the sentence" if code else "done", file=sys.stderr)
sys.exit(code)
"""


def stand_in(seconds: float = 0.0, failing: str = ""):
    def command(item: Place, config_file: Path) -> list[str]:
        code = 3 if item.run.name == failing else 0
        return [sys.executable, "-c", STAND_IN, str(item.folder), str(seconds), str(code)]

    return command


def play(tmp_path: Path, capsys: pytest.CaptureFixture, **options: object) -> tuple[int, str]:
    code = sweep(STUDY, tmp_path / "out", Console(width=200), command="the command", **options)
    return code, capsys.readouterr().out


def test_runs_side_by_side_and_a_line_for_each(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    code, output = play(tmp_path, capsys, jobs=2, start=stand_in(0.4))
    assert code == 0
    began, ended = (
        sorted(float(path.read_text()) for path in tmp_path.glob(f"out/*/{name}")) for name in ("began", "ended")
    )
    assert len(began) == len(ended) == 4
    assert began[1] < ended[0] < began[2]  # two at a time, the third after the first
    for number in range(1, 5):
        assert f"[{number}/4] " in output
    assert output.count("finished after") == 4
    assert f"python -m fedperfix.report {tmp_path / 'out'}" in output


def test_a_failed_run_is_named_with_its_log_and_stops_no_other(tmp_path: Path, capsys) -> None:
    code, output = play(tmp_path, capsys, start=stand_in(failing="fedavg-seed0"))
    assert code == SOME_FAILED
    log = tmp_path / "out/logs/fedavg-seed0.log"
    assert f"[1/4] fedavg-seed0  FAILED (exit code 3): --lr: the sentence; see {log}" in output
    assert output.count("finished after") == 3
    assert "the sentence" in log.read_text()


def test_the_time_limit_stops_what_runs_and_starts_no_more(tmp_path: Path, capsys) -> None:
    start = time.monotonic()
    code, output = play(tmp_path, capsys, jobs=2, start=stand_in(30), time_limit=1.5)
    assert code == OUT_OF_TIME
    assert time.monotonic() - start < 10
    assert len(list(tmp_path.glob("out/*/saved"))) == 2
    assert len(list(tmp_path.glob("out/*/began"))) == 2
    assert "out of time; the runs are saved" in output


def test_the_list_of_runs_keeps_those_of_earlier_commands(tmp_path: Path, capsys) -> None:
    play(tmp_path, capsys, start=stand_in())
    for path in tmp_path.glob("out/*-seed*"):
        for file in path.iterdir():
            file.unlink()
    one = Study(rows=("fedper",), base={"rounds": 1}, grid={"gate": [0.5]})
    sweep(one, tmp_path / "out", Console(), command="another", start=stand_in())
    known = json.loads((tmp_path / "out/study.json").read_text())
    assert known["commands"] == ["the command", "another"]
    assert known["runs"]["local-seed1"] == {"row": "local", "settings": {}, "seed": 1, "rounds": 1}
    assert known["runs"]["fedper-gate0.5-seed0"]["settings"] == {"gate": 0.5}
    assert len(known["runs"]) == 5


def test_a_damaged_list_of_runs_is_named_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "study.json").write_text("[")
    with pytest.raises(ConfigError, match="study.json' is damaged; remove it, and the sweep's command writes"):
        sweep(Study(rows=("fedper",)), tmp_path, Console(), command="another", start=stand_in())
    assert [path.name for path in tmp_path.iterdir()] == ["study.json"]


def test_threads_are_divided_unless_the_user_says_how_many(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(module, "_cores", lambda: 7)
    code = "import os, pathlib, sys; pathlib.Path(sys.argv[1]).write_text(os.environ['OMP_NUM_THREADS'])"

    def threads(jobs: int) -> str:
        file = tmp_path / "threads"
        study = Study(rows=("local",))
        command = [sys.executable, "-c", code, str(file)]
        sweep(study, tmp_path / "out", Console(), command="", jobs=jobs, start=lambda item, config: command)
        return file.read_text()

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert [threads(1), threads(3), threads(9)] == ["7", "2", "1"]
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert threads(3) == "5"


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_ctrl_c_saves_every_run(tmp_path: Path) -> None:
    code = (
        "from tests.fedperfix.test_sweep import STUDY, stand_in, sweep; from rich.console import Console; "
        "from pathlib import Path; import sys; "
        "sys.exit(sweep(STUDY, Path('out'), Console(), command='', jobs=2, start=stand_in(30)))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=environment, stdout=subprocess.PIPE)
    while len(list(tmp_path.glob("out/*/began"))) < 2:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=20)[0].decode()
    assert process.returncode == INTERRUPTED
    assert len(list(tmp_path.glob("out/*/saved"))) == 2
    assert output.count("stopped ") == 2
    assert "interrupted; the runs are saved" in output


SMALL = [
    "--clients",
    "4",
    "--sampled",
    "1",
    "--local-steps",
    "1",
    "--eval-every",
    "1",
    "--test-fraction",
    "0.01",
    "--precision",
    "fp32",
]
OPTIONS = ["--methods", "fedavg", "--seeds", "0", "--out", "out", "--device", "cpu", *SMALL]


def test_real_runs_start_go_on_and_are_not_repeated(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert main([*OPTIONS, "--rounds", "1"]) == 0
    where = Path("out/fedavg-seed0")
    first = metrics.read(where)
    assert main([*OPTIONS, "--rounds", "2"]) == 0  # more rounds go on; so does a run that was stopped
    second = metrics.read(where)
    assert [line.round for line in second] == [1, 2]
    assert second[0] == first[0]
    written = (where / "metrics.jsonl").stat().st_mtime_ns
    capsys.readouterr()
    assert main([*OPTIONS, "--rounds", "2"]) == 0
    assert f"was finished before, {second[-1].all_mean:.2f} % over all clients" in capsys.readouterr().out
    assert (where / "metrics.jsonl").stat().st_mtime_ns == written
    assert main([*OPTIONS, "--rounds", "2", "--lr", "7"]) == 2
    assert "has a run with other options (--lr is 0.001 there, 7.0 here)" in capsys.readouterr().err
    assert main([*OPTIONS, "--rounds", "3", "--dry-run"]) == 0
    assert "unfinished out/fedavg-seed0  fedavg, seed 0, 3 rounds" in capsys.readouterr().out


def test_a_file_and_options_together(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.toml").write_text(
        "methods = ['fedavg']\nseeds = [0, 1]\n[base]\nlr = 1.0\n[method]\nrow = {method = 'local', seeds = [5]}\n"
    )
    study, arguments = read_command(["mine.toml"])
    assert arguments.out == Path("runs/mine")
    assert {run.name for run in study.runs()} == {"fedavg-seed0", "fedavg-seed1", "row-seed5"}
    study, _ = read_command(
        ["mine.toml", "--methods", "row", "fedper", "--seeds", "3", "--lr", "2", "--set", "gate=1"]
    )
    runs = study.runs()
    assert [run.name for run in runs] == ["row-gate1-seed3", "fedper-gate1-seed3"]
    assert [run.config.method for run in runs] == ["local", "fedper"]
    assert {run.config.lr for run in runs} == {2.0}


def test_a_file_without_methods_does_not_run_others(tmp_path: Path, capsys) -> None:
    file = tmp_path / "layers.toml"
    file.write_text("seeds = [0]\n")
    assert main([str(file), "--dry-run"]) == 2
    assert "layers.toml: names no methods; give --methods, or take" in capsys.readouterr().err
    study, _ = read_command([str(file), "--methods", "local"])
    assert study.rows == ("local",)
    study, _ = read_command([str(file)], methods={"head": {"method": "fedper"}})
    assert study.rows == ("head",)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--seed", "1"], "--seed: --methods, --seeds and --out say it"),
        (["--lr", "-1"], "run fedperfix-seed0: --lr: got -1"),
        (["--lrr", "1"], "--lrr: unknown option; did you mean '--lr'?"),
        (["--methods", "fedprefix"], "--methods: got 'fedprefix'"),
        (["--jobs", "0"], "--jobs: got '0', takes a whole number of at least 1"),
        (["--seeds", "x"], "--seeds: got 'x'"),
        (["--time-limit", "-1"], "--time-limit: got '-1', takes a number of seconds above 0"),
        (["nowhere.toml"], "STUDY: cannot read 'nowhere.toml'"),
        (["--out", "full"], "has something that is not a run"),
    ],
)
def test_what_does_not_fit_is_one_sentence_and_nothing_is_started(options, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("full/fedperfix-seed0").mkdir(parents=True)
    Path("full/fedperfix-seed0/notes").touch()
    assert main(options) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1
    assert os.listdir() == ["full"]
