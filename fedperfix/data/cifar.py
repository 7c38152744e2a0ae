"""CIFAR-10 and CIFAR-100 (Krizhevsky, 2009) in their two standard on-disk formats.

The binary version is read as it is. The Python version's files are pickles; they are read by an unpickler that can
rebuild NumPy arrays and nothing else, so a file from a stranger cannot run code.
"""

from __future__ import annotations

import pickle  # noqa: TID251  (only for _ArraysOnly, which admits no code)
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fedperfix.data.dataset import DataError, ImageDataset

_PIXELS = 3 * 32 * 32


@dataclass(frozen=True)
class _Format:
    """Where one data set's files are and what they hold."""

    name: str
    binary_folder: str
    binary_files: tuple[str, ...]
    label_bytes: int
    python_folder: str
    python_files: tuple[str, ...]
    label_key: bytes
    classes: int
    archive: str


_CIFAR10 = _Format(
    "cifar10",
    "cifar-10-batches-bin",
    (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"),
    1,
    "cifar-10-batches-py",
    (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"),
    b"labels",
    10,
    "cifar-10-python.tar.gz or cifar-10-binary.tar.gz",
)
_CIFAR100 = _Format(
    "cifar100",
    "cifar-100-binary",
    ("train.bin", "test.bin"),
    2,
    "cifar-100-python",
    ("train", "test"),
    b"fine_labels",
    100,
    "cifar-100-python.tar.gz or cifar-100-binary.tar.gz",
)


def load_cifar10(data_dir: Path | None) -> ImageDataset:
    """All 60,000 images of CIFAR-10 from a folder.

    Args:
        data_dir: the folder that holds `cifar-10-batches-bin` or `cifar-10-batches-py`, or one of these itself.
            A folder that does not exist yet is filled by torchvision's download.

    Raises:
        DataError: no such files, no network to fetch them, or files that are truncated or foreign.
    """
    return _load(_CIFAR10, data_dir)


def load_cifar100(data_dir: Path | None) -> ImageDataset:
    """All 60,000 images of CIFAR-100 with their fine labels; folders `cifar-100-binary` or `cifar-100-python`.

    Args and Raises: as `load_cifar10`.
    """
    return _load(_CIFAR100, data_dir)


def _load(form: _Format, data_dir: Path | None) -> ImageDataset:
    if data_dir is None:
        raise DataError(f"--data-dir: got none, {form.name} takes the folder of its files (to be downloaded there)")
    if data_dir.exists() and not data_dir.is_dir():
        raise DataError(f"--data-dir: got '{data_dir}', which is a file; takes the folder that holds {form.name}")
    if not data_dir.exists():
        _download(form, data_dir)
    read, files = _find(form, data_dir)
    parts = [read(form, file) for file in files]
    images = np.concatenate([images for images, _ in parts]).reshape(-1, 3, 32, 32)
    labels = np.concatenate([labels for _, labels in parts])
    names = tuple(str(i) for i in range(form.classes))
    return ImageDataset(form.name, torch.from_numpy(images), torch.from_numpy(labels), names)


_Reader = Callable[[_Format, Path], tuple[np.ndarray, np.ndarray]]


def _find(form: _Format, data_dir: Path) -> tuple[_Reader, list[Path]]:
    readers: tuple[tuple[str, tuple[str, ...], _Reader], ...] = (
        (form.binary_folder, form.binary_files, _read_binary),
        (form.python_folder, form.python_files, _read_python),
    )
    for subfolder, names, read in readers:
        for folder in (data_dir / subfolder, data_dir):
            files = [folder / name for name in names]
            present = [file.is_file() for file in files]
            if all(present):
                return read, files
            if any(present):
                missing = ", ".join(file.name for file, there in zip(files, present, strict=True) if not there)
                raise DataError(f"{folder}: {form.name} is incomplete, {missing} is missing; unpack it again")
    raise DataError(
        f"--data-dir: got '{data_dir}', which holds no {form.name}; takes a folder with "
        f"{form.binary_folder}/{form.binary_files[0]} … or {form.python_folder}/{form.python_files[0]} … "
        f"(unpack {form.archive}), or one that does not exist yet, to download into"
    )


def _download(form: _Format, data_dir: Path) -> None:
    from torchvision import datasets

    loader = datasets.CIFAR10 if form.name == "cifar10" else datasets.CIFAR100
    try:
        loader(root=str(data_dir), download=True)
    except Exception as error:  # torchvision passes on whatever the network raised
        if data_dir.is_dir() and not any(data_dir.iterdir()):
            data_dir.rmdir()
        raise DataError(
            f"--data-dir: '{data_dir}' does not exist and {form.name} could not be downloaded into it "
            f"({type(error).__name__}); unpack {form.archive} there by hand"
        ) from None


def _read_binary(form: _Format, file: Path) -> tuple[np.ndarray, np.ndarray]:
    record = form.label_bytes + _PIXELS
    content = np.fromfile(file, np.uint8)
    if content.size == 0 or content.size % record:
        raise DataError(f"{file}: {content.size} bytes are no whole number of {form.name} records; unpack it again")
    rows = content.reshape(-1, record)
    labels = rows[:, form.label_bytes - 1].astype(np.int64)
    return np.ascontiguousarray(rows[:, form.label_bytes :]), _checked_labels(form, file, labels)


def _read_python(form: _Format, file: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        with file.open("rb") as stream:
            content = _ArraysOnly(stream, encoding="bytes").load()
        images = np.asarray(content[b"data"], np.uint8)
        labels = np.asarray(content[form.label_key], np.int64)
    except Exception as error:
        raise DataError(f"{file}: not a {form.name} file ({error}); unpack {form.archive} again") from None
    if images.ndim != 2 or images.shape != (len(labels), _PIXELS):
        raise DataError(f"{file}: images of shape {images.shape}, takes [n, {_PIXELS}]; unpack it again")
    return images, _checked_labels(form, file, labels)


def _checked_labels(form: _Format, file: Path, labels: np.ndarray) -> np.ndarray:
    if labels.size and not 0 <= labels.min() <= labels.max() < form.classes:
        takes = f"0 to {form.classes - 1}"
        raise DataError(f"{file}: labels from {labels.min()} to {labels.max()}, {form.name} takes {takes}")
    return labels


class _ArraysOnly(pickle.Unpickler):
    """Rebuilds arrays and nothing else: every other global is refused before it is imported."""

    _ALLOWED = frozenset(
        {
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "_reconstruct"),
            ("_codecs", "encode"),
        }
    )

    def find_class(self, module: str, name: str) -> object:
        if (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        if name == "_reconstruct":
            return np.ndarray.__reduce__(np.empty(0))[0]
        return super().find_class(module, name)
