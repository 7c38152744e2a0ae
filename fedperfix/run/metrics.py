"""A round's figures as one flat record, as JSON Lines and as CSV."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from fedperfix.engine.evaluate import Evaluation, Spread
from fedperfix.engine.round import RoundResult
from fedperfix.run.files import append_line, write_text

JSON_LINES = "metrics.jsonl"
CSV = "metrics.csv"
CLIENTS = "clients.csv"
_ROUND_DIGITS = 6


class MetricsError(ValueError):
    """A metrics file that cannot be continued; the message names it."""


@dataclass(frozen=True)
class RoundMetrics:
    """One line of the metrics files. Accuracies are in percent, times in seconds.

    `local_*` is after local training, over the sampled clients; `sampled_*` and `all_*` are after the aggregation,
    with the new global parameters and the client's own, and None in rounds without evaluation. `worst` is the mean
    of the worst tenth of the clients, `weighted` the mean over test images, the losses are mean cross-entropies.
    """

    round: int
    sampled: int
    dropped: int
    dropped_clients: str
    train_loss: float | None
    train_accuracy: float | None
    local_mean: float
    local_std: float
    local_worst: float
    local_weighted: float
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

    @classmethod
    def of(cls, result: RoundResult, seconds: float) -> RoundMetrics:
        """The record of a round that took `seconds` from the end of the one before."""
        train, aggregate = result.seconds["train"], result.seconds["aggregate"]
        evaluate = result.seconds["evaluate"]
        everyone = result.personalised
        return cls(
            round=result.round,
            sampled=len(result.sampled),
            dropped=len(result.dropped),
            dropped_clients=" ".join(map(str, result.dropped)),
            train_loss=_finite(result.train_loss),
            train_accuracy=result.train_accuracy,
            **_spread("local", result.local),
            **_spread("sampled", everyone.among(result.sampled) if everyone else None),
            **_spread("all", everyone),
            bytes_up=result.bytes_up,
            bytes_down=result.bytes_down,
            images=result.train_images,
            images_per_second=round(result.train_images / train, 1),
            seconds_train=round(train, _ROUND_DIGITS),
            seconds_aggregate=round(aggregate, _ROUND_DIGITS),
            seconds_evaluate=round(evaluate, _ROUND_DIGITS),
            seconds_other=round(max(0.0, seconds - train - aggregate - evaluate), _ROUND_DIGITS),
        )


COLUMNS = tuple(item.name for item in fields(RoundMetrics))


def append(folder: Path, metrics: RoundMetrics) -> None:
    """Add a round to both files of a run folder."""
    if not (folder / CSV).exists():
        append_line(folder / CSV, ",".join(COLUMNS))
    append_line(folder / JSON_LINES, json.dumps(asdict(metrics), allow_nan=False))
    append_line(folder / CSV, _csv_line(metrics))


def read(folder: Path) -> list[RoundMetrics]:
    """The rounds in a run folder, in order.

    Raises:
        MetricsError: a line that is no round.
    """
    path = folder / JSON_LINES
    if not path.exists():
        return []
    rounds = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            rounds.append(RoundMetrics(**json.loads(line)))
        except (TypeError, ValueError) as error:
            raise MetricsError(f"{path}: line {number} is not a round of this program's metrics") from error
    return rounds


def keep_rounds(folder: Path, last: int) -> list[RoundMetrics]:
    """Cut both files after round `last`, to go on from a checkpoint.

    Returns:
        The rounds that are left: 1 to `last`.

    Raises:
        MetricsError: a round up to `last` is missing.
    """
    rounds = [metrics for metrics in read(folder) if metrics.round <= last]
    if [metrics.round for metrics in rounds] != list(range(1, last + 1)):
        raise MetricsError(f"{folder / JSON_LINES}: has not all of the rounds 1 to {last} that the checkpoint has")
    lines = [json.dumps(asdict(metrics), allow_nan=False) for metrics in rounds]
    write_text(folder / JSON_LINES, "".join(f"{line}\n" for line in lines))
    table = [",".join(COLUMNS), *map(_csv_line, rounds)]
    write_text(folder / CSV, "".join(f"{line}\n" for line in table))
    return rounds


def write_clients(folder: Path, tested: Evaluation, train_sizes: list[int]) -> None:
    """Write each client's accuracy in an evaluation over all clients: client, train and test images, percent."""
    lines = ["client,train_images,test_images,accuracy"]
    for client, images, accuracy in zip(tested.clients, tested.images, tested.accuracy, strict=True):
        lines.append(f"{client},{train_sizes[client]},{images},{accuracy:.4f}")
    write_text(folder / CLIENTS, "\n".join(lines) + "\n")


def read_clients(folder: Path) -> list[float]:
    """The clients' accuracies of the last evaluation, in percent."""
    with open(folder / CLIENTS, encoding="utf-8", newline="") as file:
        return [float(row["accuracy"]) for row in csv.DictReader(file)]


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
    text = io.StringIO()
    csv.writer(text, lineterminator="").writerow(asdict(metrics).values())
    return text.getvalue()
