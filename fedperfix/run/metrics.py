"""A round's figures as one flat record, as JSON Lines and as CSV."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

from fedperfix.data import FederatedData
from fedperfix.engine.evaluate import Evaluation, Spread
from fedperfix.engine.round import RoundResult
from fedperfix.run.files import append_line, write_text

JSON_LINES = "metrics.jsonl"
CSV = "metrics.csv"
CLIENTS = "clients.csv"
SUMMARY = "summary.json"
# What the columns with these names are, by protocol `final` and `authors-code`.
HEADLINES = {"all": "global+personal", "mixed": "authors' code"}
_ROUND_DIGITS = 6


class MetricsError(ValueError):
    """A metrics file that cannot be continued; the message names it."""


@dataclass(frozen=True)
class RoundMetrics:
    """One line of the metrics files. Accuracies are in percent, times in seconds.

    `local_*` is after local training, over the sampled clients; `sampled_*` and `all_*` are after the aggregation,
    with the new global parameters and the client's own; `mixed_*` is over all clients as the authors' released code
    tests them (`--protocol authors-code`); None in rounds without test and where the protocol leaves them out.
    `worst` is the mean of the worst tenth of the clients, `weighted` the mean over test images, `auc` and `f1` are
    means over clients in percent (`auc_clients` of them have an AUC), the losses are mean cross-entropies. Where
    `tested_clients` is not None, `all_*` and `mixed_*` are over so many clients drawn at random (`--eval-clients`),
    and `sampled_*` is left out. `epsilon` is what is spent of the clients' privacy after the round (`--dp`).
    """

    round: int
    sampled: int
    dropped: int
    dropped_clients: str
    train_loss: float | None
    train_accuracy: float | None
    local_mean: float | None
    local_std: float | None
    local_worst: float | None
    local_weighted: float | None
    local_loss: float | None
    sampled_mean: float | None
    sampled_std: float | None
    sampled_worst: float | None
    sampled_weighted: float | None
    sampled_loss: float | None
    all_mean: float | None
    all_std: float | None
    all_worst: float | None
    all_weighted: float | None
    all_loss: float | None
    bytes_up: int
    bytes_down: int
    images: int
    images_per_second: float
    seconds_train: float
    seconds_aggregate: float
    seconds_evaluate: float
    seconds_other: float
    # From here on with defaults: files that were written before these columns are read as well.
    local_auc: float | None = None
    local_auc_clients: int | None = None
    local_f1: float | None = None
    sampled_auc: float | None = None
    sampled_auc_clients: int | None = None
    sampled_f1: float | None = None
    all_auc: float | None = None
    all_auc_clients: int | None = None
    all_f1: float | None = None
    mixed_mean: float | None = None
    mixed_std: float | None = None
    mixed_worst: float | None = None
    mixed_weighted: float | None = None
    mixed_loss: float | None = None
    mixed_auc: float | None = None
    mixed_auc_clients: int | None = None
    mixed_f1: float | None = None
    tested_clients: int | None = None
    epsilon: float | None = None

    @classmethod
    def of(cls, result: RoundResult, seconds: float) -> RoundMetrics:
        """The record of a round that took `seconds` from the end of the one before."""
        train, aggregate = result.seconds["train"], result.seconds["aggregate"]
        evaluate = result.seconds["evaluate"]
        tested = result.personalised or result.mixed
        part = len(tested.clients) if tested and len(tested.clients) < result.clients else None
        everyone = result.personalised if part is None else None
        return cls(
            round=result.round,
            sampled=len(result.sampled),
            dropped=len(result.dropped),
            dropped_clients=" ".join(map(str, result.dropped)),
            train_loss=_finite(result.train_loss),
            train_accuracy=result.train_accuracy,
            **_spread("local", result.local),
            **_spread("sampled", everyone.among(result.sampled) if everyone else None),
            **_spread("all", result.personalised),
            **_spread("mixed", result.mixed),
            bytes_up=result.bytes_up,
            bytes_down=result.bytes_down,
            images=result.train_images,
            images_per_second=round(result.train_images / train, 1),
            seconds_train=round(train, _ROUND_DIGITS),
            seconds_aggregate=round(aggregate, _ROUND_DIGITS),
            seconds_evaluate=round(evaluate, _ROUND_DIGITS),
            seconds_other=round(max(0.0, seconds - train - aggregate - evaluate), _ROUND_DIGITS),
            tested_clients=part,
            epsilon=_finite(result.epsilon),
        )

    @property
    def headline(self) -> str | None:
        """Which columns are the result of this round's test of all clients: `all`, else `mixed`, else None."""
        return next((name for name in ("all", "mixed") if getattr(self, f"{name}_mean") is not None), None)

    @property
    def headline_of(self) -> str:
        """Over whom the columns of `headline` are, in words."""
        return "all" if self.tested_clients is None else f"{self.tested_clients} random"

    @property
    def headline_mean(self) -> float | None:
        """The mean accuracy over all clients by this run's protocol, in percent; None in rounds without test."""
        return None if self.headline is None else getattr(self, f"{self.headline}_mean")


def headline_rounds(rounds: Sequence[RoundMetrics]) -> tuple[RoundMetrics, RoundMetrics] | None:
    """The last round that tested all clients and the best one, by mean accuracy; None if none did.

    The best round is chosen on the test images, so its figures are too good by what the choice gains.
    """
    tested = [record for record in rounds if record.headline]
    return (tested[-1], max(tested, key=lambda record: record.headline_mean or 0.0)) if tested else None


COLUMNS = tuple(item.name for item in fields(RoundMetrics))


