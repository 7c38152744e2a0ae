"""Label-skewed partition of a pool of images over clients, and each client's train/test split."""

from __future__ import annotations

import numpy as np

from fedperfix.data.dataset import DataError
from fedperfix.randomness import numpy_generator

_REDRAWS = 10_000


def default_min_client_size(images: int, clients: int) -> int:
    """The paper's 256 images of 60,000 over 64 clients, in proportion: 27.3 % of the mean client size."""
    return max(2, round(256 / (60_000 / 64) * images / clients))


def dirichlet_partition(
    labels: np.ndarray, clients: int, alpha: float, min_size: int, seed: int
) -> list[np.ndarray]:
    """Split a pool over clients by a Dirichlet distribution of every class (Sun et al., ICCV 2023, section 4).

    Per class, the clients' shares are drawn from Dirichlet(alpha); shares of clients that already have more than the
    mean number of images are set to zero. The whole partition is drawn again until the smallest client has
    `min_size` images.

    Args:
        labels: int [n].
        clients: how many, at least 1.
        alpha: concentration, above 0; small is skewed.
        min_size: images of the smallest client.
        seed: the run's seed.

    Returns:
        One sorted index array per client; every image is in exactly one.

    Raises:
        DataError: no partition found; the message says which options to change.
    """
    if clients * min_size > len(labels):
        raise DataError(
            f"--min-client-size: got {min_size}, but {len(labels)} images over {clients} clients are "
            f"{len(labels) // clients} each; takes at most that, or choose fewer --clients"
        )
    generator = numpy_generator(seed, "partition")
    by_class = [np.flatnonzero(labels == c) for c in np.unique(labels)]
    for _ in range(_REDRAWS):
        counts = _draw_counts([len(members) for members in by_class], clients, alpha, len(labels), generator)
        if counts.sum(0).min() >= min_size:
            return _assign(by_class, counts, generator)
    raise DataError(
        f"--alpha: got {alpha}; in {_REDRAWS} draws some client always had fewer than {min_size} images; "
        "take a larger --alpha, fewer --clients or a smaller --min-client-size"
    )


def train_test_split(
    indices: np.ndarray, test_fraction: float, seed: int, client: int
) -> tuple[np.ndarray, np.ndarray]:
    """A client's random split; at least one image on each side.

    Args:
        indices: the client's images, at least 2.
        test_fraction: share of test images, between 0 and 1.
        seed, client: which split.

    Returns:
        Sorted train and test indices.
    """
    shuffled = numpy_generator(seed, "split", client=client).permutation(indices)
    test = min(max(1, round(len(indices) * test_fraction)), len(indices) - 1)
    return np.sort(shuffled[test:]), np.sort(shuffled[:test])


def _draw_counts(
    class_sizes: list[int], clients: int, alpha: float, images: int, generator: np.random.Generator
) -> np.ndarray:
    """[classes, clients] images of each class at each client."""
    counts = np.zeros((len(class_sizes), clients), np.int64)
    for row, size in zip(counts, class_sizes, strict=True):
        shares = generator.dirichlet(np.full(clients, alpha))
        shares[counts.sum(0) >= images / clients] = 0
        if shares.sum() == 0:  # every client that may still receive drew a share of zero
            shares[counts.sum(0) < images / clients] = 1
        cuts = (np.cumsum(shares / shares.sum())[:-1] * size).astype(np.int64)
        row[:] = np.diff(cuts, prepend=0, append=size)
    return counts


def _assign(by_class: list[np.ndarray], counts: np.ndarray, generator: np.random.Generator) -> list[np.ndarray]:
    pieces = [
        np.split(generator.permutation(members), np.cumsum(row)[:-1])
        for members, row in zip(by_class, counts, strict=True)
    ]
    return [np.sort(np.concatenate(client)) for client in zip(*pieces, strict=True)]
