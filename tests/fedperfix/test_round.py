"""Rounds against federated gradient descent written in numpy, and what a round promises when it fails."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from fedperfix.engine.client import Client
from fedperfix.engine.round import run_round, sample_clients
from fedperfix.engine.screen import finite_rows
from fedperfix.methods import METHODS, Method
from tests.fedperfix import tiny


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def snapshot(state) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in state.tensors().items()}


def gradient_step(body: np.ndarray, head: np.ndarray, x: np.ndarray, y: np.ndarray, lr: float):
    """One step of gradient descent on the mean cross-entropy of head @ body @ x."""
    hidden = x @ body.T
    logits = hidden @ head.T
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    p[np.arange(len(y)), y] -= 1
    p /= len(y)
    return body - lr * (p @ head).T @ x, head - lr * p.T @ hidden


@pytest.mark.parametrize(
    ("method", "local"), [("fedavg", ()), ("fedper", ("head",)), ("local", ("body", "head"))], ids=lambda x: str(x)
)
def test_two_rounds_are_what_gradient_descent_and_a_weighted_mean_give(method: str, local: tuple[str, ...]) -> None:
    worker, state, config = tiny.federation(method)
    names = ("body", "head")
    start = {name: getattr(worker.model, name).weight.detach().double().numpy().copy() for name in names}
    shared = dict(start)
    own = [dict(start) for _ in range(config.clients)]
    results = []
    for round in (1, 2):
        results.append(run_round(worker, state, config, evaluate_all=True))
        trained = {}
        for client in sample_clients(config, round):
            mine = {name: own[client][name] if name in local else shared[name] for name in names}
            chosen = worker.data.train[client]
            x = (worker.data.inputs[chosen].double().flatten(1).numpy() - 127.5) / 127.5
            body, head = gradient_step(mine["body"], mine["head"], x, worker.data.labels[chosen].numpy(), config.lr)
            trained[client] = {"body": body, "head": head}
        total = sum(len(worker.data.train[client]) for client in trained)
        for name in names:
            if name in local:
                for client in trained:
                    own[client][name] = trained[client][name]
            else:
                shared[name] = sum(
                    len(worker.data.train[client]) / total * weights[name] for client, weights in trained.items()
                )

    assert state.round == 2
    actual = worker.arena.shared_layout.views(state.server.shared)
    assert set(actual) == {f"{name}.weight" for name in names if name not in local}
    for name, value in actual.items():
        np.testing.assert_allclose(value.numpy(), shared[name.split(".")[0]], rtol=1e-5, atol=1e-6)
    for client in range(config.clients):
        mine = worker.arena.local_layout.views(state.personal[client])
        for name, value in mine.items():
            np.testing.assert_allclose(value.numpy(), own[client][name.split(".")[0]], rtol=1e-5, atol=1e-6)
    check_accuracy(worker, results[-1], shared, own, local)


def check_accuracy(worker, result, shared, own, local) -> None:
    """`personalised` is every client's accuracy with the last global parameters and its own."""
    for client, accuracy in enumerate(result.personalised.accuracy):
        mine = {name: own[client][name] if name in local else shared[name] for name in ("body", "head")}
        chosen = worker.data.test[client]
        x = (worker.data.inputs[chosen].double().flatten(1).numpy() - 127.5) / 127.5
        right = ((x @ mine["body"].T @ mine["head"].T).argmax(1) == worker.data.labels[chosen].numpy()).mean()
        assert accuracy == pytest.approx(100 * right)


def test_bytes_count_the_shared_parameters_of_the_sampled_clients_without_padding() -> None:
    worker, state, config = tiny.federation("fedper")
    result = run_round(worker, state, config, evaluate_all=False)
    body = tiny.SIDE * tiny.SIDE * tiny.HIDDEN
    assert (result.bytes_up, result.bytes_down) == (2 * 4 * body, 2 * 4 * body)
    assert result.personalised is None
    worker, state, config = tiny.federation("local")
    result = run_round(worker, state, config, evaluate_all=False)
    assert (result.bytes_up, result.bytes_down) == (0, 0)


