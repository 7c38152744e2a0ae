"""The recorder loses nothing: it writes after every comparison, goes on where it stopped, and stops in time."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from bench import record, scaling
from bench.comparison import Comparison, Plan
from bench.peers import __main__ as peers

X = torch.arange(1.0, 1001.0)
MACHINE = {
    "device": "test device",
    "threads": 1,
    "load": 0.0,
    "versions": {"torch": "9"},
    "date": "2026-01-01",
    "commit": "abc",
}


def comparison(name: str) -> Comparison:
    return Comparison(
        name=name,
        variants={"loop": lambda _: (X + X,), "fedperfix": lambda _: (2 * X,)},
        input_sets=1,
        exact=lambda: (2 * X.double(),),
        work=1,
        unit="bytes",
        dtype=torch.float32,
    )


class Bench:
    """Three plans of which any can be made to break, and what was built so far."""

    def __init__(self) -> None:
        self.built: list[str] = []
        self.broken: set[str] = set()
        self.machine = dict(MACHINE)

    def plans(self, _: torch.device) -> list[Plan]:
        return [Plan(name, ("loop", "fedperfix"), lambda name=name: self.build(name)) for name in ("a", "b", "c")]

    def build(self, name: str) -> Comparison:
        self.built.append(name)
        if name in self.broken:
            raise RuntimeError("no memory")
        return comparison(name)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Bench:
    made = Bench()
    monkeypatch.setattr(record, "all_plans", made.plans)
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr(record, "describe_machine", lambda _: dict(made.machine))
    monkeypatch.setattr(record, "ceilings", lambda _: {"copy_bytes_per_second": 1e9})
    return made


def run(*arguments: str) -> int:
    return record.main(["--device", "cpu", "--budget", "0", *arguments])


def names(path: Path) -> list[str]:
    return [entry["name"] for entry in json.loads(path.read_text())["comparisons"]]


def test_a_record_is_written_after_every_comparison(bench: Bench, tmp_path: Path) -> None:
    path = tmp_path / "test-device.json"
    seen: list[list[str]] = []
    build = bench.build
    bench.build = lambda name: (seen.append(names(path) if path.exists() else []), build(name))[1]
    assert run() == 0
    assert seen == [[], ["a"], ["a", "b"]]
    assert names(path) == ["a", "b", "c"]


def test_the_same_command_goes_on(bench: Bench, tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    assert run("--output", str(path), "--match", "a") == 0
    first = json.loads(path.read_text())
    assert run("--output", str(path)) == 0
    assert bench.built == ["a", "b", "c"]
    assert names(path) == ["a", "b", "c"]
    assert json.loads(path.read_text())["comparisons"][0] == first["comparisons"][0]
    assert json.loads(path.read_text())["seconds"] > first["seconds"] - 0.1


@pytest.mark.parametrize(
    "change", [{"commit": "def"}, {"versions": {"torch": "10"}}, {"device": "other"}, {"threads": 2}]
)
def test_another_commit_version_or_device_starts_anew(bench: Bench, tmp_path: Path, change: dict) -> None:
    path = tmp_path / "record.json"
    run("--output", str(path), "--match", "a")
    bench.machine |= change
    run("--output", str(path), "--match", "b")
    assert names(path) == ["b"]


@pytest.mark.parametrize("commit", ["unknown", "abc-dirty"])
def test_a_commit_that_may_be_another_one_starts_anew(bench: Bench, tmp_path: Path, commit: str) -> None:
    bench.machine["commit"] = commit
    path = tmp_path / "record.json"
    run("--output", str(path), "--match", "a")
    run("--output", str(path), "--match", "b")
    assert names(path) == ["b"]
    run("--output", str(path), "--match", "b", "--commit", "abc")
    run("--output", str(path), "--match", "c", "--commit", "abc")
    assert names(path) == ["b", "c"]


def test_no_comparison_starts_after_the_time_limit(bench: Bench, tmp_path: Path) -> None:
    assert run("--time-limit", "0") == record.INCOMPLETE
    assert bench.built == []
    assert run("--time-limit", "1000") == 0
    assert run("--time-limit", "0") == 0  # nothing is left


def test_a_comparison_that_breaks_costs_no_other_and_is_tried_again(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    bench.broken = {"b"}
    assert run() == 1
    assert names(tmp_path / "test-device.json") == ["a", "c"]
    assert "not measured: b: RuntimeError: no memory" in capsys.readouterr().err
    bench.broken = set()
    assert run() == 0
    assert bench.built == ["a", "b", "c", "b"]


def test_a_match_writes_nothing_unless_told_where(bench: Bench, tmp_path: Path) -> None:
    assert run("--match", "a") == 0
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_fails_leaves_the_record_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    record.write({"a": 1}, path)
    with pytest.raises(TypeError):
        record.write({"a": object()}, path)
    assert json.loads(path.read_text()) == {"a": 1}


@pytest.mark.parametrize("module", [scaling, record, peers])
def test_a_record_that_cannot_be_written_is_refused_before_anything_is_measured(
    module, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "file").touch()
    option = "--out" if module is peers else "--output"
    for path, reason in ((tmp_path / "file" / "x.json", "cannot be written"), (tmp_path, "is a folder")):
        with pytest.raises(SystemExit) as ended:
            module.main([option, str(path)])
        assert ended.value.code == 2
        assert f"{option}: '{path}' {reason}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("has", "words"),
    [
        ({"amx_tile": True, "avx512_f": True}, " with AMX, "),
        ({"amx_tile": False, "avx512_f": False}, " without AVX-512, "),
        ({"avx512_f": True}, ", "),
        ({"neon": True}, ", "),
    ],
)
def test_processors_of_one_name_have_records_of_their_own(
    has: dict[str, bool], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    name = record.device_name(torch.device("cpu"))
    assert name.endswith(f"{words}{os.cpu_count()} cores")
    assert ("with" in name) == ("with" in words)
