"""Batcher's odd-even merge sort as a list of comparators (K. E. Batcher, AFIPS 1968)."""

from __future__ import annotations

import functools
from collections.abc import Iterable

Pairs = tuple[tuple[int, int], ...]


@functools.lru_cache(maxsize=256)
def comparators(count: int) -> Pairs:
    """The pairs (i, j), i < j, that sort `count` rows when row i takes the minimum and row j the maximum."""
    pairs, block = [], 1
    while block < count:
        step = block
        while step:
            pairs += [
                (first, first + step)
                for start in range(step % block, count - step, 2 * step)
                for first in range(start, min(start + step, count - step))
                if first // (2 * block) == (first + step) // (2 * block)
            ]
            step //= 2
        block *= 2
    return tuple(pairs)


def leading_to(pairs: Pairs, ranks: Iterable[int]) -> Pairs:
    """Those of `pairs` that the rows `ranks` depend on, in the same order."""
    needed, kept = set(ranks), []
    for pair in reversed(pairs):
        if needed.intersection(pair):
            needed.update(pair)
            kept.append(pair)
    return tuple(reversed(kept))
