"""Every random choice as a function of (seed, purpose, client, round), so that none depends on another's order."""

from __future__ import annotations

import hashlib

import numpy as np


def numpy_generator(seed: int, purpose: str, *, client: int = 0, round: int = 0) -> np.random.Generator:
    """A generator of its own for one random choice.

    Args:
        seed: the run's seed, 0 or more.
        purpose: what is chosen, for example "partition".
        client: whose choice it is, 0 to 2³² − 1.
        round: in which round, 0 to 2³² − 1.

    Returns:
        A generator that is the same on every machine and independent of those of other arguments.

    Raises:
        ValueError: a negative number.
    """
    return np.random.Generator(np.random.PCG64(_sequence(seed, purpose, client, round)))


def torch_seed(seed: int, purpose: str, *, client: int = 0, round: int = 0) -> int:
    """A seed for `torch.manual_seed`, from 0 to 2⁶³ − 1; arguments as in `numpy_generator`."""
    return int(_sequence(seed, purpose, client, round).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _sequence(seed: int, purpose: str, client: int, round: int) -> np.random.SeedSequence:
    if min(seed, client, round) < 0:
        raise ValueError(f"seed, client, round: got {seed}, {client}, {round}, takes numbers of at least 0")
    # Python's hash() of a text differs from process to process. Four 32-bit words, one each for client and round.
    words = np.frombuffer(hashlib.sha256(purpose.encode()).digest()[:16], dtype="<u4")
    return np.random.SeedSequence(seed, spawn_key=(*map(int, words), client, round))