def append(folder: Path, metrics: RoundMetrics) -> None:
    """Add a round to both files of a run folder."""
    if not (folder / CSV).exists():
        append_line(folder / CSV, ",".join(COLUMNS))
    append_line(folder / JSON_LINES, json.dumps(asdict(metrics), allow_nan=False))
    append_line(folder / CSV, _csv_line(metrics))


def read(folder: Path, last: int | None = None) -> list[RoundMetrics]:
    """The rounds in a run folder, in order, without a last line that a process which was killed left unfinished.

    Args:
        folder: of the run.
        last: read no further than this round.

    Raises:
        MetricsError: a line that is no round.
    """
    path = folder / JSON_LINES
    if not path.exists():
        return []
    rounds: list[RoundMetrics] = []
    for number, line in enumerate(finished_lines(path), start=1):
        if last is not None and (rounds[-1].round if rounds else 0) >= last:
            break
        try:
            rounds.append(_round(line))
        except (TypeError, ValueError) as error:
            raise MetricsError(f"{path}: line {number} is not a round of this program's metrics") from error
    return rounds


def finished_lines(path: Path) -> list[bytes]:
    """The lines of a file that have an end."""
    return path.read_bytes().split(b"\n")[:-1]


def _round(line: bytes) -> RoundMetrics:
    metrics = RoundMetrics(**json.loads(line))
    if type(metrics.round) is not int:
        raise TypeError("its number is none")
    return metrics


def keep_rounds(folder: Path, last: int) -> list[RoundMetrics]:
    """Cut both files after round `last`, to go on from a checkpoint.

    Returns:
        The rounds that are left: 1 to `last`.

    Raises:
        MetricsError: a round up to `last` is missing.
    """
    rounds = read(folder, last)
    if [metrics.round for metrics in rounds] != list(range(1, last + 1)):
        raise MetricsError(f"{folder / JSON_LINES}: has not all of the rounds 1 to {last} that the checkpoint has")
    lines = [json.dumps(asdict(metrics), allow_nan=False) for metrics in rounds]
    write_text(folder / JSON_LINES, "".join(f"{line}\n" for line in lines))
    table = [",".join(COLUMNS), *map(_csv_line, rounds)]
    write_text(folder / CSV, "".join(f"{line}\n" for line in table))
    return rounds


@dataclass(frozen=True)
class ClientMetrics:
    """One line of a run's table of clients, of its last test of all clients.

    Args:
        client: its number.
        domain: of its images, or nothing.
        train_images, test_images: how many it has.
        accuracy, auc, f1: percent; `auc` is None where it is not defined.
    """

    client: int
    domain: str
    train_images: int
    test_images: int
    accuracy: float
    auc: float | None
    f1: float | None


def write_clients(folder: Path, tested: Evaluation, data: FederatedData) -> None:
    """Write the table of clients: a line of `ClientMetrics` for each of them."""
    sizes, domains = data.train_sizes, data.client_domains
    lines = [",".join(item.name for item in fields(ClientMetrics))]
    for row, client in enumerate(tested.clients):
        auc = f"{tested.auc[row]:.4f}" if np.isfinite(tested.auc[row]) else ""
        facts = (client, domains[client], sizes[client], tested.images[row])
        lines.append(_csv_row((*facts, f"{tested.accuracy[row]:.4f}", auc, f"{tested.f1[row]:.4f}")))
    write_text(folder / CLIENTS, "\n".join(lines) + "\n")


def read_clients(folder: Path) -> list[ClientMetrics]:
    """The table of clients of a run; columns that an older file lacks are empty.

    Raises:
        MetricsError: not such a table.
    """
    path = folder / CLIENTS
    with open(path, encoding="utf-8", newline="") as file:
        try:
            return [_client(row) for row in csv.DictReader(file)]
        except (KeyError, TypeError, ValueError) as error:
            raise MetricsError(f"{path}: is not a table of clients of this program") from error


def _client(row: dict[str, str]) -> ClientMetrics:
    auc, f1 = (float(row[name]) if row.get(name) else None for name in ("auc", "f1"))
    sizes = int(row["train_images"]), int(row["test_images"])
    return ClientMetrics(int(row["client"]), row.get("domain") or "", *sizes, float(row["accuracy"]), auc, f1)


def write_summary(folder: Path, rounds: Sequence[RoundMetrics], protocol: str) -> None:
    """Write the last and the best round's record, and by which protocol; nothing if no round tested all clients."""
    found = headline_rounds(rounds)
    if found is None:
        return
    last, best = found
    content = {
        "protocol": protocol,
        "headline": f"{last.headline}_mean",
        "last": asdict(last),
        "best": asdict(best),
        "best_is_chosen_on": "test images",
    }
    write_text(folder / SUMMARY, json.dumps(content, indent=2, allow_nan=False) + "\n")


def _spread(name: str, tested: Evaluation | None) -> dict[str, float | None]:
    keys = [f"{name}_{item.name}" for item in fields(Spread)]
    if tested is None:
        return dict.fromkeys([*keys, f"{name}_loss"])
    values = asdict(tested.spread()).values()
    return {**dict(zip(keys, values, strict=True)), f"{name}_loss": _finite(tested.mean_loss)}


def _finite(value: float | None) -> float | None:
    """JSON has no NaN and no infinity."""
    return value if value is not None and abs(value) < float("inf") else None


def _csv_line(metrics: RoundMetrics) -> str:
    return _csv_row(asdict(metrics).values())


def _csv_row(values: Iterable[object]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="").writerow(values)
    return text.getvalue()
