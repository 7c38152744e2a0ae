"""The 2D sets of MedMNIST (Yang et al., Scientific Data 2023, arXiv 2110.14795) in their .npz format."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch

from fedperfix.data.arrays import read_npz
from fedperfix.data.dataset import DataError, Dataset

_SPLITS = ("train", "val", "test")
_HOME = "https://medmnist.com"
_ORGANS = (
    "bladder", "left femur", "right femur", "heart", "left kidney", "right kidney", "liver", "left lung",
    "right lung", "pancreas", "spleen",
)  # fmt: skip
CLASSES: dict[str, tuple[str, ...]] = {
    "pathmnist": (
        "adipose", "background", "debris", "lymphocytes", "mucus", "smooth muscle", "normal colon mucosa",
        "cancer-associated stroma", "colorectal adenocarcinoma epithelium",
    ),
    "dermamnist": (
        "actinic keratoses and intraepithelial carcinoma", "basal cell carcinoma", "benign keratosis-like lesions",
        "dermatofibroma", "melanoma", "melanocytic nevi", "vascular lesions",
    ),
    "octmnist": ("choroidal neovascularization", "diabetic macular edema", "drusen", "normal"),
    "pneumoniamnist": ("normal", "pneumonia"),
    "retinamnist": ("grade 0", "grade 1", "grade 2", "grade 3", "grade 4"),
    "breastmnist": ("malignant", "normal or benign"),
    "bloodmnist": (
        "basophil", "eosinophil", "erythroblast", "immature granulocytes", "lymphocyte", "monocyte", "neutrophil",
        "platelet",
    ),
    "tissuemnist": (
        "collecting duct, connecting tubule", "distal convoluted tubule", "glomerular endothelial cells",
        "interstitial endothelial cells", "leukocytes", "podocytes", "proximal tubule segments",
        "thick ascending limb",
    ),
    "organamnist": _ORGANS,
    "organcmnist": _ORGANS,
    "organsmnist": _ORGANS,
}  # fmt: skip
MULTI_LABEL = ("chestmnist",)
_COLOUR = ("pathmnist", "dermamnist", "retinamnist", "bloodmnist")


def load_medmnist(
    name: str, data_dir: Path | None, image_size: int | None, cache_dir: Path | None = None
) -> Dataset:
    """All images of a MedMNIST set, its training, validation and test images in one pool.

    Args:
        name: of the set, such as organamnist.
        data_dir: the file, or the folder of `organamnist.npz` (28 × 28 pixels), `organamnist_64.npz` and so on. Of
            several sizes the smallest one that is not below `image_size` is taken, or the largest.
        image_size: of the run, in pixels; None takes the smallest file.
        cache_dir: of no use here, nothing is decoded.

    Raises:
        DataError: a set with several labels per image, no such file, or one that is truncated or foreign.
    """
    if name in MULTI_LABEL:
        raise DataError(
            f"--dataset: got {name}, whose images have several labels each, but a run trains one label per image; "
            f"take another set, such as {', '.join(list(CLASSES)[:3])}"
        )
    file = _file(name, data_dir, image_size)
    arrays = read_npz(file, [f"{split}_{what}" for split in _SPLITS for what in ("images", "labels")])
    parts = [_part(name, file, arrays, split) for split in _SPLITS]
    if len({images.shape[1:] for images, _ in parts}) > 1:
        shapes = ", ".join(str(list(images.shape)) for images, _ in parts)
        raise DataError(f"{file}: images of shapes {shapes}, which differ; fetch {name} again from {_HOME}")
    images, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    absent = sorted(set(range(len(CLASSES[name]))) - set(labels.tolist()))
    if absent:
        raise DataError(
            f"{file}: has no image of {len(absent)} of the {len(CLASSES[name])} classes of {name}, the first is "
            f"{absent[0]} ('{CLASSES[name][absent[0]]}'); take the file of {name}, or fetch it again from {_HOME}"
        )
    return Dataset(name, torch.from_numpy(images), torch.from_numpy(labels), CLASSES[name])


def _file(name: str, data_dir: Path | None, image_size: int | None) -> Path:
    if data_dir is None:
        raise DataError(f"--data-dir: not given, --dataset {name} takes {name}.npz of {_HOME}, or its folder")
    if not data_dir.is_dir():
        return data_dir
    sizes: dict[int, Path] = {}
    for file in data_dir.glob(f"{name}*.npz"):
        match = re.fullmatch(rf"{name}(?:_(\d+))?\.npz", file.name)
        if match:
            sizes[int(match[1] or 28)] = file
    if not sizes:
        raise DataError(
            f"--data-dir: no {name}.npz in '{data_dir}'; takes that file of {_HOME}, or its folder, or one of the "
            f"larger sizes such as {name}_64.npz"
        )
    enough = [size for size in sizes if size >= (image_size or 0)]
    return sizes[min(enough) if enough else max(sizes)]


def _part(name: str, file: Path, arrays: dict[str, np.ndarray], split: str) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [n, C, H, W] and int64 [n]."""
    images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
    colour = name in _COLOUR
    fits = images.ndim == 4 and images.shape[3] == 3 if colour else images.ndim == 3
    if images.dtype != np.uint8 or not fits or 0 in images.shape[1:]:
        raise DataError(
            f"{file}: {split}_images have type {images.dtype} and shape {list(images.shape)}, {name} has uint8 "
            f"{'[n, H, W, 3]' if colour else '[n, H, W]'}; fetch it again from {_HOME}"
        )
    if labels.shape != (len(images), 1) or labels.dtype.kind not in "iu":
        raise DataError(
            f"{file}: {split}_labels have type {labels.dtype} and shape {list(labels.shape)} for {len(images)} "
            f"images, {name} has one whole number for each; fetch it again from {_HOME}"
        )
    largest = len(CLASSES[name]) - 1
    if labels.size and not 0 <= labels.min() <= labels.max() <= largest:
        raise DataError(
            f"{file}: {split}_labels from {labels.min()} to {labels.max()}, {name} has 0 to {largest}; "
            f"fetch it again from {_HOME}"
        )
    first = images.transpose(0, 3, 1, 2) if colour else images[:, None]
    return first, labels[:, 0].astype(np.int64)
