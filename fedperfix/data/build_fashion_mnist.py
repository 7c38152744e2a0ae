"""Build the embedded Fashion-MNIST subset: `python -m fedperfix.data.build_fashion_mnist SOURCE_DIR`.

SOURCE_DIR holds the four original files (`train-images-idx3-ubyte.gz`, …), for example
/usr/share/datasets/fashion-mnist of Debian's package dataset-fashion-mnist.
"""

from __future__ import annotations

import gzip
import sys
from pathlib import Path

import numpy as np

from fedperfix.data.fashion_mnist import ASSET, IMAGES_PER_CLASS


def build(source: Path, target: Path) -> None:
    """Draw `IMAGES_PER_CLASS` images of each class from train and test together and store them compressed."""
    images = np.concatenate([_read(source, part, "images-idx3", 16) for part in ("train", "t10k")])
    labels = np.concatenate([_read(source, part, "labels-idx1", 8) for part in ("train", "t10k")])
    images = images.reshape(-1, 28, 28)
    generator = np.random.default_rng(0)
    chosen = np.concatenate(
        [generator.choice(np.flatnonzero(labels == c), IMAGES_PER_CLASS, replace=False) for c in range(10)]
    )
    chosen.sort()
    target.parent.mkdir(exist_ok=True)
    np.savez_compressed(target, images=images[chosen], labels=labels[chosen])


def _read(source: Path, part: str, kind: str, header: int) -> np.ndarray:
    with gzip.open(source / f"{part}-{kind}-ubyte.gz") as file:
        return np.frombuffer(file.read(), np.uint8, offset=header)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    build(Path(sys.argv[1]), ASSET)
