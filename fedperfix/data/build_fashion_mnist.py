"""Build the embedded Fashion-MNIST subset: `python -m fedperfix.data.build_fashion_mnist SOURCE_DIR`.

SOURCE_DIR holds the four original files (`train-images-idx3-ubyte.gz`, …), for example
/usr/share/datasets/fashion-mnist of Debian's package dataset-fashion-mnist.
"""

from __future__ import annotations

import gzip
import hashlib
import sys
from pathlib import Path

import numpy as np

from fedperfix.data.fashion_mnist import ASSET, CLASS_NAMES, IMAGES_PER_CLASS


def build(source: Path, target: Path) -> str:
    """Draw `IMAGES_PER_CLASS` images of each class from train and test together and store them compressed.

    Args:
        source: folder of the four original files.
        target: the .npz file to write.

    Returns:
        SHA-256 of the written file, which `fashion_mnist.SHA256` must repeat.

    Raises:
        OSError: a file cannot be read or written.
    """
    images = np.concatenate([_read(source, part, "images-idx3", 16) for part in ("train", "t10k")])
    labels = np.concatenate([_read(source, part, "labels-idx1", 8) for part in ("train", "t10k")])
    images = images.reshape(len(labels), 28, 28)
    generator = np.random.default_rng(0)
    chosen = [
        generator.choice(np.flatnonzero(labels == c), IMAGES_PER_CLASS, replace=False)
        for c in range(len(CLASS_NAMES))
    ]
    rows = np.sort(np.concatenate(chosen))
    np.savez_compressed(target, images=images[rows], labels=labels[rows])
    return hashlib.sha256(target.read_bytes()).hexdigest()


def _read(source: Path, part: str, kind: str, header: int) -> np.ndarray:
    with gzip.open(source / f"{part}-{kind}-ubyte.gz") as file:
        return np.frombuffer(file.read(), np.uint8, offset=header)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    print(build(Path(sys.argv[1]), ASSET), ASSET)
