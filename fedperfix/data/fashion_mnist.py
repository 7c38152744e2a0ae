"""Fashion-MNIST, embedded: 12,000 of its 70,000 images (Xiao et al., arXiv 1708.07747, MIT licence)."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch

from fedperfix.data.dataset import DataError, ImageDataset

ASSET = Path(__file__).parent / "assets" / "fashion-mnist-12k.npz"
IMAGES_PER_CLASS = 1200
_SHA256 = "4c9eabe74f8defd4344bbcf1714f429a15db8e8885a03f20b14bff734d2e041f"
_CLASSES = (
    "T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip


def load_fashion_mnist(data_dir: Path | None) -> ImageDataset:
    """The embedded subset: 1,200 grey images of 28 × 28 pixels for each of 10 classes.

    Args:
        data_dir: None; the data set is part of the package.

    Raises:
        DataError: a data folder was given, or the package's file is damaged.
    """
    if data_dir is not None:
        raise DataError(f"--data-dir: got '{data_dir}', but fashion-mnist is part of the package; leave it out")
    try:
        damaged = hashlib.sha256(ASSET.read_bytes()).hexdigest() != _SHA256
    except OSError as error:
        raise DataError(f"{ASSET}: {error.strerror}; reinstall fedperfix") from None
    if damaged:
        raise DataError(f"{ASSET}: the file is damaged (checksum); reinstall fedperfix")
    with np.load(ASSET, allow_pickle=False) as file:
        images, labels = torch.from_numpy(file["images"]), torch.from_numpy(file["labels"])
    return ImageDataset("fashion-mnist", images[:, None], labels.long(), _CLASSES)
