"""Runs as they lie on disk, and what each is called in a table."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from fedperfix.config import RESUMABLE, ConfigError, TrainConfig, from_toml
from fedperfix.costs import COSTS
from fedperfix.methods import method_label
from fedperfix.run import folder, metrics
from fedperfix.study import STUDY, read_record

# What may differ between runs of one row.
_NOT_A_SETTING = ("method", "seed", *RESUMABLE, "resume")
# What a round's line must say for a table.
_FIGURES = ("round", "local_mean", "bytes_up", "bytes_down")
_SECONDS = tuple(f"seconds_{phase}" for phase in ("train", "aggregate", "evaluate", "other"))
_SPREAD = ("mean", "std", "worst", "weighted")


@dataclass(frozen=True)
class Client:
    """A client in the last evaluation: its images, its accuracy in percent, and its domain or nothing."""

    train_images: int
    test_images: int
    accuracy: float
    domain: str = ""


@dataclass(frozen=True)
class ReportedRun:
    """A run's folder, read.

    Args:
        folder: of the run.
        row: the table's row that it belongs to.
        config: of the run.
        environments: what computed it, an entry for the start and for every resumption.
        rounds: lines of metrics.jsonl; a key that this version does not write is simply absent.
        clients: of the last evaluation over all clients, by number; empty before the first.
        costs: of costs.json, or empty.
    """

    folder: Path
    row: str
    config: TrainConfig
    environments: Sequence[dict[str, Any]]
    rounds: Sequence[dict[str, Any]]
    clients: dict[int, Client]
    costs: dict[str, Any]

    @property
    def finished(self) -> bool:
        """Whether it has all its rounds."""
        return len(self.rounds) >= self.config.rounds

    @cached_property
    def columns(self) -> str:
        """Which columns are its result: `all`, or `mixed` where it was tested as the authors' code does."""
        return "all" if any(line.get("all_mean") is not None for line in self.rounds) else "mixed"

    @cached_property
    def tested(self) -> list[dict[str, Any]]:
        """The rounds with an evaluation over all clients, where `mean`, `std` and so on are those of `columns`."""
        prefix = f"{self.columns}_"
        return [
            line | {name.removeprefix(prefix): value for name, value in line.items() if name.startswith(prefix)}
            for line in self.rounds
            if line.get(f"{prefix}mean") is not None
        ]

    @property
    def last(self) -> dict[str, Any]:
        """The last evaluated round."""
        return self.tested[-1]

    @property
    def best(self) -> dict[str, Any]:
        """The evaluated round of the highest mean accuracy: chosen on the test images."""
        return max(self.tested, key=lambda line: line["mean"])


@dataclass(frozen=True)
class Source:
    """What a folder of runs says about itself: a title or None, and the commands that made it."""

    title: str | None
    commands: tuple[str, ...]


def read_runs(folders: Sequence[Path]) -> tuple[list[ReportedRun], list[str], Source]:
    """Read runs from their own folders or from folders of them.

    Args:
        folders: each a run's, or one that holds runs.

    Returns:
        The runs with an evaluation, in the order of the studies; sentences about folders that were left out; what
        the studies say about themselves.

    Raises:
        ConfigError: a folder that does not exist or has no run.
    """
    runs: list[ReportedRun] = []
    notes: list[str] = []
    title, commands = None, []
    for path in folders:
        study = read_record(path / STUDY) if (path / STUDY).exists() else {}
        title = title or study.get("title")
        commands += study.get("commands", [])
        found = [path] if (path / folder.CONFIG).exists() else _runs_in(path, list(study.get("runs", {})))
        if not found:
            raise ConfigError(f"DIR: '{path}' has no run in it; takes folders of runs")
        for where in found:
            run = _read(where, study.get("runs", {}).get(where.name, {}).get("row"))
            if run.tested:
                runs.append(run)
            else:
                notes.append(f"{where}: no evaluation over all clients yet")
        notes += [f"{path / name}: not started" for name in study.get("runs", {}) if not (path / name).exists()]
    if not runs:
        raise ConfigError(
            f"DIR: no run in '{folders[0]}' has an evaluation yet; wait, or train with --eval-every 1"
        )
    return _labelled(runs), notes, Source(title, tuple(dict.fromkeys(commands)))


def by_row(runs: Sequence[ReportedRun]) -> dict[str, list[ReportedRun]]:
    """Runs by row, in the order in which the rows appear."""
    rows: dict[str, list[ReportedRun]] = {}
    for run in runs:
        rows.setdefault(run.row, []).append(run)
    return rows


def _runs_in(path: Path, listed: Sequence[str]) -> list[Path]:
    if not path.is_dir():
        raise ConfigError(f"DIR: there is no folder '{path}'; takes folders of runs")
    there = sorted(file.parent for file in path.glob(f"*/{folder.CONFIG}"))
    order = {name: place for place, name in enumerate(listed)}
    return sorted(there, key=lambda where: (order.get(where.name, len(order)), where.name))


def _read(where: Path, row: str | None) -> ReportedRun:
    with _readable(where / folder.CONFIG) as file:
        config = from_toml(file.read_text(encoding="utf-8"), str(file))
    with _readable(where / folder.ENVIRONMENT):
        environments = folder.read_environment(where)
        for entry in environments:
            entry["device"], entry["time"], entry["platform"], entry["backend"]  # the page names them
    with _readable(where / COSTS) as file:
        costs = dict(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else {}
    return ReportedRun(
        folder=where,
        row=row or method_label(config.method),
        config=config,
        environments=environments,
        rounds=_rounds(where / metrics.JSON_LINES),
        clients=_clients(where / metrics.CLIENTS),
        costs=costs,
    )


@contextmanager
def _readable(file: Path) -> Iterator[Path]:
    """What is wrong with the content of a run's file, found in the block, is a `ConfigError` that names it."""
    try:
        yield file
    except ConfigError:
        raise
    except FileNotFoundError as error:
        raise ConfigError(f"DIR: there is no '{file}'; bring it back, or take its folder away") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"DIR: '{file}' is damaged ({type(error).__name__}: {error}); bring it back, or take its folder away"
        ) from error


def _rounds(file: Path) -> list[dict[str, Any]]:
    if not file.exists():
        return []
    with _readable(file):
        rounds = [dict(json.loads(line)) for line in metrics.finished_lines(file)]
        for line in rounds:
            tested = [name for name in ("all", "mixed") if line.get(f"{name}_mean") is not None]
            for name in (*_FIGURES, *_SECONDS, *(f"{prefix}_{name}" for prefix in tested for name in _SPREAD)):
                float(line[name])
    return rounds


def _clients(file: Path) -> dict[int, Client]:
    if not file.exists():
        return {}
    with _readable(file), open(file, encoding="utf-8", newline="") as lines:
        return {
            int(line["client"]): Client(
                int(line["train_images"]),
                int(line["test_images"]),
                float(line["accuracy"]),
                line.get("domain") or "",
            )
            for line in csv.DictReader(lines)
        }


def _labelled(runs: Sequence[ReportedRun]) -> list[ReportedRun]:
    """The runs with rows that also name the settings in which runs of the same row differ."""
    result = []
    for run in runs:
        others = [other.config for other in runs if other.row == run.row]
        differing = [
            f"{name} {_text(value)}"
            for name, value in vars(run.config).items()
            if name not in _NOT_A_SETTING and any(getattr(other, name) != value for other in others)
        ]
        result.append(replace(run, row=", ".join([run.row, *differing])))
    return result


def _text(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
