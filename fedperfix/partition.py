"""`python -m fedperfix.partition FILE.json [options]`: divide a data set among clients without training.

It writes the partition file, which `--partition file --partition-file FILE.json` takes, and beside it FILE.png, the
table of classes by clients. The options are those of python -m fedperfix.train.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from fedperfix.config import ConfigError, parse_args
from fedperfix.data import Dataset, Partition, load_partitioned
from fedperfix.data.partition.file import write_partition
from fedperfix.data.partition.picture import class_counts, draw_partition
from fedperfix.run.cli import cli


@cli
def main(argv: list[str]) -> int:
    """Run the command line.

    Args:
        argv: arguments without the program's name; None is the process's own.

    Returns:
        The exit code: 0, or 2 for wrong input (one sentence on stderr).
    """
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if argv else 2
    target, picture = _targets(argv[0])
    # One client trains in a round: how many do so has nothing to do with the partition.
    dataset, partition = load_partitioned(parse_args(["--sampled", "1", *argv[1:]]))
    target.parent.mkdir(parents=True, exist_ok=True)
    write_partition(target, dataset, partition)
    draw_partition(picture, dataset, partition)
    sizes = [len(train) + len(test) for train, test in zip(partition.train, partition.test, strict=True)]
    print(f"{dataset.name}: {len(dataset.labels):,} samples, {len(dataset.class_names)} classes, {partition.rule}")
    print(f"{len(sizes)} clients of {min(sizes)} to {max(sizes)} samples, {np.mean(sizes):.1f} on average")
    print(f"{_rare_classes(dataset, partition)}")
    for line in _left_out(dataset, sum(sizes)):
        print(line)
    print(f"written      {target}\n             {picture}")
    return 0


def _left_out(dataset: Dataset, given: int) -> list[str]:
    """What no client has, and what the reader of the data skipped: how much, and all of it by name."""
    unassigned = len(dataset.labels) - given
    lines = [f"left out     {unassigned:,} samples that are of no client"] if unassigned else []
    if dataset.skipped:
        lines += [f"skipped      {len(dataset.skipped):,}:", *(f"             {line}" for line in dataset.skipped)]
    return lines


def _targets(name: str) -> tuple[Path, Path]:
    target = Path(name).expanduser()
    if target.suffix != ".json":
        raise ConfigError(
            f"FILE.json: got '{name}', takes the name of a new file that ends in .json, as the first word"
        )
    picture = target.with_suffix(".png")
    for path in (target, picture):
        if path.exists():
            raise ConfigError(f"FILE.json: '{path}' exists; takes the name of a new file, or remove the old one")
    return target, picture


def _rare_classes(dataset: Dataset, partition: Partition) -> str:
    train, test = (class_counts(dataset, parts) > 0 for parts in (partition.train, partition.test))
    held, unseen = (train | test).sum(1), int((test & ~train).sum())
    return f"{held.min()} to {held.max()} classes per client; in {unseen} cases a class is in the test only"


if __name__ == "__main__":
    sys.exit(main())
