"""The Flower app: `server_app` and `client_app`, in Flower's simulation and in a deployment.

A message has one `ArrayRecord` of named float32 tensors and one `ConfigRecord` of scalars, both ways. Arrays are
numpy's, read without pickle.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.logger import log as flower_log
from flwr.serverapp import Grid, ServerApp
from torch import Tensor

from fedperfix.config import ConfigError
from fedperfix.data import DataError
from fedperfix.flower.node import Answer, Node, NodeError
from fedperfix.flower.server import Coordinator, NoAnswers, Silence, check_description
from fedperfix.flower.settings import from_run_config
from fedperfix.run.cli import USER_ERRORS, sentence
from fedperfix.run.lock import locked

_ARRAYS, _WORDS, _TROUBLE = "arrays", "words", "trouble"
_PAUSE, _ATTEMPTS = 0.5, 3
_INFO, _MOST_TEXT = 20, 1000
_TYPES = {"train": MessageType.TRAIN, "test": MessageType.EVALUATE, "describe": MessageType.QUERY}

_NUMBER, _TEXT = (int, "a whole number"), (str, "a text")
# What a node's own configuration may have; Flower's simulation gives the first two.
_PLACE = {
    "partition-id": _NUMBER, "num-partitions": _NUMBER, "own-data": (bool, "true or false"),
    "state-dir": _TEXT, "data-dir": _TEXT, "cache-dir": _TEXT, "device": _TEXT,
}  # fmt: skip

client_app = ClientApp()
server_app = ServerApp()


def say(text: str) -> None:
    """A line of the run's log."""
    flower_log(_INFO, "%s", text)


def packed(arrays: Mapping[str, Tensor], words: Mapping[str, Any]) -> RecordDict:
    """A message's content."""
    records = {name: Array(value.detach().cpu().numpy()) for name, value in arrays.items()}
    return RecordDict({_ARRAYS: ArrayRecord(records), _WORDS: ConfigRecord(dict(words))})


def unpacked(content: RecordDict) -> Answer:
    """The arrays and scalars of a message.

    Raises:
        ValueError: it has others.
    """
    arrays, words = content.get(_ARRAYS), content.get(_WORDS)
    if not isinstance(arrays, ArrayRecord) or not isinstance(words, ConfigRecord):
        raise ValueError("its content is not that of this app")
    return {name: _tensor(array) for name, array in arrays.items()}, dict(words.items())


def _tensor(array: Array) -> Tensor:
    if array.stype != "numpy.ndarray":
        raise ValueError(f"its arrays are {array.stype}, not numpy.ndarray")
    try:
        value = array.numpy()  # without pickle
    except (TypeError, ValueError, EOFError, OSError, MemoryError) as error:
        raise ValueError(f"its arrays cannot be read ({error})") from error
    if value.dtype not in (np.float32, np.float64, np.float16):
        raise ValueError(f"its arrays are of {value.dtype}, not of floating-point numbers")
    return torch.from_numpy(value.copy())


@functools.lru_cache(maxsize=4)  # in a simulation, a process plays several clients in turn
def _node(run: tuple[tuple[str, Any], ...], own: tuple[tuple[str, Any], ...]) -> Node:
    place = dict(own)
    table = dict(run)
    for name in ("data_dir", "cache_dir", "device"):
        if name.replace("_", "-") in place:
            table[name] = place[name.replace("_", "-")]
    config, settings = from_run_config(table)
    _check_place(place)
    folder = Path(place.get("state-dir", settings.flower_state_dir)).expanduser()
    return Node(config, place["partition-id"], folder, place.get("own-data", False))


def _check_place(place: Mapping[str, Any]) -> None:
    if "partition-id" not in place:
        raise ConfigError("partition-id: is not in the node's configuration; takes the client's number from 0 on")
    for name, value in place.items():
        if name not in _PLACE:
            raise ConfigError(f"{name}: is no key of a node's configuration; takes {', '.join(_PLACE)}")
        kind, takes = _PLACE[name]
        if type(value) is not kind:
            raise ConfigError(f"{name}: got {value!r} in the node's configuration, takes {takes}")


def _reply(message: Message, context: Context, kind: str) -> Message:
    try:
        node = _node(tuple(sorted(context.run_config.items())), tuple(sorted(context.node_config.items())))
        if kind == "describe":
            answer: Answer = {}, node.describe()
        else:
            arrays, order = unpacked(message.content)
            answer = getattr(node, kind)(order, arrays)
        return Message(content=packed(*answer), reply_to=message)
    except (NodeError, DataError, ValueError, *USER_ERRORS) as error:
        text = sentence(error) if isinstance(error, USER_ERRORS) else str(error)
        return Message(content=RecordDict({_TROUBLE: ConfigRecord({_TROUBLE: text})}), reply_to=message)


@client_app.query()
def describe(message: Message, context: Context) -> Message:
    """Say which client this is."""
    return _reply(message, context, "describe")


@client_app.train()
def train(message: Message, context: Context) -> Message:
    """Train the client."""
    return _reply(message, context, "train")


@client_app.evaluate()
def test(message: Message, context: Context) -> Message:
    """Test the client."""
    return _reply(message, context, "test")


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    """Play the run.

    Raises:
        RunFailed: in one sentence, so that Flower shows the run as failed.
    """
    try:
        say(f"finished; the run is in {_play(grid, context)}")
    except (NoAnswers, *USER_ERRORS) as error:
        raise RunFailed(sentence(error)) from None


