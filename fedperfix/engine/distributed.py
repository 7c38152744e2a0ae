"""What the processes of a group exchange in a round.

Each process trains its part of the cohort. What stays with the clients goes to all processes, so that any of them
can train or test any client later. What is uploaded goes to process 0 alone, which aggregates with the code and the
rows of a run in one process, and sends the result to all; or, with `--reduction sum`, each process adds up its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedperfix.engine.client import Worker
from fedperfix.engine.cohort import Turns, train_cohort
from fedperfix.engine.evaluate import Evaluation, Progress, client_groups, evaluate_groups
from fedperfix.engine.group import Group, Spread
from fedperfix.engine.screen import upload_sizes, usable
from fedperfix.engine.state import FederatedState
from fedperfix.engine.stopwatch import Stopwatch
from fedperfix.engine.table import DiskTable

_COLUMNS = ("loss", "correct", "images", "auc", "f1")


def train_spread(
    group: Group,
    worker: Worker,
    state: FederatedState,
    clients: Sequence[int],
    round: int,
    watch: Stopwatch,
    progress: Progress,
) -> tuple[Spread, Turns, Evaluation]:
    """Train a cohort, each process a part of it.

    Returns:
        Who trained whom, the turns of this process's clients, and the test of all clients after their training.
    """
    spread = Spread.of(clients, [len(worker.data.train[index]) for index in clients], group)
    with group.together(watch.phase("train")):
        if spread.mine:
            turns = train_cohort(worker, state, spread.mine, round, watch, progress)
            with watch.phase("evaluate"):
                tested = Evaluation.of(spread.mine, turns.outputs, worker)
        else:
            turns, tested = _no_turns(worker, state), _no_scores()
    return spread, turns, share_scores(group, tested, spread)


def evaluate_spread(
    group: Group,
    worker: Worker,
    state: FederatedState,
    clients: Sequence[int],
    round: int,
    progress: Progress,
) -> Evaluation:
    """As `evaluate`, each process a part of the clients."""
    groups = client_groups(worker, clients)
    sizes = [len(worker.data.test[index]) for index in clients]
    spread = Spread.of(clients, sizes, group, groups)
    mine = [those for those in groups if those[0] in spread.mine]
    with group.together():
        tested = evaluate_groups(worker, state, mine, round, progress) if mine else _no_scores()
    return share_scores(group, tested, spread)


def share_scores(group: Group, tested: Evaluation, spread: Spread) -> Evaluation:
    """The scores of all clients, from each process's own."""
    if group.size == 1:
        return tested
    own = np.stack([getattr(tested, name).astype(np.float64) for name in _COLUMNS], axis=1)
    loss, correct, images, auc, f1 = group.all_rows(torch.from_numpy(own), spread).numpy().T
    return Evaluation(spread.clients, loss, correct.astype(np.int64), images.astype(np.int64), auc, f1)


def aggregate_exact(
    group: Group, state: FederatedState, turns: Turns, spread: Spread, aggregate: Callable[[Turns], list[int]]
) -> tuple[Turns, list[int]]:
    """Aggregate in process 0 what all processes' clients upload, and give the server's side to all.

    Args:
        group: the processes.
        state: of the federation; only the server's side changes.
        turns: of this process's clients.
        spread: who trained whom.
        aggregate: changes the server's side; returns the rows that it used.

    Returns:
        The turns of all clients (what they upload only in process 0) and the rows that were used.
    """
    kept_by_clients = _share_kept(group, turns, spread)
    rows = group.collect(turns.rows, spread)
    extra = {name: group.collect(value, spread) for name, value in turns.extra.items()}
    used = torch.zeros(len(spread.clients), dtype=torch.uint8)
    everyone = kept_by_clients
    with group.together():
        if rows is not None:
            everyone = replace(kept_by_clients, rows=rows, extra=extra, shared_numel=turns.shared_numel)
            used[aggregate(everyone)] = 1
    group.broadcast([used, state.server.shared, *state.server.state.values()])
    return everyone, used.nonzero().flatten().tolist()


