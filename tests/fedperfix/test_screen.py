"""Which updates the server leaves out, and that it goes on without them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fedperfix.engine.cohort import Turns
from fedperfix.engine.round import run_round
from fedperfix.engine.screen import upload_sizes, usable
from fedperfix.methods import METHODS
from tests.fedperfix import tiny


def turns(rows: list[list[float]], extra: list[list[float]] | None = None) -> Turns:
    """Clients whose first two parameters are shared and whose third is their own."""
    table = torch.tensor(rows)
    more = {} if extra is None else {"control": torch.tensor(extra)}
    count = len(rows)
    return Turns(tuple(range(count)), table, more, {}, torch.zeros(count, 3), [], shared_numel=2)


def test_sizes_are_norms_of_what_changed() -> None:
    given = turns(
        [[4.0, 5.0, 9.0], [1.0, 1.0, 0.0], [1.0, torch.inf, 0.0], [1.0, 2.0, torch.nan]], [[3.0, 4.0]] * 4
    )
    sizes = upload_sizes(given, torch.tensor([1.0, 1.0]))
    assert sizes.tolist() == [[5.0, 5.0], [0.0, 5.0], [torch.inf] * 2, [torch.inf] * 2]


@pytest.mark.parametrize(
    ("sizes", "kept"),
    [
        ([1.0, 2.0, 3.0, 2000.0], [0, 1, 2, 3]),
        ([1.0, 2.0, 3.0, 2000.1], [0, 1, 2]),
        ([torch.inf, 1.0, 5000.0], [1]),
        ([torch.inf, torch.nan], []),
        ([0.0, 0.0, 7.0], [0, 1, 2]),  # nothing to measure by
        ([3.0], [0]),
        ([1.0, 1e6], [0]),
    ],
)
def test_what_is_far_larger_than_the_median_is_left_out(sizes: list[float], kept: list[int]) -> None:
    assert usable(torch.tensor(sizes)[:, None], 1000.0) == kept


def test_any_size_may_be_too_large() -> None:
    assert usable(torch.tensor([[1.0, 1.0], [1.0, 1e6], [1.0, 1.0]]), 1000.0) == [0, 2]


class Liar(METHODS["scaffold"]):
    """SCAFFOLD in which client 1 lies."""

    def lie(self, client) -> None:
        raise NotImplementedError

    def train_client(self, client) -> None:
        super().train_client(client)
        if client.index == 1:
            self.lie(client)


def scaled(self, client) -> None:
    client.arena.flat.mul_(1e6)


def not_a_number(self, client) -> None:
    client.arena.flat[0] = torch.nan


def infinite_control(self, client) -> None:
    for value in client.upload.values():
        value.fill_(torch.inf)


def scaled_control(self, client) -> None:
    for value in client.upload.values():
        value.mul_(1e6)


@pytest.mark.parametrize("lie", [scaled, not_a_number, infinite_control, scaled_control])
def test_a_round_goes_on_as_if_the_liar_had_not_been_drawn(lie) -> None:
    method = type("Lying", (Liar,), {"lie": lie})
    worker, state, config = tiny.federation(method, sampled=3)
    before = {name: table.clone() for name, table in state.client_state.items()}
    result = run_round(worker, state, config, evaluate_all=True)
    assert result.dropped == (1,)
    assert state.server.shared.isfinite().all()
    assert all(torch.equal(state.client_state[name][1], table[1]) for name, table in before.items())

    # SCAFFOLD's mean is unweighted: here over the other two clients.
    uploads = []
    for index in (0, 2):
        other, start, _ = tiny.federation("scaffold", sampled=3)
        client = other.load(index, start, 1)
        other.method.train_client(client)
        uploads.append(other.arena.shared.clone())
    torch.testing.assert_close(state.server.shared, (uploads[0] + uploads[1]) / 2)


def test_the_ratio_is_an_option() -> None:
    def twice(self, client) -> None:
        client.arena.flat.add_(client.arena.flat - client.server.shared, alpha=4.0)

    method = type("Lying", (Liar,), {"lie": twice})
    dropped = []
    for ratio in (1000.0, 2.0):
        worker, state, config = tiny.federation(method, sampled=3)
        worker.config = replace(config, max_update_ratio=ratio)
        dropped.append(run_round(worker, state, worker.config, evaluate_all=False).dropped)
    assert dropped == [(), (1,)]
