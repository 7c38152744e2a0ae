"""Data sets of the Hugging Face Hub, or saved by `Dataset.save_to_disk`: `--dataset hf:NAME`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

from fedperfix.data.dataset import DataError, Dataset
from fedperfix.data.pictures import Picture, decode

PREFIX = "hf:"


def load_hf(name: str, data_dir: Path | None, image_size: int | None, cache_dir: Path | None) -> Dataset:
    """The pictures of all splits of a Hugging Face data set, in colour.

    Args:
        name: hf:NAME, or hf:NAME:COLUMN with the column of the labels where there are several. NAME is an id of the
            Hub, such as uoft-cs/cifar100, or the folder that `save_to_disk` has written.
        data_dir: where the package `datasets` keeps what it downloads; None is its own choice.
        image_size: height and width to which the pictures are resized, in pixels.
        cache_dir: where the decoded pictures are kept; None is ~/.cache/fedperfix.

    Raises:
        DataError: the package is not installed, no such data set, no network, no column of pictures or labels.
    """
    if image_size is None:
        raise DataError(
            f"--image-size: not given, and the pictures of {name} may be of any size; "
            "takes the side to which they are resized, such as 32 or 224"
        )
    source, _, column = name.removeprefix(PREFIX).partition(":")
    splits = _splits(name, source, data_dir)
    features = next(iter(splits.values())).features
    image, label = _image_column(name, features), _label_column(name, features, column)
    pictures, labels, skipped = [], [], []
    for split, rows in splits.items():
        codes = rows[label]
        unlabelled = sum(code is None or code < 0 for code in codes)
        if unlabelled:
            skipped.append(f"split {split}: {unlabelled} pictures without a label in '{label}'")
        files = rows.select_columns([image]).cast_column(image, _undecoded())
        for row, code in enumerate(codes):
            if code is not None and code >= 0:
                pictures.append(Picture(f"{split} {row}", partial(_content, files, row, image)))
                labels.append(int(code))
    class_names = tuple(getattr(features[label], "names", None) or map(str, range(max(labels, default=-1) + 1)))
    if not pictures or max(labels) >= len(class_names):
        raise DataError(f"--dataset: {name} has no labelled pictures; takes a data set for classification")
    key = " ".join([*(f"{split} {rows._fingerprint}" for split, rows in splits.items()), image, label])
    decoded = decode(pictures, key, image_size, cache_dir, f"--dataset: {name}")
    return Dataset(
        name=name,
        inputs=decoded.images,
        labels=torch.tensor([labels[row] for row in decoded.kept], dtype=torch.int64),
        class_names=class_names,
        skipped=(*skipped, *decoded.skipped),
        digest=decoded.digest,
    )


def _splits(name: str, source: str, data_dir: Path | None) -> dict[str, Any]:
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"--dataset: got {name}, but the package datasets is not installed; pip install datasets"
        ) from error
    folder = Path(source).expanduser()
    try:
        if folder.is_dir():
            found = datasets.load_from_disk(str(folder))
        else:
            found = datasets.load_dataset(source, cache_dir=None if data_dir is None else str(data_dir))
    except Exception as error:  # the package passes on whatever the network, the disk or a file raised
        raise DataError(
            f"--dataset: {name} cannot be loaded ({type(error).__name__}: {error}); takes the id of a data set of "
            "the Hub, with a network or in the cache of the package datasets, or a folder of save_to_disk"
        ) from error
    return dict(found) if isinstance(found, datasets.DatasetDict) else {"all": found}


def _image_column(name: str, features: Any) -> str:
    columns = [column for column, kind in features.items() if type(kind).__name__ == "Image"]
    if len(columns) != 1:
        got = ", ".join(columns) or f"none of {', '.join(features)}"
        raise DataError(f"--dataset: {name} has as columns of pictures {got}; takes a data set with one of them")
    return columns[0]


def _label_column(name: str, features: Any, asked: str) -> str:
    columns = [column for column, kind in features.items() if type(kind).__name__ == "ClassLabel"]
    columns += [c for c in ("label", "labels") if c not in columns and _is_integer(features.get(c))]
    if asked in columns or (not asked and len(columns) == 1):
        return asked or columns[0]
    got = f"'{asked}' is not" if asked else f"{len(columns)} columns are"
    known = f"takes hf:NAME:COLUMN with one of {', '.join(columns)}" if columns else f"it has {list(features)}"
    raise DataError(f"--dataset: {name}: {got} a column of labels; {known}")


def _is_integer(feature: Any) -> bool:
    return "int" in str(getattr(feature, "dtype", ""))


def _undecoded() -> Any:
    from datasets import Image

    return Image(decode=False)


def _content(files: Any, row: int, column: str) -> bytes:
    entry = files[row][column]
    return entry["bytes"] if entry["bytes"] is not None else Path(entry["path"]).read_bytes()
