"""The clients of a round take their turns, and what each of them leaves is one row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedperfix.engine.client import Worker
from fedperfix.engine.evaluate import Progress
from fedperfix.engine.state import FederatedState, Uploads
from fedperfix.engine.stopwatch import Stopwatch


@dataclass
class Turns:
    """What K clients leave after their local training, one row per client.

    Args:
        clients: their numbers, in ascending order.
        rows: [K, P] the arena's content: what is uploaded, then what is kept.
        extra: what else the method sends, by name: [K, *shape].
        own: the method's client state, by name: [K, *shape].
        meters: float32 [K, 3], sums over the training images: loss, correct, images.
        outputs: float32 [n, classes] of each client for its n test images, after its training.
        shared_numel: how many elements of a row are uploaded.
    """

    clients: tuple[int, ...]
    rows: Tensor
    extra: dict[str, Tensor]
    own: dict[str, Tensor]
    meters: Tensor
    outputs: list[Tensor]
    shared_numel: int

    @property
    def shared(self) -> Tensor:
        """[K, P_shared] what the clients upload."""
        return self.rows[:, : self.shared_numel]

    @property
    def local(self) -> Tensor:
        """[K, P_local] what they keep."""
        return self.rows[:, self.shared_numel :]

    def uploads(self, kept: Sequence[int]) -> Uploads:
        """The uploads of these rows; views if these are all."""
        if len(kept) == len(self.clients):
            return Uploads(self.clients, self.shared, self.extra)
        extra = {name: value[kept] for name, value in self.extra.items()}
        return Uploads(tuple(self.clients[row] for row in kept), self.shared[kept], extra)


def train_cohort(
    worker: Worker, state: FederatedState, clients: Sequence[int], round: int, watch: Stopwatch, progress: Progress
) -> Turns:
    """Let clients train, each from the global parameters and its own, and test each after its training.

    Args:
        worker: where the clients take their turns.
        state: of the federation; nothing in it changes.
        clients: who trains, in this order.
        round: for the random choices.
        watch: counts the phases `train` and `evaluate`.
        progress: told after every turn.
    """
    arena, method = worker.arena, worker.method
    rows = torch.empty(len(clients), arena.flat.numel(), dtype=arena.flat.dtype, device=worker.device)
    extra = {name: _rows_like(value, len(clients)) for name, value in method.extra_upload(arena).items()}
    own = {name: _rows_like(table[0], len(clients)) for name, table in state.client_state.items()}
    meters, outputs = [], []
    for row, index in enumerate(clients):
        with watch.phase("train"):
            client = worker.load(index, state, round)
            method.train_client(client)
            rows[row] = arena.flat
            for name, value in client.upload.items():
                extra[name][row] = value
            for name, value in client.state.items():
                own[name][row] = value
            meters.append(client.meter.clone())
        with watch.phase("evaluate"):
            method.prepare_test(client)
            outputs.append(client.test())
        progress("training", row + 1, len(clients))
    return Turns(tuple(clients), rows, extra, own, torch.stack(meters), outputs, arena.shared.numel())


def _rows_like(value: Tensor, count: int) -> Tensor:
    return value.new_empty((count, *value.shape))
