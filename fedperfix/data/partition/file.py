"""A partition as a JSON file, tied to its data set by checksums, so that others can compare on the same split."""

from __future__ import annotations

import hashlib
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fedperfix.data.dataset import DataError, Dataset
from fedperfix.data.partition import Partition
from fedperfix.run.files import write_text

PARTITION = "partition.json"  # in the folder of a run
FORMAT = "fedperfix partition 1"
_ROWS_AT_ONCE = 4096


def describe_dataset(dataset: Dataset) -> dict[str, Any]:
    """What a partition file says about its data set: name, samples, classes, SHA-256 of labels and inputs.

    The inputs' checksum is that of the tensor's bytes, or `Dataset.digest` where there is one, so that it does not
    depend on the size at which pictures are stored.
    """
    return {
        "name": dataset.name,
        "samples": len(dataset.labels),
        "classes": len(dataset.class_names),
        "labels_sha256": _sha256(dataset.labels),
        "inputs_sha256": dataset.digest or _sha256(dataset.inputs),
    }


def write_partition(path: Path, dataset: Dataset, partition: Partition) -> None:
    """Write a partition file, in one step.

    Args:
        path: of the file; one that exists is replaced.
        dataset: whose samples the indices are.
        partition: what to write; its own rule or anybody's.

    Raises:
        OSError: it cannot be written.
    """
    clients = [
        {"train": train.tolist(), "test": test.tolist()}
        for train, test in zip(partition.train, partition.test, strict=True)
    ]
    head = {"format": FORMAT, "dataset": describe_dataset(dataset), "rule": partition.rule}
    lines = ",\n".join(json.dumps(client, separators=(",", ":")) for client in clients)
    text = json.dumps(head, indent=1, ensure_ascii=False).removesuffix("\n}")
    write_text(path, f'{text},\n "clients": [\n{lines}\n]}}\n')


def read_partition(path: Path, dataset: Dataset, clients: int) -> Partition:
    """Read a partition file and check that it is one of this data set and number of clients.

    Args:
        path: of the file.
        dataset: which it must be of.
        clients: how many it must have.

    Raises:
        DataError: no such file, not a partition file, of another data set, or with indices that are out of range,
            in two places, or that divide a group between training and testing.
    """
    content = _read(path)
    _check_dataset(path, content["dataset"], dataset)
    if len(content["clients"]) != clients:
        raise DataError(
            f"--clients: got {clients}, but the partition in {path} has {len(content['clients'])}; take that number"
        )
    train, test = (
        [_indices(path, content, client, side) for client in range(clients)] for side in ("train", "test")
    )
    _check_indices(path, train + test, len(dataset.labels))
    _check_groups(path, dataset, np.concatenate(train), np.concatenate(test))
    return Partition(tuple(train), tuple(test), content["rule"])


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT or not isinstance(content["rule"], str):
            raise ValueError(f"its format is {content['format']!r}")
        if not isinstance(content["dataset"], dict) or not content["clients"]:
            raise ValueError("it has no data set or no clients")
    except OSError as error:
        raise DataError(
            f"--partition-file: cannot read '{path}' ({error.strerror}); takes a file that a run or "
            "python -m fedperfix.partition has written"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}: not a whole partition file ({type(error).__name__}: {error}); write one with "
            "python -m fedperfix.partition"
        ) from error
    return content


def _check_dataset(path: Path, expected: dict[str, Any], dataset: Dataset) -> None:
    """The name may differ: the same arrays may come from another file."""
    found = describe_dataset(dataset)
    for key, what in (
        ("samples", "samples"),
        ("classes", "classes"),
        ("labels_sha256", "labels (SHA-256)"),
        ("inputs_sha256", "inputs (SHA-256)"),
    ):
        if expected.get(key) != found[key]:
            raise DataError(
                f"{path}: a partition of another data set, {expected.get('name')}: its {what} are "
                f"{_short(expected.get(key))}, those of {found['name']} are {_short(found[key])}; take that data "
                "set, or write a partition of this one with python -m fedperfix.partition"
            )


def _indices(path: Path, content: dict[str, Any], client: int, side: str) -> np.ndarray:
    entry = content["clients"][client]
    values = entry.get(side) if isinstance(entry, dict) else None
    if not isinstance(values, list) or not all(type(value) is int for value in values):
        raise DataError(
            f"{path}: client {client} has no list of whole numbers as '{side}'; takes one for each client"
        )
    if not values:
        raise DataError(
            f"{path}: client {client} has no sample in '{side}'; takes at least one for training and one for "
            "testing"
        )
    if not all(abs(value) < 2**62 for value in values):  # NumPy has no larger ones
        raise DataError(
            f"{path}: client {client} has the index {max(values, key=abs)} in '{side}'; write the file again"
        )
    return np.sort(np.array(values, np.int64))


def _check_indices(path: Path, parts: list[np.ndarray], samples: int) -> None:
    everything = np.concatenate(parts)
    if everything.min() < 0 or everything.max() >= samples:
        raise DataError(
            f"{path}: indices from {everything.min()} to {everything.max()}, takes 0 to {samples - 1}, the "
            "samples of the data set; write the file again"
        )
    uses = np.bincount(everything, minlength=samples)
    if uses.max() > 1:
        raise DataError(
            f"{path}: {int((uses > 1).sum())} samples are in more than one place, the first is "
            f"{int(uses.argmax())}; takes each sample once, for one client, for training or for testing"
        )


def _check_groups(path: Path, dataset: Dataset, train: np.ndarray, test: np.ndarray) -> None:
    if dataset.groups is None:
        return
    groups = dataset.groups.numpy()
    divided = np.intersect1d(groups[train], groups[test])
    if len(divided):
        raise DataError(
            f"{path}: {len(divided)} groups of {dataset.name} have samples for training and for testing, so that "
            "what is tested has been seen; hold out whole groups, or bring the data without groups"
        )


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) < 20 else text[:8] + "…"


def _sha256(tensor: Tensor) -> str:
    """Of type, shape and content, so many rows at a time that no copy of the whole is made."""
    digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}".encode())
    for start in itertools.count(0, _ROWS_AT_ONCE):
        rows = tensor[start : start + _ROWS_AT_ONCE]
        if not len(rows):
            return digest.hexdigest()
        digest.update(rows.contiguous().numpy().tobytes())
    raise AssertionError("unreachable")
