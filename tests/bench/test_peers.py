"""The peers: equal work, the figures made of it, and what is said of a peer that is not there."""

from __future__ import annotations

import importlib.util
import json
import math
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from bench.peers import __main__ as peers
from bench.peers import authors_pattern, processes
from bench.peers.contestant import Turns, play
from bench.peers.session import ContestantError, Timings, difference, hold
from bench.peers.work import Work

WORK = Work("fedperfix", "vit-nano", clients=5, sampled=2, images=16, epochs=2, batch_size=8, lr=0.1)
PLAIN = replace(WORK, method="fedavg")


@pytest.fixture(autouse=True)
def _same_threads() -> Iterator[None]:
    """Contestants set the number of threads."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def start(work: Work) -> dict[str, Tensor]:
    return dict(work.new_model().named_parameters())


def test_the_authors_pattern_computes_the_same_rounds() -> None:
    own, other = Turns(), Turns()
    expected = play("ours", WORK, 3, own)
    found = play("authors-pattern", WORK, 3, other)
    assert expected.keys() == {name for name in start(WORK) if not authors_pattern.is_local(name)}
    assert difference(found, expected, start(WORK)) < 1e-5
    assert other.accuracy == pytest.approx(own.accuracy, abs=1e-9)


def test_other_work_is_found_out() -> None:
    expected = play("ours", WORK, 1, Turns())
    found = play("authors-pattern", replace(WORK, batch_size=16), 1, Turns())
    assert difference(found, expected, start(WORK)) > 30 * peers.SAME


def test_eager_attention_is_that_of_the_package() -> None:
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(authors_pattern.eager_model(WORK)(images), WORK.new_model()(images))


def test_a_process_of_its_own_computes_the_same() -> None:
    found = hold(PLAIN, ["ours fp32"], 1)["ours fp32"]
    turns = Turns()
    expected = play("ours", PLAIN, 2, turns)
    assert difference(found.shared, expected, start(PLAIN)) == 0
    assert found.accuracy == turns.accuracy
    assert len(found.seconds) == len(found.phases) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pfl-research", "flower"])
def test_a_peer_computes_the_same_rounds(name: str) -> None:
    if peers.missing(peers.PEERS[name]):
        pytest.skip(peers.missing(peers.PEERS[name]))
    timings = hold(PLAIN, ["ours fp32", name], 1)
    shared = [timings[one].shared for one in (name, "ours fp32")]
    assert difference(*shared, start(PLAIN)) < peers.SAME
    assert timings[name].accuracy == pytest.approx(timings["ours fp32"].accuracy, abs=1e-6)


def test_a_pil_image_is_normalised_as_the_package_does_it() -> None:
    images = WORK.data.inputs.permute(0, 2, 3, 1).numpy()
    pictures = authors_pattern.Pictures(images, WORK.data.labels, torch.tensor([7, 3]))
    torch.testing.assert_close(pictures[1][0], WORK.normalised()[3])
    assert pictures[1][1] == WORK.data.labels[3]


def test_work_survives_its_way_to_another_process() -> None:
    assert Work.from_json(WORK.to_json()) == WORK
    sizes = [len(WORK.data.train[client]) + len(WORK.data.test[client]) for client in range(WORK.clients)]
    assert sizes == [14, 16, 18, 14, 16]
    orders = [*WORK.orders(1, 1), *WORK.orders(1, 2)]
    assert [sorted(order.tolist()) for order in orders] == [WORK.data.train[1].tolist()] * 4
    assert len({tuple(order.tolist()) for order in orders}) == 4


def test_difference_is_relative_to_the_way_from_the_start() -> None:
    begin, expected = {"w": torch.zeros(2), "local": torch.ones(1)}, {"w": torch.tensor([3.0, 4.0])}
    assert difference({"w": torch.tensor([3.0, 4.5])}, expected, begin) == pytest.approx(0.1)
    assert difference({"v": expected["w"]}, expected, begin) == math.inf
    assert difference(expected | {"statistics": torch.ones(1)}, expected, begin) == 0
    assert difference({"w": torch.tensor([math.nan, 4.0])}, expected, begin) != 0


def timings(seconds: list[float], shared: Tensor, peak: int | None = None) -> Timings:
    count = len(seconds)
    return Timings(
        seconds, [2 * x for x in seconds], [0.0] * count, [{"train": 1.0}] * count, peak, None, {"w": shared}
    )


def verdict(*, theirs: float, moved: float) -> dict:
    model_start = torch.zeros(2)

    class Task:
        def new_model(self) -> torch.nn.Module:
            model = torch.nn.Module()
            model.w = torch.nn.Parameter(model_start.clone())
            return model

    found = {
        "ours": timings([1.0, 2.0, 9.0], torch.tensor([1.1, 0.0]), 100),
        "ours fp32": timings([4.0, 4.0, 4.0], torch.tensor([1.0, 0.0])),
        "peer": timings([theirs] * 3, torch.tensor([1.0, moved]), 300),
    }
    return peers.figures("peer", found, Task(), 3.0, "bf16")


def test_ratios_are_of_medians_and_a_target_is_met_from_its_bar_on() -> None:
    entry = verdict(theirs=6.0, moved=0.0)
    assert entry["ratios"]["ours"] == {"seconds": 3.0, "cpu_seconds": 3.0, "peak_bytes": 3.0}
    assert entry["ratios"]["ours fp32"] == {"seconds": 1.5, "cpu_seconds": 1.5}
    assert entry["target"]["met"] == {"ours": True, "ours fp32": False}
    assert verdict(theirs=5.9, moved=0.0)["target"]["met"]["ours"] is False


@pytest.mark.parametrize("moved", [0.01, math.nan])
def test_unequal_work_meets_no_target(moved: float) -> None:
    entry = verdict(theirs=60.0, moved=moved)
    assert not entry["same_work"]
    assert not any(entry["target"]["met"].values())
    shown = peers.text(entry | {"peer": "peer"})
    assert "NOT the same work" in shown
    assert "ours missed, ours fp32 missed" in shown


def test_a_peer_that_is_not_there_is_named_with_its_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pfl" else there(name))
    monkeypatch.setattr(peers, "hold", lambda *_: pytest.fail("held a session without the peer"))
    assert peers.main(["--peer", "pfl-research"]) == 0
    assert "pfl-research: not installed (pfl); pip install pfl==0.6.0" in capsys.readouterr().out


def test_a_contestant_that_fails_is_reported_with_the_end_of_its_log() -> None:
    with pytest.raises(ContestantError, match="(?s)ours fp32 ended early:.*--method: got 'nothing'"):
        hold(replace(WORK, method="nothing"), ["ours fp32"], 1)


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"), reason="no /proc")
def test_memory_and_time_of_this_process_are_seen() -> None:
    with processes.watched(os.getpid()) as peak:
        begin = processes.cpu_seconds(os.getpid())
        block = np.ones(40_000_000)  # 320 MB, written
        while processes.cpu_seconds(os.getpid()) < begin + 0.3:
            block += 1
        held = processes.resident_bytes(os.getpid())
    assert held > 320e6
    assert peak.seen > 320e6


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--rounds", "0"], "got 0, takes a whole number of at least 1"),
        (["--images", "7"], "got 7, takes a whole number of at least 8"),
        (["--peer", "nobody"], "invalid choice: 'nobody'"),
        (["--sampled", "99"], "--sampled: got 99, takes at most --clients, which is 64"),
    ],
)
def test_wrong_arguments_are_refused(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        peers.main(arguments)
    assert error.value.code == 2
    assert says in capsys.readouterr().err


def test_the_record_is_written_after_every_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, held = tmp_path / "peers.json", []

    def session(work: Work, names: list[str], rounds: int, tell: object) -> dict[str, Timings]:
        if held:
            assert len(json.loads(file.read_text())["sessions"]) == 1
            raise ContestantError("it failed")
        held.append(names)
        shared = {name: value.detach() + 1 for name, value in work.new_model().named_parameters()}
        return {name: Timings([1.0], [1.0], [0.0], [{}], None, None, shared) for name in names}

    monkeypatch.setattr(peers, "hold", session)
    monkeypatch.setattr(peers, "missing", lambda peer: None)
    arguments = [
        "--peer",
        "authors-pattern",
        "flower",
        "--model",
        "vit-nano",
        "--device",
        "cpu",
        "--out",
        str(file),
    ]
    assert peers.main(arguments) == 1
    first, second = json.loads(file.read_text())["sessions"]
    assert first["same_work"]
    assert first["work"]["model"] == "vit-nano"
    assert second["failed"] == "it failed"
    assert held[0][-2:] == ["ours fp32", "authors-pattern"]
