"""What a client's machine does: train and test its one client, and keep what is its own.

The client's own state after a round lies in a file of that round, and the server says with every order which
round's state counts: the last one whose update it used. A node that is killed, or asked twice, therefore starts
from the same state and finds the same bits. Files of other rounds are removed.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedperfix.config import ConfigError, TrainConfig
from fedperfix.data import FederatedData, load_partitioned
from fedperfix.engine.cohort import Turns, train_cohort
from fedperfix.engine.device import resolve_device
from fedperfix.engine.evaluate import Evaluation, evaluate
from fedperfix.engine.screen import finite_rows
from fedperfix.engine.stopwatch import Stopwatch
from fedperfix.engine.table import CLIENT, PERSONAL
from fedperfix.run.files import remove_parts, write_text
from fedperfix.run.slots import available
from fedperfix.run.tensors import Format, TensorsError, read_tensors, write_tensors
from fedperfix.train import Federation, assemble, build
from fedperfix_kernels import ParameterArena

FORMAT = Format("fedperfix-node")
SHARED, EXTRA, SERVER = "shared", "extra.", "server."
_SECRET_BITS = 128
_LOST = "put it back from a copy; without it the client stays left out of this run"
SCORES = ("loss", "correct", "images", "auc", "f1")
Scalars = Mapping[str, Any]
Answer = tuple[dict[str, Tensor], dict[str, Any]]


class NodeError(RuntimeError):
    """An order that this node cannot carry out; the message is one sentence for the server's log."""


class Node:
    """One client of a federation.

    Args:
        config: of the run.
        client: its number, 0 to `config.clients` − 1.
        folder: where its states are kept.
        own_data: whether all images of the data set are this client's; else they are divided as the configuration
            says, and it takes its part.

    Raises:
        ConfigError, DataError: wrong input.
    """

    def __init__(self, config: TrainConfig, client: int, folder: Path, own_data: bool = False) -> None:
        if not 0 <= client < config.clients:
            raise ConfigError(f"partition-id: got {client}, takes 0 to {config.clients - 1}, as --clients says")
        self.config = replace(config, personal_table="disk" if available() else "memory")
        self.client = client
        self.folder = folder
        self.federation = _with_own_data(self.config, client) if own_data else _divided(self.config)
        if config.dp == "local":
            self.federation.worker.noise_seed = _secret(folder, client)

    def describe(self) -> dict[str, Any]:
        """What the server needs to know of this node: no more than sizes and names of classes."""
        return {"client": self.client, **self._data(), **self._marks()}

    def train(self, order: Scalars, arrays: Mapping[str, Tensor]) -> Answer:
        """Train from the global parameters and the client's own state; keep the new one, return the update.

        Args:
            order: `round`, `kept` (the round whose state counts, 0 for the start) and `token` of the run.
            arrays: `shared`, and `server.NAME` of what the method broadcasts.

        Returns:
            `shared` and `extra.NAME` of what the method uploads; sums over the training images and scores over
            the test images.

        Raises:
            NodeError: arrays that do not fit, a state that is not there, or an update that is not finite.
        """
        self._begin(order, arrays)
        worker, state, round = self.federation.worker, self.federation.state, order["round"]
        turns = train_cohort(worker, state, [self.client], round, Stopwatch(worker.device), _silent)
        if not finite_rows(turns.rows, *turns.extra.values(), *turns.own.values()):
            raise NodeError(f"client {self.client}: update of round {round} is not finite")
        self._keep(order, turns)
        tested = Evaluation.of([self.client], turns.outputs, worker)
        update = {SHARED: turns.shared[0], **{f"{EXTRA}{name}": rows[0] for name, rows in turns.extra.items()}}
        loss, correct, images = turns.meters[0].tolist()
        sums = {"train_loss": loss, "train_correct": int(correct), "train_images": int(images)}
        return update, {"client": self.client, **self._marks(), **sums, **_scores(tested)}

    def test(self, order: Scalars, arrays: Mapping[str, Tensor]) -> Answer:
        """Test the client with the global parameters and its own; arguments as in `train`."""
        self._begin(order, arrays)
        worker, state = self.federation.worker, self.federation.state
        return {}, {"client": self.client, **_scores(evaluate(worker, state, [self.client], order["round"]))}

    def _data(self) -> dict[str, str]:
        """What all clients must have in common: the inputs' shape and the classes."""
        dataset = self.federation.dataset
        shape = {"channels": dataset.inputs.shape[1], "image_hw": list(dataset.inputs.shape[2:])}
        if dataset.is_text:
            shape = {"num_tokens": dataset.num_tokens, "length": dataset.inputs.shape[1]}
        return {"shape": json.dumps(shape), "classes": json.dumps(list(dataset.class_names))}

    def _marks(self) -> dict[str, Any]:
        """What must not change from answer to answer: its training images, its kind of data, and the model."""
        worker = self.federation.worker
        return {
            "train": len(worker.data.train[self.client]),
            "data": data_mark(self._data()),
            "model": model_mark(worker.arena),
        }

    def _begin(self, order: Scalars, arrays: Mapping[str, Tensor]) -> None:
        state, method = self.federation.state, self.federation.worker.method
        places = {SHARED: state.server.shared, **{f"{SERVER}{x}": state.server.state[x] for x in method.broadcast}}
        wrong = sorted(arrays.keys() ^ places.keys())
        wrong += [x for x in places if not wrong and (arrays[x].shape, arrays[x].dtype) != _kind(places[x])]
        if wrong:
            raise NodeError(f"client {self.client}: what the server sent does not fit this model ('{wrong[0]}')")
        for name, place in places.items():
            place.copy_(arrays[name])
        state.table.undo()  # what the table has of an earlier order
        if order["kept"]:
            path = self._path(order, order["kept"])
            try:
                tensors, metadata = read_tensors(FORMAT, path)
            except FileNotFoundError as error:
                raise NodeError(
                    f"client {self.client}: has no state of round {order['kept']} in '{path.parent}'; {_LOST}"
                ) from error
            except TensorsError as error:
                raise NodeError(f"client {self.client}: {error}; {_LOST}") from error
            if metadata.get("client") != str(self.client):
                raise NodeError(f"client {self.client}: '{path}' is of another client")
            state.table.write([self.client], {name: value[None] for name, value in tensors.items()})

    def _keep(self, order: Scalars, turns: Turns) -> None:
        row = {PERSONAL: turns.local[0], **{f"{CLIENT}{name}": rows[0] for name, rows in turns.own.items()}}
        path = self._path(order, order["round"])
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_parts(path.parent)
        write_tensors(FORMAT, path, row, {"client": str(self.client)})
        for other in path.parent.glob("round-*.safetensors"):
            if other not in (path, self._path(order, order["kept"])):
                other.unlink()

    def _path(self, order: Scalars, round: int) -> Path:
        if not re.fullmatch("[0-9a-f]{8,64}", str(order["token"])):
            raise NodeError(f"client {self.client}: the order has no token of a run")
        return self.folder / order["token"] / f"client-{self.client}" / f"round-{round:06}.safetensors"


