"""MedMNIST's files, in small."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fedperfix.data import DataError, load_dataset
from fedperfix.data.medmnist import CLASSES

SIZES = {"train": 23, "val": 4, "test": 11}
COLOUR = ("pathmnist", "dermamnist", "retinamnist", "bloodmnist")


def write(path: Path, name: str = "organamnist", side: int = 28, **changes) -> dict:
    """A file in the format of the package medmnist, with a few random images of all classes."""
    generator = np.random.default_rng(side)
    arrays = {}
    for split, n in SIZES.items():
        shape = (n, side, side, 3) if name in COLOUR else (n, side, side)
        arrays[f"{split}_images"] = generator.integers(0, 256, shape).astype(np.uint8)
        labels = generator.permutation(n) % len(CLASSES[name])
        arrays[f"{split}_labels"] = labels.astype(np.uint8)[:, None]
    arrays |= changes
    np.savez(path, **{key: value for key, value in arrays.items() if value is not None})
    return arrays


@pytest.mark.parametrize("name", CLASSES)
def test_every_set(tmp_path, name):
    arrays = write(tmp_path / f"{name}.npz", name)
    dataset = load_dataset(name, str(tmp_path))
    assert dataset.inputs.shape == (38, 3 if name in COLOUR else 1, 28, 28)
    pool = np.concatenate([arrays[f"{s}_images"] for s in SIZES])
    assert (dataset.inputs.numpy() == (pool.transpose(0, 3, 1, 2) if name in COLOUR else pool[:, None])).all()
    assert dataset.labels.tolist() == np.concatenate([arrays[f"{s}_labels"] for s in SIZES])[:, 0].tolist()
    assert (dataset.labels.dtype, dataset.class_names) == (torch.int64, CLASSES[name])


def test_numbers_of_classes():
    numbers = dict.fromkeys(("organamnist", "organcmnist", "organsmnist"), 11) | {
        "pathmnist": 9, "dermamnist": 7, "octmnist": 4, "pneumoniamnist": 2, "retinamnist": 5, "breastmnist": 2,
        "bloodmnist": 8, "tissuemnist": 8,
    }  # fmt: skip
    assert {name: len(names) for name, names in CLASSES.items()} == numbers


def test_colour(tmp_path):
    arrays = write(tmp_path / "pathmnist.npz", "pathmnist")
    dataset = load_dataset("pathmnist", tmp_path / "pathmnist.npz")
    assert dataset.inputs.shape == (38, 3, 28, 28)
    for channel in range(3):
        assert (dataset.inputs[:23, channel].numpy() == arrays["train_images"][..., channel]).all()


def test_the_size_that_fits_the_run(tmp_path):
    for side in (28, 64, 128):
        write(tmp_path / ("organamnist.npz" if side == 28 else f"organamnist_{side}.npz"), side=side)
    write(tmp_path / "organcmnist_224.npz", "organcmnist", side=224)
    chosen = {
        size: load_dataset("organamnist", tmp_path, image_size=size).inputs.shape[-1]
        for size in (None, 20, 28, 29, 64, 128, 224)
    }
    assert chosen == {None: 28, 20: 28, 28: 28, 29: 64, 64: 64, 128: 128, 224: 128}
    assert load_dataset("organcmnist", tmp_path).inputs.shape[-1] == 224
    assert load_dataset("organamnist", tmp_path / "organamnist_64.npz", image_size=28).inputs.shape[-1] == 64


def test_wrong_input(tmp_path):
    def refused(message: str, name: str = "organamnist", data_dir: Path | None = tmp_path) -> None:
        with pytest.raises(DataError, match=message):
            load_dataset(name, data_dir)

    refused("--dataset: got chestmnist, whose images have several labels each", "chestmnist")
    refused("--data-dir: not given, --dataset organamnist takes organamnist.npz", data_dir=None)
    refused("--data-dir: no organamnist.npz in .*; takes that file of https://medmnist.com")
    refused("--data-dir: got .*not a file", data_dir=tmp_path / "none.npz")
    file = tmp_path / "organamnist.npz"
    write(file)
    file.write_bytes(file.read_bytes()[:-500])
    refused("organamnist.npz: not a whole .npz file")
    for changes, message in (
        ({"val_labels": None}, "lacks val_labels; takes the keys train_images, train_labels, val_images"),
        ({"test_labels": np.full((11, 1), 11, np.uint8)}, "test_labels from 11 to 11, organamnist has 0 to 10"),
        ({"test_labels": np.zeros((11, 14), np.uint8)}, r"test_labels have type uint8 and shape \[11, 14\] for 11"),
        ({"test_labels": np.zeros((10, 1), np.uint8)}, r"test_labels have .* shape \[10, 1\] for 11 images"),
        ({"test_labels": np.zeros((11, 1))}, "test_labels have type float64"),
        ({"val_images": np.zeros((4, 28, 28))}, "val_images have type float64 and shape .*; fetch it again"),
        ({"val_images": np.zeros((4, 28, 28, 28), np.uint8)}, r"val_images have .* shape \[4, 28, 28, 28\]"),
        ({"val_images": np.zeros((4, 32, 32), np.uint8)}, "images of shapes .* which differ"),
        ({"images": np.zeros(3)}, "has unknown keys images"),
        (
            {"train_labels": np.zeros((23, 1), np.uint8), "test_labels": np.ones((11, 1), np.uint8)},
            r"has no image of 7 of the 11 classes of organamnist, the first is \d+ \(",
        ),
    ):
        write(file, **changes)
        refused(f"organamnist.npz: {message}")
    write(file, "pathmnist")
    refused(r"train_images have type uint8 and shape .23, 28, 28, 3., organamnist has uint8 .n, H, W.;")
    write(tmp_path / "pathmnist.npz", "organamnist")
    refused(r"shape \[23, 28, 28\], pathmnist has uint8 \[n, H, W, 3\]", "pathmnist")
