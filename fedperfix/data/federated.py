"""A data set spread over clients, held once as uint8 on the training device."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedperfix.data.dataset import ImageDataset
from fedperfix.data.partition import default_min_client_size, dirichlet_partition, train_test_split


@dataclass(frozen=True)
class FederatedData:
    """One pool of images and, per client, which of them are for training and for testing.

    Args:
        images: uint8 [n, channels, height, width].
        labels: int64 [n].
        train, test: one int64 index tensor per client, on the images' device.
        class_names: one per class.
    """

    images: Tensor
    labels: Tensor
    train: tuple[Tensor, ...]
    test: tuple[Tensor, ...]
    class_names: tuple[str, ...]

    @classmethod
    def build(
        cls,
        dataset: ImageDataset,
        *,
        clients: int,
        alpha: float,
        min_client_size: int | None,
        test_fraction: float,
        seed: int,
        device: torch.device,
    ) -> FederatedData:
        """Partition `dataset` over clients and move it to `device`.

        Args:
            dataset: the pool.
            clients, alpha, seed: as in `dirichlet_partition`.
            min_client_size: images of the smallest client; None is `default_min_client_size`.
            test_fraction: of each client's images.
            device: where images, labels and indices are kept.

        Raises:
            DataError: no such partition exists.
        """
        if min_client_size is None:
            min_client_size = default_min_client_size(len(dataset.labels), clients)
        parts = dirichlet_partition(dataset.labels.numpy(), clients, alpha, min_client_size, seed)
        splits = [train_test_split(part, test_fraction, seed, client) for client, part in enumerate(parts)]

        def on_device(indices: np.ndarray) -> Tensor:
            return torch.from_numpy(indices).to(device)

        return cls(
            images=dataset.images.to(device),
            labels=dataset.labels.to(device),
            train=tuple(on_device(train) for train, _ in splits),
            test=tuple(on_device(test) for _, test in splits),
            class_names=dataset.class_names,
        )

    @property
    def clients(self) -> int:
        """How many clients there are."""
        return len(self.train)

    @property
    def train_sizes(self) -> list[int]:
        """Training images per client: the weights of FedAvg."""
        return [len(indices) for indices in self.train]

    def class_counts(self) -> Tensor:
        """int64 [clients, classes]: images of each class at each client, train and test together."""
        classes = len(self.class_names)
        return torch.stack(
            [
                torch.bincount(self.labels[torch.cat(part)], minlength=classes)
                for part in zip(self.train, self.test, strict=True)
            ]
        )
