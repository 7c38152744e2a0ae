"""Data sets by name, their partition over clients, and the way from pixels to the model's input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

from fedperfix.config import TrainConfig
from fedperfix.data.arrays import arrays_dataset, load_npz
from fedperfix.data.cifar import load_cifar10, load_cifar100
from fedperfix.data.dataset import DataError, Dataset
from fedperfix.data.fashion_mnist import load_fashion_mnist
from fedperfix.data.federated import FederatedData
from fedperfix.data.huggingface import PREFIX, load_hf
from fedperfix.data.medmnist import CLASSES as MEDMNIST
from fedperfix.data.medmnist import MULTI_LABEL, load_medmnist
from fedperfix.data.partition import Options, Partition, make_partition
from fedperfix.data.partition.file import PARTITION, read_partition
from fedperfix.data.preprocess import Preprocess
from fedperfix.data.text_files import load_texts
from fedperfix.data.texts import text_dataset
from fedperfix.data.trees import load_domain_folder, load_image_folder
from fedperfix.data.wordnet import load_wordnet

# A data set is one function from `--data-dir` to its samples,
DATASETS: dict[str, Callable[[Path | None], Dataset]] = {
    "fashion-mnist": load_fashion_mnist,
    "cifar10": load_cifar10,
    "cifar100": load_cifar100,
    "npz": load_npz,
    "texts": load_texts,
    "wordnet-glosses": load_wordnet,
}
# Those of them whose samples are texts.
TEXT_DATASETS = ("wordnet-glosses", "texts")
# or one that also takes the run's `--image-size` and `--cache-dir`.
SIZED_DATASETS: dict[str, Callable[[Path | None, int | None, Path | None], Dataset]] = {
    "image-folder": load_image_folder,
    "domain-folder": load_domain_folder,
    **{name: partial(load_medmnist, name) for name in (*MEDMNIST, *MULTI_LABEL)},
}


def load_dataset(
    name: str,
    data_dir: str | Path | None = None,
    *,
    image_size: int | None = None,
    cache_dir: str | Path | None = None,
) -> Dataset:
    """Load the data set `name`: one of `DATASETS` or `SIZED_DATASETS`, or hf:NAME.

    Args:
        name: as given to `--dataset`.
        data_dir: the folder or file of its data; None for an embedded one.
        image_size: side in pixels to which picture files are resized when they are decoded, or that decides which
            of several files is read; other data sets are resized during training.
        cache_dir: where decoded picture files are kept; None is ~/.cache/fedperfix.

    Raises:
        DataError: an unknown name, or files that are missing, truncated or foreign.
    """
    where, cache = (None if path is None else Path(path).expanduser() for path in (data_dir, cache_dir))
    if name in DATASETS:
        return DATASETS[name](where)
    if name in SIZED_DATASETS:
        return SIZED_DATASETS[name](where, image_size, cache)
    if name.startswith(PREFIX):
        return load_hf(name, where, image_size, cache)
    raise DataError(
        f"--dataset: got {name!r}, takes one of {', '.join((*DATASETS, *SIZED_DATASETS))} or {PREFIX}NAME"
    )


def load_partitioned(config: TrainConfig) -> tuple[Dataset, Partition]:
    """The data set of a configuration, and which samples are whose.

    A resumed run takes the partition in its folder, which also finds data that have changed since.

    Raises:
        DataError: as `load_dataset`, `make_partition` and `read_partition`.
    """
    dataset = load_dataset(
        config.dataset, config.data_dir, image_size=config.image_size, cache_dir=config.cache_dir
    )
    if config.samples is not None:
        dataset = dataset.sample(config.samples)
    own = None if config.resume is None else Path(config.resume) / PARTITION
    if own is not None and own.exists():
        return dataset, read_partition(own, dataset, config.clients)
    if config.partition_file is not None:
        file = Path(config.partition_file).expanduser()
        found = read_partition(file, dataset, config.clients)
        return dataset, replace(found, rule=f"{found.rule}, from {file}")
    return dataset, make_partition(dataset, Options(**{f.name: getattr(config, f.name) for f in fields(Options)}))


__all__ = [
    "DATASETS",
    "SIZED_DATASETS",
    "TEXT_DATASETS",
    "DataError",
    "Dataset",
    "FederatedData",
    "Partition",
    "Preprocess",
    "arrays_dataset",
    "load_dataset",
    "load_partitioned",
    "text_dataset",
]