def aggregate_sums(
    group: Group,
    state: FederatedState,
    turns: Turns,
    spread: Spread,
    weights: Callable[[Sequence[int]], Tensor],
    largest: float,
) -> tuple[Turns, list[int]]:
    """The weighted mean of the uploads from each process's partial sum in float64, added up by one all-reduce.

    Arguments and result as in `aggregate_exact`; `weights` gives those of some clients, float64 [K], sum 1, and
    `largest` is for `screen.usable`.
    """
    everyone = _share_kept(group, turns, spread)
    with group.together():
        sizes = upload_sizes(turns, state.server.shared)
    kept = usable(group.all_rows(sizes, spread), largest)
    clients = tuple(spread.clients[row] for row in kept)
    if clients:
        share = dict(zip(clients, weights(clients).tolist(), strict=True))
        with group.together():
            total = _partial_sum(turns, share)
        group.add_up(total)
        state.server.shared.copy_(total)
    return everyone, kept


def _partial_sum(turns: Turns, share: Mapping[int, float]) -> Tensor:
    """Sum of the uploads times their clients' shares, float64 [P_shared]; clients without a share are left out."""
    where = torch.device("cpu") if turns.rows.device.type == "mps" else turns.rows.device  # Apple's lack float64
    total = torch.zeros(turns.shared_numel, dtype=torch.float64, device=where)
    for client, row in zip(turns.clients, turns.shared, strict=True):
        if client in share:
            total.add_(row.to(where, torch.float64), alpha=share[client])
    return total


def share_state(group: Group, state: FederatedState, folder: Path) -> None:
    """Give all processes the state that process 0 has; rows on disk they read themselves, from the run's folder."""
    if group.size == 1:
        return
    round = torch.tensor([state.round])
    group.broadcast([round])
    state.round = int(round)
    tensors = state.server_tensors()
    if isinstance(state.table, DiskTable):
        _open_in_all(group, state.table, folder, state.round)
    else:
        tensors |= state.table.columns
    for tensor in tensors.values():
        host = tensor.cpu()  # whether a table lies on the GPU is each process's own choice
        group.broadcast([host])
        tensor.copy_(host)


def _open_in_all(group: Group, table: DiskTable, folder: Path, round: int) -> None:
    """Let the other processes read the file of rows that process 0 has open."""
    where = group.share_text(str(folder.absolute()))
    seal = ""
    with group.together():
        if group.leader:
            seal = table.seal(folder, round)
    seal = group.share_text(seal)
    with group.together():
        if table.follows:
            table.open(Path(where), round, seal)


def _share_kept(group: Group, turns: Turns, spread: Spread) -> Turns:
    """The turns of all clients without what they upload: what they keep, and their meters."""
    if group.size == 1:
        return turns
    return Turns(
        clients=spread.clients,
        rows=group.all_rows(turns.local, spread),
        extra={},
        own={name: group.all_rows(value.to(turns.rows.device), spread) for name, value in turns.own.items()},
        meters=group.all_rows(turns.meters, spread),
        outputs=[],
        shared_numel=0,
    )


def _no_turns(worker: Worker, state: FederatedState) -> Turns:
    """Those of a process that has no client in a round."""
    arena = worker.arena

    def none(value: Tensor) -> Tensor:
        return value.new_empty((0, *value.shape))

    return Turns(
        clients=(),
        rows=none(arena.flat),
        extra={name: none(value) for name, value in worker.method.extra_upload(arena).items()},
        own={name: none(table[0]) for name, table in state.client_state.items()},
        meters=arena.flat.new_empty((0, 3), dtype=torch.float32),
        outputs=[],
        shared_numel=arena.shared.numel(),
    )


def _no_scores() -> Evaluation:
    return Evaluation((), *(np.zeros(0) for _ in _COLUMNS))
