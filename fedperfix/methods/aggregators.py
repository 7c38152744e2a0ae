"""How the server turns the clients' uploads into new global parameters: `--aggregator` and `--dp central`.

The operations are those of `fedperfix_kernels.aggregation`; here is which of them a run uses, and with what.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedperfix.config import ConfigError, TrainConfig
from fedperfix.randomness import torch_seed
from fedperfix_kernels import aggregate, krum, noisy_mean, trimmed_mean

if TYPE_CHECKING:
    from fedperfix.engine.state import Server, Uploads


def combine(config: TrainConfig, server: Server, uploads: Uploads, weights: Tensor) -> None:
    """Put the new global parameters into `server.shared`.

    Args:
        config: says how.
        server: the global parameters of the last round.
        uploads: of K clients.
        weights: float64 [K] on the CPU, each client's share of their training images; only `mean` uses them.
    """
    if config.dp == "central":
        _private(config, server, uploads)
    else:
        _RULES[config.aggregator](config, server, uploads, weights)


def shares(config: TrainConfig, images: Sequence[int]) -> Tensor:
    """The clients' shares of an aggregation: float64 [K] on the CPU, sum 1.

    With `--dp` all are equal: how many images a client has is part of what must not be learned.

    Args:
        config: of the run.
        images: how many training images each of the K clients has.
    """
    sizes = torch.tensor(images, dtype=torch.float64)
    if config.dp != "none":
        sizes.fill_(1)
    return sizes / sizes.sum()


def hostile(config: TrainConfig) -> int:
    """How many clients of a round may be hostile: `--byzantine`, or a fifth of the sampled ones."""
    return -(-config.sampled // 5) if config.byzantine is None else config.byzantine


def validate(config: TrainConfig) -> None:
    """Check that so many clients are enough for the rule.

    Raises:
        ConfigError: they are not.
    """
    if config.aggregator == "mean":
        if config.byzantine is not None:
            raise ConfigError("--byzantine: takes another --aggregator than mean, which trusts all clients")
        return
    count = hostile(config)
    needed = 2 * count + (3 if config.aggregator == "multi-krum" else 1)
    if config.sampled < needed:
        raise ConfigError(
            f"--sampled: got {config.sampled}, takes at least {needed} with --aggregator {config.aggregator} and "
            f"--byzantine {count}"
        )


def _mean(config: TrainConfig, server: Server, uploads: Uploads, weights: Tensor) -> None:
    aggregate(uploads.shared, weights, layout=server.layout, out=server.shared, backend=server.backend)


def _median(config: TrainConfig, server: Server, uploads: Uploads, weights: Tensor) -> None:
    trimmed_mean(uploads.shared, (len(uploads.clients) - 1) // 2, out=server.shared, backend=server.backend)


def _trimmed_mean(config: TrainConfig, server: Server, uploads: Uploads, weights: Tensor) -> None:
    trim = min(hostile(config), (len(uploads.clients) - 1) // 2)
    trimmed_mean(uploads.shared, trim, out=server.shared, backend=server.backend)


def _multi_krum(config: TrainConfig, server: Server, uploads: Uploads, weights: Tensor) -> None:
    """The mean of the K − b uploads nearest to the others; the global model stays if there are fewer than three.

    If clients were left out, hostile ones may still be among the rest: b stays what it was, and the distances are
    taken with the largest b that so few allow.
    """
    clients = len(uploads.clients)
    if clients < 3:
        return
    byzantine, select = min(hostile(config), (clients - 3) // 2), max(clients - hostile(config), 1)
    before = server.shared.clone()
    krum(uploads.shared, before, byzantine, select, out=server.shared, backend=server.backend)


def _private(config: TrainConfig, server: Server, uploads: Uploads) -> None:
    """The clipped mean over all clients of the round, with noise; one that was left out counts as no update."""
    before = server.shared.clone()
    missing = config.sampled - len(uploads.clients)
    rows = torch.cat((uploads.shared, before.expand(missing, -1))) if missing else uploads.shared
    seed = torch_seed(config.seed, "central noise", round=uploads.round)
    noisy_mean(rows, before, config.dp_clip, config.dp_noise, seed, out=server.shared, backend=server.backend)


_RULES: dict[str, Callable[[TrainConfig, Server, Uploads, Tensor], None]] = {
    "mean": _mean,
    "median": _median,
    "trimmed-mean": _trimmed_mean,
    "multi-krum": _multi_krum,
}
AGGREGATORS = tuple(_RULES)
