"""Adds rates and peak memory to what pytest-benchmark prints."""

from __future__ import annotations

import pytest

from bench.report import rate_text

RATES = pytest.StashKey[list[dict]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RATES] = []


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """One line per variant: rate and peak memory of one call."""
    if not config.stash[RATES]:
        return
    terminalreporter.section("rates and peak memory")
    for entry in config.stash[RATES]:
        rate = rate_text(entry["unit"], entry["rate"])
        terminalreporter.write_line(f"{rate:>18}  {entry['peak_bytes'] / 1e6:>9.1f} MB  {entry['name']}")
