"""Adds rates, peak memory and targets to what pytest-benchmark prints."""

from __future__ import annotations

import pytest

from bench.entries import Entry
from bench.report import memory_text, rate_text, result_text
from bench.targets import evaluate, summary, value_text

ENTRIES = pytest.StashKey[dict[str, Entry]]()
DEVICE_TYPE = pytest.StashKey[str]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ENTRIES] = {}


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """One line per variant, rate and peak memory of one call; one line per target of what ran."""
    entries = config.stash[ENTRIES].values()
    if not entries:
        return
    terminalreporter.section("rates and peak memory")
    for entry in entries:
        for name, variant in entry["variants"].items():
            rate = variant.get(f"{entry['unit']}_per_second")
            text = "–" if rate is None else rate_text(entry["unit"], rate)
            memory = memory_text(variant.get("peak_bytes"))
            terminalreporter.write_line(f"{text:>18}  {memory:>12}  {entry['name']} [{name}]")
    verdicts = [(entry["name"], v) for entry in entries for v in evaluate(entry, config.stash[DEVICE_TYPE])]
    if verdicts:
        terminalreporter.section(f"targets: {summary(verdict for _, verdict in verdicts)}")
    for name, verdict in verdicts:
        terminalreporter.write_line(f"{result_text(verdict)}: {verdict['target']}: {value_text(verdict)}: {name}")