class RunFailed(RuntimeError):
    """The end of a run for a reason that its user can mend; the message is one sentence."""


def _play(grid: Grid, context: Context) -> Path:
    config, settings = from_run_config(context.run_config)
    folder = Path(settings.flower_server_dir).expanduser()
    wait, timeout = settings.flower_wait, settings.flower_timeout
    nodes = GridNodes(grid, wait, settings.flower_patience)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, "flower_server_dir"):
        Coordinator(config, folder, nodes, wait=wait, timeout=timeout, log=say).run()
    return folder


class GridNodes:
    """The clients behind Flower's grid (see `server.Nodes`).

    A node that is new, or came back, is asked which client it is. An order whose node is gone is sent again when
    the client is back, and so is one without an answer after some time (a node that was killed may come back before
    anybody notices); nodes answer an order that comes twice with the same bits.

    Args:
        grid: Flower's.
        wait: seconds after which a client that has no node is given up in a round.
        patience: seconds until an order without an answer is sent again.
    """

    def __init__(self, grid: Grid, wait: float, patience: float) -> None:
        self.grid = grid
        self.wait = wait
        self.patience = patience
        self.node_of: dict[int, int] = {}  # by client
        self._asked: dict[str, int] = {}  # descriptions that are not there yet: node by message
        self._known: set[int] = set()
        self._said: dict[int, dict[str, Any]] = {}

    def describe(self, clients: int, seconds: float) -> dict[int, dict[str, Any]]:
        """See `server.Nodes`."""
        end = time.monotonic() + seconds
        while len(self.node_of) < clients and time.monotonic() < end:
            self._refresh()
            time.sleep(_PAUSE)
        return {client: words for client, words in self._said.items() if 0 <= client < clients}

    def ask(
        self, kind: str, orders: Mapping[int, tuple[Mapping[str, Tensor], Mapping[str, Any]]], seconds: float
    ) -> dict[int, Answer | str]:
        """See `server.Nodes`."""
        begin = time.monotonic()
        answers: dict[int, Answer | str] = {}
        sent: dict[str, tuple[int, int, float]] = {}  # client, node and time by message
        attempts = dict.fromkeys(orders, 0)
        why = dict.fromkeys(orders, "no node of this client is there")
        asked: set[int] = set()
        while (passed := time.monotonic() - begin) < seconds:
            online = self._refresh()
            hoped = orders.keys() if passed < self.wait else asked | orders.keys() & self.node_of.keys()
            if answers.keys() >= hoped:
                break
            sent = {message: place for message, place in sent.items() if place[1] in online}
            recent = time.monotonic() - self.patience
            waiting = set(orders) - answers.keys() - {client for client, _, when in sent.values() if when > recent}
            for client in sorted(waiting & self.node_of.keys()):
                node = self.node_of[client]
                sent[self._send(kind, node, packed(*orders[client]))] = (client, node, time.monotonic())
                asked.add(client)
                why[client] = f"no answer within {seconds:g} s"
            for reply in self.grid.pull_messages(list(sent)) if sent else ():
                client, _, _ = sent.pop(reply.metadata.reply_to_message_id, (-1, 0, 0.0))
                if client < 0 or client in answers:
                    continue
                attempts[client] += 1
                if not reply.has_error():
                    answers[client] = _answer(reply)
                elif attempts[client] >= _ATTEMPTS:
                    answers[client] = f"its app failed: {reply.error.reason}"
            if len(answers) < len(orders):
                time.sleep(_PAUSE)
        return {client: answers.get(client, Silence(why[client])) for client in orders}

    def _refresh(self) -> set[int]:
        """Ask new nodes which client they are; returns the nodes that are there."""
        online = set(self.grid.get_node_ids())
        self.node_of = {client: node for client, node in self.node_of.items() if node in online}
        self._known &= online
        for node in online - self._known - set(self._asked.values()):
            self._asked[self._send("describe", node, packed({}, {}))] = node
        self._asked = {message: node for message, node in self._asked.items() if node in online}
        for reply in self.grid.pull_messages(list(self._asked)) if self._asked else ():
            node = self._asked.pop(reply.metadata.reply_to_message_id, None)
            if node is None:
                continue
            if reply.has_error():
                say(f"node {node}: its app failed: {reply.error.reason}")
                continue  # it is asked again
            self._known.add(node)
            answer = _answer(reply)
            if isinstance(answer, str):
                say(f"node {node}: {answer}")
                continue
            trouble = check_description(answer[1])
            if trouble is not None:
                say(f"node {node}: {trouble}; left out")
                continue
            client = answer[1]["client"]
            if client in self.node_of:
                say(f"node {node}: says that it is client {client}, which node {self.node_of[client]} is; left out")
            else:
                self.node_of[client], self._said[client] = node, answer[1]
        return online

    def _send(self, kind: str, node: int, content: RecordDict) -> str:
        message = Message(content=content, message_type=_TYPES[kind], dst_node_id=node)
        return next(iter(self.grid.push_messages([message])))


def _answer(reply: Message) -> Answer | str:
    trouble = reply.content.get(_TROUBLE)
    if trouble is not None:
        return str(trouble.get(_TROUBLE, "it does not say what is wrong"))[:_MOST_TEXT].replace("\n", " ")
    try:
        return unpacked(reply.content)
    except ValueError as error:
        return str(error)
