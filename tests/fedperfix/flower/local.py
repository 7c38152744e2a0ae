"""Nodes in this process, in place of Flower's grid."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fedperfix.config import TrainConfig
from fedperfix.flower.node import Answer, Node, NodeError

Change = Callable[[str, int, int, Answer], "Answer | str"]


class LocalNodes:
    """One `Node` per client, made anew for every order, as processes that end after each would be.

    Args:
        config: of the run.
        folder: of the nodes' states.
        change: from kind, client, round and answer to what the server gets.
    """

    def __init__(self, config: TrainConfig, folder: Path, change: Change = lambda *given: given[-1]) -> None:
        self.config, self.folder, self.change = config, folder, change
        self.sent: list[tuple[str, int, Answer]] = []

    def describe(self, clients: int, seconds: float) -> dict[int, dict[str, Any]]:
        return {client: Node(self.config, client, self.folder).describe() for client in range(clients)}

    def ask(
        self, kind: str, orders: Mapping[int, tuple[Mapping[str, Tensor], Mapping[str, Any]]], seconds: float
    ) -> dict[int, Answer | str]:
        answers: dict[int, Answer | str] = {}
        for client, (arrays, order) in orders.items():
            try:
                answer = getattr(Node(self.config, client, self.folder), kind)(order, arrays)
            except NodeError as error:
                answers[client] = str(error)
                continue
            self.sent.append((kind, client, answer))
            answers[client] = self.change(kind, client, order["round"], answer)
        return answers