def data_mark(said: Mapping[str, Any]) -> str:
    """A digest of the inputs' shape and the names of the classes, as `Node.describe` says them."""
    return hashlib.sha256(f"{said['shape']}\n{said['classes']}".encode()).hexdigest()


def model_mark(arena: ParameterArena) -> str:
    """A digest of which parameters are shared, of which shapes, and of the values of the frozen ones."""
    layout = arena.shared_layout
    digest = hashlib.sha256(repr((layout.names, [tuple(shape) for shape in layout.shapes])).encode())
    for name, value in sorted(arena.frozen.items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _secret(folder: Path, client: int) -> int:
    """The seed of this client's noise, drawn once and never sent; an order that comes twice gets the same noise."""
    path = folder / f"client-{client}.noise-seed"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_text(path, f"{secrets.randbits(_SECRET_BITS)}\n", private=True)
    try:
        return int(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"state-dir: '{path}' is damaged; delete it, and a new one is drawn") from error


def _divided(config: TrainConfig) -> Federation:
    return build(config, resolve_device(config.device))


def _with_own_data(config: TrainConfig, client: int) -> Federation:
    """A federation in which all samples of the data set are one client's, and the others have none."""
    dataset, partition = load_partitioned(
        replace(config, clients=1, sampled=1, partition="iid", partition_file=None)
    )
    data = FederatedData.of(dataset, partition, device := resolve_device(config.device))
    none = data.train[0][:0]
    parts = {
        name: tuple(own[0] if index == client else none for index in range(config.clients))
        for name, own in (("train", data.train), ("test", data.test))
    }
    domains = tuple(data.client_domains[0] if index == client else "" for index in range(config.clients))
    return assemble(config, device, dataset, partition, replace(data, **parts, client_domains=domains))


def _scores(tested: Evaluation) -> dict[str, Any]:
    return {f"test_{name}": getattr(tested, name)[0].item() for name in SCORES}


def _kind(value: Tensor) -> tuple[torch.Size, torch.dtype]:
    return value.shape, value.dtype


def _silent(phase: str, done: int, total: int) -> None:
    pass