def test_clients_are_sampled_without_replacement_and_by_seed_and_round_alone() -> None:
    _, _, config = tiny.federation(clients=30, sampled=10, client_data=tiny.data((3,) * 30))
    first = sample_clients(config, 1)
    assert len(set(first)) == 10
    assert sample_clients(config, 1) == first
    assert sample_clients(config, 2) != first


@pytest.mark.parametrize("method", tuple(METHODS))
def test_the_same_seed_gives_the_same_bits(method: str) -> None:
    runs = []
    for noise in (11, 12):
        torch.manual_seed(1)
        worker, state, config = tiny.federation(method, model=tiny.Linear(dropout=0.5), batch_size=4, lr=0.1)
        torch.manual_seed(noise)  # what happened before must not matter
        for _ in range(3):
            result = run_round(worker, state, config, evaluate_all=True)
        runs.append((snapshot(state), result.local.loss, result.personalised.loss, result.train_loss))
    for name, value in runs[0][0].items():
        assert torch.equal(value, runs[1][0][name])
    for first, second in zip(runs[0][1:], runs[1][1:], strict=True):
        assert np.array_equal(first, second)


def test_a_round_leaves_the_callers_random_numbers_alone() -> None:
    worker, state, config = tiny.federation(model=tiny.Linear(dropout=0.5))
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    run_round(worker, state, config, evaluate_all=True)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("batches", [0, 1, 3, 5, 6])
@pytest.mark.parametrize("method", ["fedper", "local"])
def test_an_interrupted_round_leaves_the_last_finished_one(method: str, batches: int) -> None:
    # 2 sampled clients: 1 batch each of training and of testing, then 3 clients tested: batches 0 to 6.
    worker, state, config = tiny.federation(method)
    run_round(worker, state, config, evaluate_all=False)
    before = snapshot(state)
    count = iter(range(100))

    def poll() -> None:
        if next(count) == batches:
            raise InterruptedError

    worker.poll = poll
    with pytest.raises(InterruptedError):
        run_round(worker, state, config, evaluate_all=True)
    assert state.round == 1
    for name, value in snapshot(state).items():
        assert torch.equal(value, before[name]), name

    worker.poll = lambda: None  # and the round can be played again, as if nothing had been
    run_round(worker, state, config, evaluate_all=False)
    other, expected, _ = tiny.federation(method)
    for _ in range(2):
        run_round(other, expected, config, evaluate_all=False)
    assert torch.equal(state.server.shared, expected.server.shared)
    assert torch.equal(state.personal, expected.personal)


class Diverging(METHODS["fedper"]):
    """FedPer in which some clients end with a NaN or an infinity."""

    bad: tuple[int, ...] = ()
    where = "shared"

    def train_client(self, client: Client) -> None:
        client.train()
        if client.index in self.bad:
            getattr(client.arena, self.where)[3] = float("nan") if client.index % 2 else float("inf")


