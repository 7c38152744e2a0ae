"""Clients that lie, to try what the server does about them: `--attack`, by `--attackers` of all clients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from fedperfix.config import ConfigError, TrainConfig
from fedperfix.data import FederatedData
from fedperfix.randomness import numpy_generator, torch_seed

LABELS = "label-flip"


def validate(config: TrainConfig) -> None:
    """Check that somebody lies if there is an attack.

    Raises:
        ConfigError: nobody does.
    """
    if config.attack != "none" and _count(config) == 0:
        raise ConfigError(
            f"--attackers: got {config.attackers:g}, takes at least {1 / config.clients:.4g} with --clients "
            f"{config.clients}, so that one is hostile"
        )


def attackers(config: TrainConfig) -> frozenset[int]:
    """The clients that lie, the same in all rounds: `--attackers` of all, drawn by the seed."""
    if config.attack == "none":
        return frozenset()
    generator = numpy_generator(config.seed, "attackers")
    return frozenset(generator.choice(config.clients, _count(config), replace=False).tolist())


def _count(config: TrainConfig) -> int:
    return round(config.attackers * config.clients)


def poisoned(data: FederatedData, config: TrainConfig) -> FederatedData:
    """The data with which the run trains: under `label-flip` class c is C − 1 − c in the liars' training images."""
    if config.attack != LABELS:
        return data
    labels = data.labels.clone()
    for client in attackers(config):
        labels[data.train[client]] = len(data.class_names) - 1 - labels[data.train[client]]
    return replace(data, labels=labels)


def falsify(upload: Tensor, start: Tensor, config: TrainConfig, client: int, round: int) -> None:
    """Change in place what a liar sends, [P_shared], given where it started."""
    change = _CHANGES.get(config.attack)
    if change is not None:
        change(upload, start, config, client, round)


def _sign_flip(upload: Tensor, start: Tensor, config: TrainConfig, client: int, round: int) -> None:
    """w − s Δ in place of w + Δ, with s of `--attack-scale`."""
    upload.lerp_(start, 1 + config.attack_scale)


def _scale(upload: Tensor, start: Tensor, config: TrainConfig, client: int, round: int) -> None:
    """w + s Δ."""
    upload.lerp_(start, 1 - config.attack_scale)


def _noise(upload: Tensor, start: Tensor, config: TrainConfig, client: int, round: int) -> None:
    """w + s ‖Δ‖ n / √P, n of the standard normal distribution: s times as far as the honest update, anywhere."""
    generator = torch.Generator().manual_seed(torch_seed(config.seed, "attack", client=client, round=round))
    noise = torch.randn(upload.numel(), generator=generator).to(upload)
    far = torch.linalg.vector_norm(upload - start) / upload.numel() ** 0.5
    upload.copy_(start + config.attack_scale * far * noise)


def _nan(upload: Tensor, start: Tensor, config: TrainConfig, client: int, round: int) -> None:
    upload.fill_(torch.nan)


_CHANGES: dict[str, Callable[[Tensor, Tensor, TrainConfig, int, int], None]] = {
    "sign-flip": _sign_flip,
    "scale": _scale,
    "noise": _noise,
    "nan": _nan,
}
ATTACKS = ("none", LABELS, *_CHANGES)
