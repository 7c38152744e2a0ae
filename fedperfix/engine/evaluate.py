"""Accuracy per client, and how it is spread over clients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedperfix.engine.client import Worker
from fedperfix.engine.state import FederatedState

# Told of the phase, the clients done and how many there are.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Spread:
    """Accuracy over clients, in percent.

    Args:
        mean, std: over clients, each counting once; the population's standard deviation.
        worst: mean of the worst tenth of the clients, at least one.
        weighted: mean over test images.
    """

    mean: float
    std: float
    worst: float
    weighted: float


@dataclass(frozen=True)
class Evaluation:
    """What a test of some clients found.

    Args:
        clients: their numbers.
        loss: float64 [n], sum of the cross-entropy over each client's test images.
        correct: int64 [n], right answers of each client.
        images: int64 [n], test images of each client.
    """

    clients: tuple[int, ...]
    loss: np.ndarray
    correct: np.ndarray
    images: np.ndarray

    @classmethod
    def of(cls, clients: Sequence[int], totals: Sequence[Tensor], worker: Worker) -> Evaluation:
        """Read the clients' totals (what `Client.test` returns) from the device, once for all of them."""
        table = torch.stack(list(totals)).double().cpu().numpy()
        images = np.array([len(worker.data.test[index]) for index in clients])
        return cls(tuple(clients), table[:, 0], table[:, 1].round().astype(np.int64), images)

    @property
    def accuracy(self) -> np.ndarray:
        """Percent of each client's test images, float64 [n]."""
        return 100.0 * self.correct / self.images

    @property
    def mean_loss(self) -> float:
        """Cross-entropy, mean over all test images."""
        return float(self.loss.sum() / self.images.sum())

    def among(self, clients: Sequence[int]) -> Evaluation:
        """The same, for some of the clients only."""
        rows = [self.clients.index(client) for client in clients]
        return Evaluation(tuple(clients), self.loss[rows], self.correct[rows], self.images[rows])

    def spread(self) -> Spread:
        """The accuracy's spread over these clients."""
        accuracy = np.sort(self.accuracy)
        worst = accuracy[: max(1, len(accuracy) // 10)]
        weighted = 100.0 * self.correct.sum() / self.images.sum()
        return Spread(float(accuracy.mean()), float(accuracy.std()), float(worst.mean()), float(weighted))


def evaluate(
    worker: Worker,
    state: FederatedState,
    clients: Sequence[int],
    round: int,
    progress: Progress = lambda phase, done, total: None,
) -> Evaluation:
    """Test clients with the global parameters and their own, as they are in `state`; nothing in it changes.

    Args:
        worker: where the clients take their turns.
        state: of the federation.
        clients: who is tested.
        round: for the random choices of methods that adapt before they test.
        progress: told after every client: the phase, how many are done, and of how many.

    Returns:
        One entry per client.
    """
    totals = []
    for done, index in enumerate(clients, start=1):
        client = worker.load(index, state, round)
        worker.method.prepare_test(client)
        totals.append(client.test())
        progress("testing", done, len(clients))
    return Evaluation.of(clients, totals, worker)
