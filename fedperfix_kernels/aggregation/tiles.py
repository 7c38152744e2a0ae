"""The ranges of elements that PyTorch's operations take at a time; noise is drawn in them, too."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from fedperfix_kernels.arena import BLOCK

_TILE = 1 << 18  # elements of a tile over all clients: 1 MiB of float32, within a core's cache


def columns_of(uploads: Tensor) -> Iterator[slice]:
    """Ranges of whole blocks that cover P, each a tile's worth. uploads: [K, P]."""
    width = max(BLOCK, _TILE // len(uploads) // BLOCK * BLOCK)
    for first in range(0, uploads.shape[1], width):
        yield slice(first, min(first + width, uploads.shape[1]))
