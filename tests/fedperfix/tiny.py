"""A federation small enough to be computed by hand: a linear model, a few random images per client."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from fedperfix.config import TrainConfig
from fedperfix.data import Dataset, FederatedData, Preprocess
from fedperfix.engine.client import Worker
from fedperfix.engine.group import ALONE, Group
from fedperfix.engine.state import FederatedState
from fedperfix.methods import METHODS, Method

CPU = torch.device("cpu")
CLASSES, SIDE, HIDDEN = 3, 2, 4

# Three clients of different sizes; an epoch of each is one batch, so one step of gradient descent.
CONFIG = TrainConfig(
    method="fedavg", clients=3, sampled=2, rounds=2, optimizer="sgd", lr=0.5, batch_size=64, precision="fp32"
)


class Linear(nn.Module):
    """head(body(x)), both linear and without bias."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.body = nn.Linear(SIDE * SIDE, HIDDEN, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(HIDDEN, CLASSES, bias=False)

    def get_classifier(self) -> nn.Module:
        return self.head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dropout(self.body(x.flatten(1))))


def data(sizes: tuple[int, ...] = (5, 9, 12), test: int = 4) -> FederatedData:
    """Random images [n, 1, 2, 2]; client i has sizes[i] for training and `test` for testing."""
    generator = torch.Generator().manual_seed(0)
    total = sum(sizes) + test * len(sizes)
    images = torch.randint(0, 256, (total, 1, SIDE, SIDE), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, CLASSES, (total,), generator=generator)
    starts = [sum(sizes[:i]) + test * i for i in range(len(sizes))]
    return FederatedData(
        inputs=images,
        labels=labels,
        train=tuple(torch.arange(s, s + n) for s, n in zip(starts, sizes, strict=True)),
        test=tuple(torch.arange(s + n, s + n + test) for s, n in zip(starts, sizes, strict=True)),
        class_names=("a", "b", "c"),
    )


def federation(
    method: str | type[Method] = "fedavg",
    *,
    model: nn.Module | None = None,
    client_data: FederatedData | None = None,
    table: str = "memory",
    group: Group = ALONE,
    **options: object,
) -> tuple[Worker, FederatedState, TrainConfig]:
    """A worker and the state before the first round."""
    config = replace(CONFIG, **options)
    rule = (METHODS[method] if isinstance(method, str) else method)(config)
    if model is None:
        torch.manual_seed(1)
        model = Linear()
    worker = Worker(model, client_data or data(), Preprocess(SIDE), rule, config, CPU)
    return worker, FederatedState.initial(worker.arena, rule, config.clients, "auto", table, group), config


def dataset(images: int = 240, side: int = 8) -> Dataset:
    """An image data set whose classes differ in brightness, so that a model can learn something."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(images) % 4
    noise = torch.randint(0, 64, (images, 1, side, side), generator=generator)
    return Dataset("tiny", (noise + 60 * labels[:, None, None, None]).to(torch.uint8), labels, tuple("abcd"))
