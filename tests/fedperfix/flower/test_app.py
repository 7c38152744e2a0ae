"""Messages, and the search for the nodes of clients, with a stand-in for Flower's grid."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest
import torch

pytest.importorskip("flwr", reason="needs fedperfix[flower]")

from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedperfix.flower import app
from fedperfix.flower.app import GridNodes, packed, unpacked


def test_a_message_carries_arrays_and_scalars() -> None:
    arrays = {"shared": torch.randn(7), "extra.control": torch.randn(2, 3)}
    words = {"round": 3, "loss": 0.5, "name": "x", "auc": float("nan")}
    found, said = unpacked(packed(arrays, words))
    assert all(torch.equal(found[name], value) for name, value in arrays.items())
    assert found["shared"].dtype is torch.float32
    assert str(said) == str(words)


@pytest.mark.parametrize(
    "content",
    [
        RecordDict({}),
        RecordDict({"arrays": ArrayRecord({}), "words": ArrayRecord({})}),
        RecordDict({"arrays": ConfigRecord({}), "words": ConfigRecord({"a": 1})}),
        RecordDict({"arrays": ArrayRecord({"x": Array("float32", (3,), "numpy.ndarray", b"abc")}),
                    "words": ConfigRecord({})}),
        RecordDict({"arrays": ArrayRecord({"x": Array("float32", (3,), "pickle", b"abc")}),
                    "words": ConfigRecord({})}),
        RecordDict({"arrays": ArrayRecord({"x": Array(np.array(["text"]))}), "words": ConfigRecord({})}),
        RecordDict({"arrays": ArrayRecord({"x": Array(np.arange(3))}), "words": ConfigRecord({})}),
    ],
)  # fmt: skip
def test_other_content_is_an_error_not_a_crash(content: RecordDict) -> None:
    with pytest.raises(ValueError, match=r"its (content|arrays)"):
        unpacked(content)


class Grid:
    """Nodes that answer, are lost, or fail as they are told: by node, its client and what it does with orders."""

    def __init__(self, clients: dict[int, int]) -> None:
        self.clients = dict(clients)
        self.dead: set[int] = set()
        self.failing: dict[int, int] = {}
        self.orders: list[int] = []
        self.replies: dict[str, Message] = {}

    def get_node_ids(self) -> Iterable[int]:
        return list(self.clients)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        numbers = []
        for message in messages:
            number = f"m{len(self.replies) + len(self.orders)}-{len(numbers)}-{id(message)}"
            message.metadata._message_id = number
            node = message.metadata.dst_node_id
            query = message.metadata.message_type == "query"
            numbers.append(number)
            if not query:
                self.orders.append(node)
                if node in self.dead:
                    self.clients[node + 100] = self.clients.pop(node)  # it comes back under another number
                    self.dead.discard(node)
                    continue
                if self.failing.get(node, 0) > 0:
                    self.failing[node] -= 1
                    self.replies[number] = Message(error=Error(2, "boom"), reply_to=message)
                    continue
            client = self.clients[node]
            self.replies[number] = Message(content=packed({}, {"client": client, "train": 5}), reply_to=message)
        return numbers

    def pull_messages(self, numbers: Iterable[str]) -> list[Message]:
        return [self.replies.pop(number) for number in numbers if number in self.replies]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "_PAUSE", 0.005)
    for name in ("_task_id", "_run_id", "_node_id"):  # what a process of Flower's has
        monkeypatch.setattr(TaskIdentity, name, 1)


ORDERS = {0: ({}, {"round": 1}), 1: ({}, {"round": 1})}


def test_every_client_is_found_and_asked_once() -> None:
    grid = Grid({11: 1, 12: 0, 13: 2})
    nodes = GridNodes(grid, 60)
    assert sorted(nodes.describe(3, 5)) == [0, 1, 2]
    assert {client: words["client"] for client, (_, words) in nodes.ask("train", ORDERS, 5).items()} == {0: 0, 1: 1}
    assert sorted(grid.orders) == [11, 12]


def test_an_order_of_a_node_that_is_lost_goes_to_its_successor() -> None:
    grid = Grid({11: 1, 12: 0})
    nodes = GridNodes(grid, 60)
    nodes.describe(2, 5)
    grid.dead = {11}
    answers = nodes.ask("train", ORDERS, 5)
    assert answers[1][1]["client"] == 1
    assert grid.orders.count(111) == 1


def test_an_app_that_fails_is_asked_three_times() -> None:
    grid = Grid({11: 1, 12: 0})
    nodes = GridNodes(grid, 60)
    nodes.describe(2, 5)
    grid.failing = {11: 2, 12: 9}
    answers = nodes.ask("train", ORDERS, 5)
    assert answers[1][1]["client"] == 1
    assert answers[0] == "its app failed: boom"
    assert (grid.orders.count(11), grid.orders.count(12)) == (3, 3)


def test_waits_are_bounded() -> None:
    grid = Grid({11: 1})
    nodes = GridNodes(grid, 60)
    assert sorted(nodes.describe(2, 0.05)) == [1]
    answers = nodes.ask("train", ORDERS, 0.05)
    assert answers[0] == "no node of this client is there"
    assert answers[1][1]["client"] == 1


def test_two_nodes_of_one_client_are_one_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(app, "say", lines.append)
    nodes = GridNodes(Grid({11: 1, 12: 1}), 60)
    assert sorted(nodes.describe(2, 0.1)) == [1]
    assert len(lines) == 1
    assert "says that it is client 1, which node" in lines[0]
