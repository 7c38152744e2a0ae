"""Nodes and servers that are killed at random moments: `python -m tests.fedperfix.flower.killed DIR METHOD`.

As in `tests.fedperfix.killed`, what is killed is a fork of this process. DIR gets the folders `whole`, of a run
that was left alone, `node`, where nodes were killed in the middle of their orders, and `server`, where all was.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fedperfix.config import TrainConfig, parse_args
from fedperfix.flower.node import Answer, Node
from fedperfix.flower.server import STATE, Coordinator, Nodes
from tests.fedperfix.flower.local import LocalNodes
from tests.fedperfix.killed import KILLS, ROUNDS, killed_after, play, play_killed, prepare
from tests.fedperfix.test_train_cli import SMALL


class KilledNodes(LocalNodes):
    """Nodes of which every second one is killed in the middle of an order, which it then gets again.

    Args:
        config, folder: as of `LocalNodes`.
    """

    def __init__(self, config: TrainConfig, folder: Path) -> None:
        super().__init__(config, folder)
        self.random = np.random.default_rng(5)
        self.seconds = 0.0  # of an order, at most
        self.kills = 0

    def ask(
        self, kind: str, orders: Mapping[int, tuple[Mapping[str, Tensor], Mapping[str, Any]]], seconds: float
    ) -> dict[int, Answer | str]:
        return {client: self._answer(kind, client, *order) for client, order in orders.items()}

    def _answer(self, kind: str, client: int, arrays: Mapping[str, Tensor], order: Mapping[str, Any]) -> Answer:
        file = self.folder.parent / "answer"
        file.unlink(missing_ok=True)

        def work() -> int:
            sent, words = getattr(Node(self.config, client, self.folder), kind)(order, arrays)
            save_file({"": torch.zeros(1), **sent}, file, {"words": json.dumps(words)})
            return 0

        while self.seconds and self.kills < KILLS and self.random.random() < 0.5:
            self.kills += killed_after(work, self.random.uniform(0.0, self.seconds))
        begin = time.perf_counter()
        play(work)
        self.seconds = max(self.seconds, time.perf_counter() - begin)
        with safe_open(file, framework="pt") as content:
            found = {name: content.get_tensor(name) for name in content.keys() if name}  # noqa: SIM118
            return found, json.loads(content.metadata()["words"])


def coordinate(config: TrainConfig, folder: Path, nodes: Nodes) -> int:
    """A server's work; it goes on with what is in the folder."""
    Coordinator(config, folder / "server", nodes, wait=1, timeout=1, log=print).run()
    return 0


if __name__ == "__main__":
    prepare()
    where, method = Path(sys.argv[1]), sys.argv[2]
    options = [*SMALL, "--rounds", str(ROUNDS), "--method", method, "--optimizer", "sgd", "--precision", "fp32"]
    chosen = parse_args(options)
    whole, node, server = (where / name for name in ("whole", "node", "server"))
    took = play(lambda: coordinate(chosen, whole, LocalNodes(chosen, whole / "nodes")))
    nodes = KilledNodes(chosen, node / "nodes")
    node.mkdir()
    coordinate(chosen, node, nodes)
    begun = play_killed(
        lambda: coordinate(chosen, server, LocalNodes(chosen, server / "nodes")),
        server,
        server / "server" / STATE,
        took / 8,
        seed=7,
    )
    print(nodes.kills, begun, f"of {KILLS} kills of nodes, and of servers after the first round")
