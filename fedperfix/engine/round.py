"""One federated round, from the choice of clients to the new global model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from fedperfix.config import TrainConfig
from fedperfix.engine.client import Worker
from fedperfix.engine.cohort import Turns
from fedperfix.engine.distributed import aggregate_exact, aggregate_sums, evaluate_spread, train_spread
from fedperfix.engine.evaluate import Evaluation, Progress
from fedperfix.engine.group import ALONE, Group
from fedperfix.engine.privacy import epsilon, largest_ratio
from fedperfix.engine.screen import upload_sizes, usable
from fedperfix.engine.state import FederatedState, unpadded
from fedperfix.engine.stopwatch import Stopwatch
from fedperfix.methods.aggregators import shares
from fedperfix.randomness import numpy_generator
from fedperfix_kernels import ParameterArena


@dataclass(frozen=True)
class RoundResult:
    """What happened in a round.

    Args:
        round: its number, from 1.
        sampled: the clients that trained.
        dropped: those of them whose update was not finite or too large; they took no part in the aggregation.
        train_loss, train_accuracy: mean over the training images while training, accuracy in percent; None if all
            clients were dropped.
        train_images: how many images went through training.
        local: the sampled clients, each tested after its training, before the aggregation; None
            if none of them could be used.
        personalised: all clients (or `--eval-clients` of them), tested with the new global parameters and their
            own (protocol `final`); None between evaluations.
        mixed: the same, tested as the authors' released code does (protocol `authors-code`): the sampled ones
            after their training, the others with the global parameters as the round began; None as above.
        bytes_up, bytes_down: sent by and to all sampled clients together.
        seconds: by phase (`train`, `aggregate`, `evaluate`).
        clients: how many there are.
        epsilon: that holds after this round, with `--dp`.
    """

    round: int
    sampled: tuple[int, ...]
    dropped: tuple[int, ...]
    train_loss: float | None
    train_accuracy: float | None
    train_images: int
    local: Evaluation | None
    personalised: Evaluation | None
    mixed: Evaluation | None
    bytes_up: int
    bytes_down: int
    seconds: dict[str, float]
    clients: int
    epsilon: float | None = None


def run_round(
    worker: Worker,
    state: FederatedState,
    config: TrainConfig,
    *,
    evaluate_all: bool,
    progress: Progress = lambda phase, done, total: None,
    group: Group = ALONE,
) -> RoundResult:
    """Play the next round, or leave `state` as it was if it is interrupted or fails.

    Args:
        worker: where the clients take their turns.
        state: of the federation; changed in place.
        config: of the run.
        evaluate_all: whether to test all clients (or `--eval-clients` of them) at the end.
        progress: told after every client's turn: the phase, how many clients are done, and of how many.
        group: the processes among which the clients are spread; all of them call this with the same state.

    Raises:
        Interrupted: the run was asked to end.

    Returns:
        What happened, the same in all processes but for the seconds, which are this process's.
    """
    with group.together():  # what process 0 wrote in the last round is there, for the others to read
        worker.poll()
    round = state.round + 1
    method, arena, watch = worker.method, worker.arena, Stopwatch(worker.device)
    sampled = sample_clients(config, round)
    tested = tested_clients(config, round)

    with torch.random.fork_rng(_gpus(worker.device)), state.transaction():
        spread, turns, local = train_spread(group, worker, state, sampled, round, watch, progress)

        with watch.phase("evaluate"):
            mixed = None
            if evaluate_all and config.protocol != "final":
                others = sorted(set(tested) - set(sampled))
                mixed = local.among(sorted(set(tested) & set(sampled)))
                if others:
                    mixed = mixed.with_others(evaluate_spread(group, worker, state, others, round, progress))

        with watch.phase("aggregate"):
            if config.reduction == "sum":
                weights = partial(data_weights, worker)
                turns, kept = aggregate_sums(group, state, turns, spread, weights, config.max_update_ratio)
            else:
                turns, kept = aggregate_exact(group, state, turns, spread, partial(_aggregate, worker, state))
            if kept:
                clients = [sampled[row] for row in kept]
                state.keep(clients, turns.local[kept], {name: own[kept] for name, own in turns.own.items()})

        with watch.phase("evaluate"):
            personalised = None
            if evaluate_all and config.protocol != "authors-code":
                personalised = evaluate_spread(group, worker, state, tested, round, progress)
        state.round = round

    loss, correct, images = turns.meters[kept].double().sum(0).tolist()
    up = [arena.shared, *method.extra_upload(arena).values()]
    down = [arena.shared, *(state.server.state[name] for name in method.broadcast)]
    return RoundResult(
        round=round,
        sampled=tuple(sampled),
        dropped=tuple(index for row, index in enumerate(sampled) if row not in kept),
        train_loss=loss / images if images else None,
        train_accuracy=100.0 * correct / images if images else None,
        train_images=int(turns.meters[:, 2].sum()),
        local=local,
        personalised=personalised,
        mixed=mixed,
        bytes_up=len(sampled) * _bytes(up, arena),
        bytes_down=len(sampled) * _bytes(down, arena),
        seconds=watch.seconds,
        clients=config.clients,
        epsilon=_epsilon(config, round),
    )


def _epsilon(config: TrainConfig, round: int) -> float | None:
    """What has been spent of the clients' privacy after a round, with `--dp`."""
    if config.dp == "none":
        return None
    return epsilon(config, (sample_clients(config, number) for number in range(1, round + 1)))


def _aggregate(worker: Worker, state: FederatedState, turns: Turns) -> list[int]:
    """Aggregate what can be used of the turns into the server's side; returns those rows."""
    config = worker.config
    kept = usable(upload_sizes(turns, state.server.shared), largest_ratio(config))
    if kept or config.dp == "central":  # whose noise must come in every round
        uploads = replace(turns.uploads(kept), round=state.round + 1)
        worker.method.aggregate(state.server, uploads, data_weights(worker, uploads.clients))
    return kept


def sample_clients(config: TrainConfig, round: int) -> list[int]:
    """The clients of a round, drawn without replacement, in ascending order."""
    generator = numpy_generator(config.seed, "cohort", round=round)
    return sorted(generator.choice(config.clients, config.sampled, replace=False).tolist())


def tested_clients(config: TrainConfig, round: int) -> Sequence[int]:
    """The clients that an evaluation tests, in ascending order: all, or `--eval-clients` of them drawn anew."""
    if config.eval_clients is None:
        return range(config.clients)
    generator = numpy_generator(config.seed, "evaluation", round=round)
    return sorted(generator.choice(config.clients, config.eval_clients, replace=False).tolist())


def data_weights(worker: Worker, clients: Sequence[int]) -> Tensor:
    """Each client's share of the training images of `clients`, or with `--dp` equal ones: float64 [K], sum 1."""
    return shares(worker.config, [len(worker.data.train[index]) for index in clients])


def _bytes(values: Iterable[Tensor], arena: ParameterArena) -> int:
    return sum(unpadded(value, arena) * value.element_size() for value in values)


def _gpus(device: torch.device) -> list[torch.device]:
    return [device] if device.type == "cuda" else []
