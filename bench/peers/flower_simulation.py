"""FedAvg with Flower's simulation (package `flwr[simulation]`, Beutel et al., arXiv 2007.14390) on Ray.

Flower's own FedAvg strategy sends the model to `ClientApp`s in Ray actors, one per thread, each on one core. An
actor keeps data and model between messages. Start-up of Ray is not counted. Each client is tested on its test
images after its training.
"""

from __future__ import annotations

import os

# Offline and quiet; before Flower and Ray are imported.
os.environ.update(
    FLWR_TELEMETRY_ENABLED="0",
    FLWR_DISABLE_UPDATE_CHECK="1",
    FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION="1",
    RAY_DEDUP_LOGS="0",
    RAY_USAGE_STATS_ENABLED="0",
)

from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MessageType, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from torch import Tensor, nn

from bench.peers.contestant import Turns
from bench.peers.work import Work

client_app = ClientApp()


@lru_cache(maxsize=1)
def prepared(text: str) -> tuple[Work, nn.Module, Tensor]:
    """Work, model and normalised images of an actor."""
    work = Work.from_json(text)
    return work, work.new_model().to(work.device), work.normalised().to(work.device)


@client_app.train()
def train(message: Message, context: Context) -> Message:
    """One client's epochs of plain SGD, and its test."""
    config = message.content["config"]
    work, model, pixels = prepared(config["work"])
    client, labels = config["client"], work.data.labels.to(work.device)
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=work.lr)
    for order in work.orders(client, config["server-round"]):
        for chosen in order.split(work.batch_size):
            optimizer.zero_grad()
            F.cross_entropy(model(pixels[chosen]), labels[chosen]).backward()
            optimizer.step()
    model.eval()
    test = work.data.test[client]
    with torch.no_grad():
        right = sum((model(pixels[x]).argmax(1) == labels[x]).sum().item() for x in test.split(work.batch_size))
    metrics = MetricRecord({"num-examples": len(work.data.train[client]), "accuracy": 100.0 * right / len(test)})
    content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics})
    return Message(content=content, reply_to=message)


class Cohorts(FedAvg):
    """Flower's FedAvg with the cohorts of a `Work`, which asks for and tells of every round."""

    def __init__(self, work: Work, turns: Turns) -> None:
        super().__init__(fraction_evaluate=0.0)
        self.work, self.turns = work, turns

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The model for every client of the cohort; any node can play any of them."""
        self.turns.begin()
        nodes = sorted(grid.get_node_ids())
        messages = []
        for node, client in zip(nodes, self.work.cohort(server_round), strict=False):
            order = {"work": self.work.to_json(), "client": client, "server-round": server_round}
            content = RecordDict({"arrays": arrays, "config": ConfigRecord(order)})
            messages.append(Message(content=content, message_type=MessageType.TRAIN, dst_node_id=node))
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Flower's weighted mean; a client that failed is an error here."""
        received = list(replies)
        failed = [reply.error.reason for reply in received if reply.has_error()]
        if failed or len(received) != self.work.sampled:
            raise RuntimeError(f"{len(received)} of {self.work.sampled} clients answered: {failed}")
        arrays, metrics = super().aggregate_train(server_round, received)
        found = [reply.content["metrics"]["accuracy"] for reply in received]
        self.turns.end(sum(found) / len(found))
        return arrays, metrics


def play(work: Work, rounds: int, turns: Turns) -> dict[str, Tensor]:
    """All rounds; arguments and result as `bench.peers.contestant.play`."""
    # Ray's workers are new processes, which must find this package.
    root = str(Path(__file__).parents[2])
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    result: dict[str, Any] = {}
    server_app = ServerApp()

    @server_app.main()
    def serve(grid: Grid, context: Context) -> None:
        start = ArrayRecord(work.new_model().state_dict())
        result["end"] = Cohorts(work, turns).start(grid, start, num_rounds=rounds).arrays

    gpus = 1.0 / work.threads if work.device == "cuda" else 0.0
    run_simulation(
        server_app,
        client_app,
        num_supernodes=work.sampled,
        backend_config={
            "init_args": {"num_cpus": work.threads, "include_dashboard": False},
            "client_resources": {"num_cpus": 1, "num_gpus": gpus},
        },
    )
    return result["end"].to_torch_state_dict()
