"""What a data set is once loaded."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fedperfix.config import ConfigError


class DataError(ConfigError):
    """A data set or partition that cannot be used; the message names the option or file and the remedy."""


@dataclass(frozen=True)
class ImageDataset:
    """All images of a data set in memory, train and test merged into one pool, as in the paper's protocol.

    Args:
        name: as given to `--dataset`.
        images: uint8 [n, channels, height, width].
        labels: int64 [n], from 0.
        class_names: one per class.
    """

    name: str
    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...]
