"""The clients of a round take their turns, and what each of them leaves is one row."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedperfix.engine.attack import attackers, falsify
from fedperfix.engine.client import Client, Worker
from fedperfix.engine.evaluate import Progress
from fedperfix.engine.parallel import side_by_side
from fedperfix.engine.privacy import randomise
from fedperfix.engine.stacked import train_stacked
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
        worker: where the clients take their turns, `worker.clients_per_step` of them in one batch; on the workers
            beside it others do at the same time.
        state: of the federation; nothing in it changes.
        clients: who trains.
        round: for the random choices.
        watch: counts the phases `train` and `evaluate`.
        progress: told after every turn.
    """
    arena, method = worker.arena, worker.method
    rows = torch.empty(len(clients), arena.flat.numel(), dtype=arena.flat.dtype, device=worker.device)
    extra = {name: _rows_like(value, len(clients)) for name, value in method.extra_upload(arena).items()}
    own = {name: _rows_like(table[0].to(worker.device), len(clients)) for name, table in state.client_state.items()}
    meters = arena.flat.new_empty((len(clients), 3), dtype=torch.float32)
    outputs: list[Tensor] = [meters] * len(clients)
    liars = attackers(worker.config)
    turns: list[Stopwatch] = []

    def play(worker: Worker, together: list[int]) -> Stopwatch:
        turn = Stopwatch(worker.device)
        trained = _trained(worker, state, [clients[row] for row in together], round)
        for row in together:
            with turn.phase("train"):
                client = next(trained)
                rows[row] = worker.arena.flat
                _send(rows[row, : arena.shared.numel()], state.server.shared, worker, client, liars)
                for name, value in client.upload.items():
                    extra[name][row] = value
                for name, value in client.state.items():
                    own[name][row] = value
                meters[row] = client.meter
            with turn.phase("evaluate"):
                worker.method.prepare_test(client)
                outputs[row] = client.test()
        return turn

    def played(turn: Stopwatch) -> None:
        turns.append(turn)
        progress("training", min(len(turns) * worker.clients_per_step, len(clients)), len(clients))

    start = time.perf_counter()
    side_by_side(worker, _batches_of_clients(worker, clients), play, played)
    watch.add(turns, time.perf_counter() - start)
    return Turns(tuple(clients), rows, extra, own, meters, outputs, arena.shared.numel())


def _send(upload: Tensor, start: Tensor, worker: Worker, client: Client, liars: frozenset[int]) -> None:
    """What becomes, in place, of the shared parameters of a client on their way to the server."""
    if worker.config.dp == "local":
        randomise(upload, start, worker.config, worker.noise_seed, client.index, client.round)
    if client.index in liars:
        falsify(upload, start, worker.config, client.index, client.round)


def _batches_of_clients(worker: Worker, clients: Sequence[int]) -> list[list[int]]:
    """Places in `clients` of those who train in one batch, the clients with the most images first.

    Clients of like size train together, so that none leaves the others early; and of turns that are taken side by
    side the last ones are short, so that no worker waits long.
    """
    size = worker.clients_per_step
    order = sorted(range(len(clients)), key=lambda row: len(worker.data.train[clients[row]]), reverse=True)
    return [order[first : first + size] for first in range(0, len(order), size)]


def _trained(worker: Worker, state: FederatedState, clients: Sequence[int], round: int) -> Iterator[Client]:
    """Each client after its training, alone or all in one batch; what it left is in the arena until the next."""
    if len(clients) == 1:
        client = worker.load(clients[0], state, round)
        worker.method.train_client(client)
        yield client
        return
    turns, results = train_stacked(worker, state, clients, round)
    for client, result in zip(turns, results, strict=True):
        worker.arena.flat.copy_(result)
        yield client


def _rows_like(value: Tensor, count: int) -> Tensor:
    return value.new_empty((count, *value.shape))