@pytest.mark.parametrize("where", ["shared", "local"])
def test_a_client_whose_update_is_not_finite_is_left_out(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    worker, state, config = tiny.federation(Diverging)
    bad, good = sample_clients(config, 1)
    monkeypatch.setattr(Diverging, "bad", (bad,))
    monkeypatch.setattr(Diverging, "where", where)
    before = state.personal.clone()
    result = run_round(worker, state, config, evaluate_all=True)
    assert result.dropped == (bad,)
    assert torch.equal(state.personal[bad], before[bad])
    assert not torch.equal(state.personal[good], before[good])

    alone, expected, _ = tiny.federation(Diverging)
    monkeypatch.setattr(Diverging, "bad", ())
    monkeypatch.setattr("fedperfix.engine.round.sample_clients", lambda *_: [good])
    other = run_round(alone, expected, config, evaluate_all=True)
    assert torch.equal(state.server.shared, expected.server.shared)  # a mean of one
    assert result.train_loss == pytest.approx(other.train_loss)
    assert np.isfinite(result.personalised.loss).all()


def test_if_no_client_is_finite_the_global_model_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    worker, state, config = tiny.federation(Diverging)
    monkeypatch.setattr(Diverging, "bad", (0, 1, 2))
    before = snapshot(state)
    result = run_round(worker, state, config, evaluate_all=True)
    assert result.dropped == result.sampled
    assert result.train_loss is None
    assert state.round == 1
    for name, value in snapshot(state).items():
        assert torch.equal(value, before[name])


def test_finite_rows_reads_every_table() -> None:
    first, second = torch.zeros(4, 3), torch.zeros(4, 2, 2)
    first[1, 2] = float("nan")
    second[3, 1, 0] = -float("inf")
    assert finite_rows(first) == [0, 2, 3]
    assert finite_rows(first, second, torch.zeros(4, 0)) == [0, 2]


class Counting(Method):
    """Keeps a count at every client, sends twice that count, and sums what it gets at the server."""

    name, summary, reference = "counting", "", ""
    broadcast = ("offset",)

    def client_state(self, arena):
        return {"count": torch.zeros(2)}

    def server_state(self, arena):
        return {"sum": torch.zeros(2), "offset": torch.ones(7)}

    def extra_upload(self, arena):
        return {"double": torch.zeros(2)}

    def train_client(self, client: Client) -> None:
        client.train()
        client.state["count"] += client.server.state["offset"][0]
        client.upload["double"] = 2 * client.state["count"]

    def aggregate(self, server, uploads, weights) -> None:
        super().aggregate(server, uploads, weights)
        server.state["sum"] += uploads.extra["double"].sum(0)


def test_methods_may_keep_state_on_both_sides_and_send_more() -> None:
    worker, state, config = tiny.federation(Counting)
    turns = np.zeros(config.clients)
    expected = 0.0
    for round in (1, 2, 3):
        result = run_round(worker, state, config, evaluate_all=True)
        for client in sample_clients(config, round):
            turns[client] += 1
            expected += 2 * turns[client]
    assert state.client_state["count"].tolist() == [[n, n] for n in turns]
    assert state.server.state["sum"].tolist() == [expected, expected]
    parameters = tiny.HIDDEN * (tiny.SIDE * tiny.SIDE + tiny.CLASSES)
    assert result.bytes_up == 2 * 4 * (parameters + 2)
    assert result.bytes_down == 2 * 4 * (parameters + 7)


class Adapting(METHODS["fedavg"]):
    """Takes a step before the test, as FedBABU and Per-FedAvg do."""

    def prepare_test(self, client: Client) -> None:
        client.train(steps=1)


def test_what_a_method_does_before_the_test_is_tested_and_not_kept() -> None:
    worker, state, config = tiny.federation(Adapting)
    plain_worker, plain, _ = tiny.federation("fedavg")
    result = run_round(worker, state, config, evaluate_all=True)
    expected = run_round(plain_worker, plain, config, evaluate_all=True)
    assert torch.equal(state.server.shared, plain.server.shared)
    assert result.train_loss == expected.train_loss
    assert not np.array_equal(result.local.loss, expected.local.loss)
    assert not np.array_equal(result.personalised.loss, expected.personalised.loss)


def test_only_one_model_exists_whatever_the_number_of_clients() -> None:
    worker, state, _ = tiny.federation("fedper", clients=9, client_data=tiny.data((3,) * 9))
    assert state.personal.shape == (9, worker.arena.local.numel())
    assert state.server.shared.shape == worker.arena.shared.shape
    parameters = {p.untyped_storage().data_ptr() for p in worker.model.parameters()}
    assert parameters == {worker.arena.flat.untyped_storage().data_ptr()}
    assert isinstance(worker.model, nn.Module)
