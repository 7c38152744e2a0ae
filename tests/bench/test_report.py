"""Tables say what records say: every target with its value, every share of a step, no figure for what failed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from bench import conftest, report
from bench.targets import evaluate

SETTINGS = {"prefix_len": None, "head_dim": 64, "dtype": "torch.bfloat16", "mode": "gated", "tokens": 65}


def timed(seconds: float, limit: float, peak: int = 1000) -> dict[str, Any]:
    spread = {"median": seconds, "lowest": seconds, "highest": seconds, "count": 3}
    return {
        "wall_seconds": {key: 2 * value for key, value in spread.items()},
        "device_seconds": spread,
        "peak_bytes": peak,
        "images_per_second": 1 / seconds,
        "fraction_of_limit": limit,
    }


def attention(kind: str, fused: dict[str, Any]) -> dict[str, Any]:
    variants = {
        "eager": timed(7e-3, 0.1, 10_000),
        "SDPA": timed(2e-3, 0.3),
        "SDPA flash": timed(1.5e-3, 0.4),
        "SDPA efficient": {"unavailable": "the head size is odd"},
        "fused": fused,
    }
    entry = {"name": f"attention gated {kind}, x", "unit": "images", "settings": SETTINGS | {"kind": kind}}
    entry |= {"variants": variants}
    return entry | {"targets": evaluate(entry, "cuda")}


STEP = {
    "name": "training step, x",
    "unit": "images",
    "settings": {},
    "variants": {"eager": timed(2e-2, 0.1), "fedperfix": timed(1e-2, 0.1)},
    "shares": {"of": "fedperfix", "seconds": 1e-2, "parts": {"attention": 4e-3, "MLP": 7e-3}, "rest": -1e-3},
    "targets": [],
}
RECORD = {
    "device": "test device",
    "date": "2026-01-01",
    "commit": "abc",
    "threads": None,
    "versions": {"torch": "9", "triton": "9"},
    "ceilings": {"copy_bytes_per_second": 1e12, "matrix_float32": 1e12, "matrix_bfloat16": 1e12},
    "comparisons": [
        attention("forward", timed(1e-3, 0.61)),
        attention("backward", timed(1e-3, 0.44)),
        attention("forward + backward", timed(1e-3, 0.5)),
        STEP,
    ],
}


def test_a_table_shows_both_clocks_every_target_and_every_reason() -> None:
    table = report.comparison_table(RECORD["comparisons"][2])
    assert "| fused | 2.00 ms (2.00 ms – 2.00 ms) | 1.00 ms (1.00 ms – 1.00 ms) | 7.00x | 1,000 images/s |" in table
    assert "| SDPA efficient | no speed, unavailable: the head size is odd | | | | | |" in table
    assert "| ≥ 6x eager | 7.00x of eager | met |" in table
    assert "| ≥ 1.6x the fastest SDPA | 1.50x of SDPA flash | missed |" in table
    assert "| ≥ 1.5x FlexAttention | – | not measured: no variant FlexAttention |" in table
    assert "| ≤ 0.25x the memory of eager | 0.10x of eager | met |" in table


def test_the_readme_row_of_a_case_holds_the_targets_of_all_its_kinds() -> None:
    text = report.figures([RECORD])
    (row,) = [line for line in text.splitlines() if line.startswith("| attention")]
    assert "| 61% / 44% / 50% |" in row
    assert "| 3 of 7 met; " in row
    assert "≥ 45% of the limit missed (44.0%)" in row
    assert "≥ 1.6x the fastest SDPA missed (1.50x of SDPA flash)" in row
    assert "≥ 1.5x FlexAttention not measured" in row
    assert "Targets: 3 of 7 met, 2 missed, 2 not measured." in text


def test_shares_of_a_step_are_shown_with_a_negative_rest() -> None:
    assert "| rest | -1.00 ms | -10% |" in report.comparison_table(STEP)
    line = "Of the training step, x (fedperfix, 10.00 ms): attention 40%, MLP 70%, rest -10%."
    assert line in report.figures([RECORD])
    failed = STEP | {"shares": {"of": "fedperfix", "failed": "wrong"}}
    assert "No shares of the step: wrong" in report.comparison_table(failed)


def test_a_row_whose_variant_failed_has_no_figure_and_keeps_its_targets() -> None:
    entry = attention("forward + backward", {"failed": "wrong"})
    text = report.figures([RECORD | {"comparisons": [entry]}])
    (row,) = [line for line in text.splitlines() if line.startswith("| attention")]
    assert "no speed: fused" in row
    assert "| 0 of 5 met; " in row


def test_pytest_prints_every_target() -> None:
    lines: list[str] = []
    reporter = SimpleNamespace(section=lines.append, write_line=lines.append)
    config = SimpleNamespace(stash=pytest.Stash())
    config.stash[conftest.ENTRIES] = {entry["name"]: entry for entry in RECORD["comparisons"]}
    config.stash[conftest.DEVICE_TYPE] = "cuda"
    conftest.pytest_terminal_summary(reporter, config)
    assert "targets: 3 of 7 met, 2 missed, 2 not measured" in lines
    assert "missed: ≥ 45% of the limit: 44.0%: attention gated backward, x" in lines
    assert any(line.endswith("attention gated forward, x [SDPA efficient]") for line in lines)


def peer_session(**changes: Any) -> dict[str, Any]:
    spread = {"median": 2.0, "lowest": 1.5, "highest": 2.5}
    found = {"seconds": spread, "cpu_seconds": {"median": 3.0}, "peak_bytes": 2**30}
    return {
        "title": "Peer",
        "work": {"method": "fedavg", "model": "vit-mini"},
        "precision": "torch.bfloat16",
        "contestants": {"ours": found, "ours fp32": found, "peer": found | {"cpu_seconds": None}},
        "ratios": {"ours": {"seconds": 3.2}, "ours fp32": {"seconds": 1.4}},
        "same_work": True,
        "target": {"at_least": 1.5, "met": {"ours": True, "ours fp32": False}},
    } | changes


def test_a_session_with_a_peer_is_a_line_per_contestant() -> None:
    record = RECORD | {"threads": 2, "sessions": [peer_session(), {"title": "Other", "unavailable": "not there"}]}
    text = report.peers_figures([record])
    assert "2026-01-01, commit abc, 2 threads, PyTorch 9" in text
    ours, exact, peer, other = text.splitlines()[-4:]
    assert (
        ours
        == "| fedavg, vit-mini | ours (bfloat16) | 2.00 (1.50 – 2.50) | 3.00 | 1,024 MB | **3.20x** | ≥ 1.5x met |"
    )
    assert exact.endswith("| **1.40x** | ≥ 1.5x missed |")
    assert peer.endswith("| peer | 2.00 (1.50 – 2.50) | – | 1,024 MB | – | – |")
    assert other == "| Other | not there | | | | | |"


def test_other_work_has_no_ratio() -> None:
    text = report.peers_figures([RECORD | {"sessions": [peer_session(same_work=False)]}])
    assert "x**" not in text
