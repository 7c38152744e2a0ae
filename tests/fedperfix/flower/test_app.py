"""Messages, and the search for the nodes of clients, with a stand-in for Flower's grid."""

from __future__ import annotations

import io
import time
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("flwr", reason="needs fedperfix[flower]")

from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedperfix.config import ConfigError, parse_args
from fedperfix.flower import app
from fedperfix.flower.app import GridNodes, packed, unpacked
from fedperfix.flower.server import Silence
from fedperfix.flower.settings import FlowerSettings, to_run_config
from fedperfix.run.lock import locked


def test_a_message_carries_arrays_and_scalars() -> None:
    arrays = {"shared": torch.randn(7), "extra.control": torch.randn(2, 3)}
    words = {"round": 3, "loss": 0.5, "name": "x", "auc": float("nan")}
    found, said = unpacked(packed(arrays, words))
    assert all(torch.equal(found[name], value) for name, value in arrays.items())
    assert found["shared"].dtype is torch.float32
    assert str(said) == str(words)


def huge(numbers: int) -> bytes:
    """numpy's file of so many of them, which ends behind its header."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (numbers,)})
    return file.getvalue()


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
        RecordDict({"arrays": ArrayRecord({"x": Array("float32", (10**11,), "numpy.ndarray", huge(10**11))}),
                    "words": ConfigRecord({})}),
        RecordDict({"arrays": ArrayRecord({"x": Array(np.array(["text"]))}), "words": ConfigRecord({})}),
        RecordDict({"arrays": ArrayRecord({"x": Array(np.arange(3))}), "words": ConfigRecord({})}),
    ],
)  # fmt: skip
def test_other_content_is_an_error_not_a_crash(content: RecordDict) -> None:
    with pytest.raises(ValueError, match=r"its (content|arrays)"):
        unpacked(content)


SAID = {"train": 5, "shape": '{"channels": 1, "image_hw": [8, 8]}', "classes": '["a", "b"]'}


class Grid:
    """Nodes that answer, are lost, or fail as they are told: by node, its client and what it does with orders."""

    def __init__(self, clients: dict[int, int]) -> None:
        self.clients = dict(clients)
        self.said: dict[int, dict[str, object]] = {}
        self.dead: set[int] = set()
        self.failing: dict[int, int] = {}
        self.orders: list[int] = []
        self.replies: dict[str, Message] = {}

    def reply(self, content: RecordDict) -> Message:
        """A message with this content."""
        order = Message(content=packed({}, {}), message_type="train", dst_node_id=1)
        return Message(content=content, reply_to=order)

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
            self.replies[number] = Message(
                content=packed({}, {**SAID, "client": client, **self.said.get(node, {})}), reply_to=message
            )
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
    nodes = GridNodes(grid, 60, 60)
    assert sorted(nodes.describe(3, 5)) == [0, 1, 2]
    assert {client: words["client"] for client, (_, words) in nodes.ask("train", ORDERS, 5).items()} == {0: 0, 1: 1}
    assert sorted(grid.orders) == [11, 12]


def test_an_order_of_a_node_that_is_lost_goes_to_its_successor() -> None:
    grid = Grid({11: 1, 12: 0})
    nodes = GridNodes(grid, 60, 60)
    nodes.describe(2, 5)
    grid.dead = {11}
    answers = nodes.ask("train", ORDERS, 5)
    assert answers[1][1]["client"] == 1
    assert grid.orders.count(111) == 1


def test_an_app_that_fails_is_asked_three_times() -> None:
    grid = Grid({11: 1, 12: 0})
    nodes = GridNodes(grid, 60, 60)
    nodes.describe(2, 5)
    grid.failing = {11: 2, 12: 9}
    answers = nodes.ask("train", ORDERS, 5)
    assert answers[1][1]["client"] == 1
    assert answers[0] == "its app failed: boom"
    assert (grid.orders.count(11), grid.orders.count(12)) == (3, 3)


def test_waits_are_bounded() -> None:
    grid = Grid({11: 1})
    nodes = GridNodes(grid, 60, 60)
    assert sorted(nodes.describe(2, 0.05)) == [1]
    answers = nodes.ask("train", ORDERS, 0.05)
    assert answers[0] == "no node of this client is there"
    assert answers[1][1]["client"] == 1


def test_two_nodes_of_one_client_are_one_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(app, "say", lines.append)
    nodes = GridNodes(Grid({11: 1, 12: 1}), 60, 60)
    assert sorted(nodes.describe(2, 0.1)) == [1]
    assert len(lines) == 1
    assert "says that it is client 1, which node" in lines[0]


def test_a_client_without_a_node_is_not_waited_for_as_long_as_one_that_works() -> None:
    nodes = GridNodes(Grid({11: 1}), 0.05, 60)
    nodes.describe(2, 0.05)
    begin = time.monotonic()
    answers = nodes.ask("train", ORDERS, 60)
    assert time.monotonic() - begin < 5
    assert isinstance(answers[0], Silence)
    assert answers[1][1]["client"] == 1


@pytest.mark.parametrize(
    ("said", "line"),
    [
        ({"client": [1, 2]}, "it does not say which client it is; left out"),
        ({"client": True}, "it does not say which client it is; left out"),
        ({"train": 0}, "it says that it has 0 training images; left out"),
        ({"train": 2**62}, "training images; left out"),
        ({"shape": "[]"}, "it does not say what its inputs and classes are; left out"),
        ({"shape": '{"channels": 1, "image_hw": [8]}'}, "it does not say what its inputs and classes are"),
        ({"classes": "{"}, "it does not say what its inputs and classes are; left out"),
        ({"classes": "[" * 100_000}, "it does not say what its inputs and classes are; left out"),
    ],
)
def test_a_node_that_describes_itself_wrongly_is_left_out(
    said: dict, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    monkeypatch.setattr(app, "say", lines.append)
    grid = Grid({11: 1, 12: 0})
    grid.said = {11: said}
    assert sorted(GridNodes(grid, 60, 60).describe(2, 0.1)) == [0]
    assert len(lines) == 1
    assert lines[0].startswith("node 11: ")
    assert line in lines[0]


def test_trouble_without_its_text_is_trouble_all_the_same() -> None:
    reply = Grid({}).reply(RecordDict({"trouble": ConfigRecord({})}))
    assert app._answer(reply) == "it does not say what is wrong"


@pytest.mark.parametrize(
    ("place", "match"),
    [
        ({}, "partition-id: is not in the node's configuration"),
        ({"partition-id": "abc"}, "partition-id: got 'abc' in the node's configuration, takes a whole number"),
        ({"partition-id": 1.7}, "partition-id: got 1.7 in"),
        ({"partition-id": 1, "own-data": "false"}, "own-data: got 'false' in .* takes true or false"),
        ({"partition-id": 1, "datadir": "x"}, "datadir: is no key of a node's configuration; takes partition-id,"),
    ],
)
def test_a_nodes_own_configuration_is_checked(place: dict, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        app._check_place(place)


def test_a_run_that_fails_for_its_user_says_why_in_one_sentence() -> None:
    context = SimpleNamespace(run_config={"rounds": 0})
    with pytest.raises(app.RunFailed, match="^--rounds: got 0, takes a whole number of at least 1$"):
        app.main(Grid({}), context)


def test_one_run_at_a_time_has_the_servers_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    table = to_run_config(parse_args(["--method", "fedper"]), FlowerSettings(flower_server_dir="server"))
    Path("server").mkdir()
    context = SimpleNamespace(run_config=table)
    with locked(Path("server"), "flower_server_dir"), pytest.raises(app.RunFailed) as failed:
        app.main(Grid({}), context)
    assert str(failed.value).startswith("flower_server_dir: 'server' is in use by another process")
    assert not list(Path("server").iterdir())
