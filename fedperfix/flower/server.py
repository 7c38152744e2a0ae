"""What the server does: choose the cohort, send the global parameters, check what comes back, aggregate, remember.

It sees updates of the shared parameters, sizes and scores; personal parameters and data stay with the nodes. After
every round its whole state is one file, from which it goes on: `kept` in it says, for every client, the last round
whose update was used, and with that each node knows which of its own states counts.
"""

from __future__ import annotations

import json
import math
import secrets
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fedperfix.config import ConfigError, TrainConfig
from fedperfix.engine.cohort import Turns
from fedperfix.engine.evaluate import Evaluation
from fedperfix.engine.privacy import check_model, largest_ratio
from fedperfix.engine.privacy import epsilon as spent
from fedperfix.engine.round import RoundResult, sample_clients
from fedperfix.engine.screen import upload_sizes, usable
from fedperfix.engine.state import Server, unpadded
from fedperfix.flower.node import EXTRA, SCORES, SERVER, SHARED, Answer, data_mark, model_mark
from fedperfix.methods import Method, method_class
from fedperfix.methods.aggregators import shares
from fedperfix.models import create_model, create_text_model
from fedperfix.run import metrics
from fedperfix.run.checkpoint import config_digest
from fedperfix.run.files import remove_parts
from fedperfix.run.metrics import RoundMetrics
from fedperfix.run.tensors import Format, TensorsError, read_tensors, write_tensors
from fedperfix_kernels import ParameterArena

FORMAT, STATE = Format("fedperfix-flower-server"), "server.safetensors"
_KEPT, _SIZES, _GLOBAL = "kept", "sizes", "global."
_SECRET_BITS, _LARGEST = 128, 2**31
Log = Callable[[str], None]


class Silence(str):
    """Why there is no answer of a client, where nothing came from it."""


class Nodes(Protocol):
    """The clients' machines, as the server reaches them."""

    def describe(self, clients: int, seconds: float) -> dict[int, dict[str, Any]]:
        """What `Node.describe` says, by client: of all `clients`, or of those that said so in time."""

    def ask(
        self, kind: str, orders: Mapping[int, tuple[Mapping[str, Tensor], Mapping[str, Any]]], seconds: float
    ) -> dict[int, Answer | str]:
        """Send orders (`train` or `test`) by client; what each answers, or why not: `Silence` if nothing came."""


class NoAnswers(RuntimeError):
    """A round that no client answered; the state of before is safe, and the same command goes on from it."""


@dataclass
class _State:
    """Everything that a round changes.

    Args:
        server: global parameters and the method's state at the server.
        kept: by client, the last round whose update was used; 0 is none.
        sizes: by client, its training images; 0 is not known.
        round: how many rounds are finished.
        token: of this run, so that nodes do not take states of another.
        noise_seed: of the noise of `--dp central`; the nodes know the seed of the configuration, but not this one.
    """

    server: Server
    kept: list[int]
    sizes: list[int]
    round: int
    token: str
    noise_seed: int


class Coordinator:
    """The server of a run.

    Args:
        config: of the run.
        folder: for its state and its metrics; a run that is in it goes on.
        nodes: the clients' machines.
        wait, timeout: seconds to wait for all nodes at the start, and for the answers of a round.
        log: takes a sentence about everything that is left out.

    Raises:
        ConfigError: nobody is there, or the folder has another run.
    """

    def __init__(
        self, config: TrainConfig, folder: Path, nodes: Nodes, *, wait: float, timeout: float, log: Log
    ) -> None:
        self.config, self.folder, self.nodes, self.timeout, self.log = config, folder, nodes, timeout, log
        said = nodes.describe(config.clients, wait)
        if not said:
            raise ConfigError(f"nodes: none of {config.clients} clients answered in {wait:g} s; start them first")
        said = self._alike(said)
        absent = sorted(set(range(config.clients)) - said.keys())
        if absent:
            log(f"{len(absent)} of {config.clients} clients are not there: {', '.join(map(str, absent))}")
        self.method = method_class(config.method)(config)
        one = next(iter(said.values()))
        model = _model(config, json.loads(one["shape"]), len(json.loads(one["classes"])))
        self._marks = {"data": data_mark(one)}
        self.arena = ParameterArena(model, self.method.kept_names(model), self.method.frozen_names(model))
        check_model(config, self.arena)
        self._marks["model"] = model_mark(self.arena)
        self.state = self._start()
        for client, words in said.items():
            self.state.sizes[client] = self.state.sizes[client] or words["train"]
        sizes = [words["train"] for words in said.values()]
        log(f"{len(said)} clients are there, with {min(sizes)} to {max(sizes)} training images")

    def _alike(self, said: Mapping[int, Mapping[str, Any]]) -> dict[int, Mapping[str, Any]]:
        """The clients whose inputs and classes are those of most; what the others have goes to the log."""
        kinds = Counter(data_mark(words) for _, words in sorted(said.items()))  # of equal ones the first
        usual = max(kinds, key=kinds.__getitem__)
        alike = {client: words for client, words in sorted(said.items()) if data_mark(words) == usual}
        one = next(iter(alike.values()))
        for client in sorted(said.keys() - alike.keys()):
            name = next(name for name in ("shape", "classes") if said[client][name] != one[name])
            self.log(
                f"client {client} has another {name} than most ({said[client][name]:.80}, {one[name]:.80}) and is "
                "left out; give all nodes like data"
            )
        return alike

    def run(self) -> None:
        """Play the rounds that are left.

        Raises:
            NoAnswers: of a round in which nothing came from any client; the state of before is saved.
        """
        while self.state.round < self.config.rounds:
            begin = time.perf_counter()
            result = self._round()
            record = RoundMetrics.of(result, time.perf_counter() - begin)
            metrics.append(self.folder, record)  # a round that is not in the state as well is cut off
            self._save()
            figures = [("local", record.local_mean), ("all", record.all_mean)]
            said = ", ".join(f"{name} {value:.2f} %" for name, value in figures if value is not None)
            self.log(f"round {record.round}/{self.config.rounds}: {said or 'no client could be used'}")

    def _round(self) -> RoundResult:
        config, state, server = self.config, self.state, self.state.server
        round, seconds = state.round + 1, {}
        sampled = sample_clients(config, round)

        clock = time.perf_counter()
        answers = self._ask("train", sampled, round)
        turns = self._turns(answers)
        seconds["train"] = time.perf_counter() - clock

        clock = time.perf_counter()
        rows = usable(upload_sizes(turns, server.shared), largest_ratio(config)) if answers else []
        for row, client in enumerate(turns.clients):
            if row not in rows:
                self.log(f"round {round}: left out client {client}, whose update is not finite or too large")
        if rows or config.dp == "central":  # whose noise must come in every round
            uploads = replace(turns.uploads(rows), round=round)
            images = [state.sizes[client] for client in uploads.clients]
            self._aggregating.aggregate(server, uploads, shares(config, images))
            for client in uploads.clients:
                state.kept[client] = round
        used = [turns.clients[row] for row in rows]
        seconds["aggregate"] = time.perf_counter() - clock

        clock = time.perf_counter()
        everyone = None
        if round % config.eval_every == 0 or round == config.rounds:
            tested = self._ask("test", range(config.clients), round)
            everyone = _evaluation(tested) if tested else None
        seconds["evaluate"] = time.perf_counter() - clock
        state.round = round
        return self._result(round, sampled, used, answers, everyone, seconds)

    @property
    def _aggregating(self) -> Method:
        """The method, with the secret seed where it draws noise at the server."""
        if self.config.dp != "central":
            return self.method
        return type(self.method)(replace(self.config, seed=self.state.noise_seed))

    def _ask(self, kind: str, clients: Sequence[int], round: int) -> dict[int, Answer]:
        """The answers that can be used; why the others cannot goes to the log.

        Raises:
            NoAnswers: nothing came from a client that should train.
        """
        state = self.state
        arrays = {SHARED: state.server.shared}
        arrays |= {f"{SERVER}{name}": state.server.state[name] for name in self.method.broadcast}
        order = {"round": round, "token": state.token}
        orders = {client: (arrays, {**order, "kept": state.kept[client]}) for client in clients}
        found: dict[int, Answer] = {}
        said = self.nodes.ask(kind, orders, self.timeout)
        if kind == "train" and all(isinstance(answer, Silence) for answer in said.values()):
            raise NoAnswers(f"round {round}: none of {len(orders)} clients answered; run the app again to go on")
        for client, answer in sorted(said.items()):
            trouble = answer if isinstance(answer, str) else self._trouble(kind, client, *answer)
            if trouble is None:
                found[client] = answer
                if kind == "train":
                    state.sizes[client] = answer[1]["train"]
            else:
                self.log(f"round {round}: left out client {client} ({kind}): {trouble}")
        return found

    def _trouble(
        self, kind: str, client: int, arrays: Mapping[str, Tensor], words: Mapping[str, Any]
    ) -> str | None:
        """What is wrong with an answer; None if nothing is."""
        expected = {}
        if kind == "train":
            extra = self.method.extra_upload(self.arena)
            expected = {SHARED: self.arena.shared, **{f"{EXTRA}{name}": value for name, value in extra.items()}}
        if arrays.keys() != expected.keys():
            return f"it has the arrays {', '.join(sorted(arrays)) or 'none'}, not {', '.join(expected) or 'none'}"
        for name, value in expected.items():
            got = arrays[name]
            if got.shape != value.shape or got.dtype != value.dtype:
                return f"'{name}' is {got.dtype} {list(got.shape)}, not {value.dtype} {list(value.shape)}"
        if words.get("client") != client:
            return "it is of another client"
        parts = ("train", "test") if kind == "train" else ("test",)
        return next(filter(None, (_wrong_scores(part, words) for part in parts)), None) or (
            self._foreign(client, words) if kind == "train" else None
        )

    def _foreign(self, client: int, words: Mapping[str, Any]) -> str | None:
        """Whether a client's weight, kind of data or model is not what it was, or ours."""
        known = self.state.sizes[client]
        if not _is_size(words.get("train")) or known not in (0, words["train"]):
            return f"it says that it has {words.get('train')} training images, after {known or 'none'}"
        if words.get("data") != self._marks["data"]:
            return "its inputs or classes are not those of the others"
        if words.get("model") != self._marks["model"]:
            return "it starts with another model, or other frozen weights"
        return None

    def _turns(self, answers: Mapping[int, Answer]) -> Turns:
        clients = tuple(answers)
        extra = self.method.extra_upload(self.arena)
        meters = [[words[f"train_{name}"] for name in SCORES[:3]] for _, words in answers.values()]
        return Turns(
            clients=clients,
            rows=_stacked([arrays[SHARED] for arrays, _ in answers.values()], self.arena.shared),
            extra={
                name: _stacked([sent[f"{EXTRA}{name}"] for sent, _ in answers.values()], like)
                for name, like in extra.items()
            },
            own={},
            meters=torch.tensor(meters).reshape(-1, 3),
            outputs=[],
            shared_numel=self.arena.shared.numel(),
        )

    def _result(
        self,
        round: int,
        sampled: Sequence[int],
        used: Sequence[int],
        answers: Mapping[int, Answer],
        everyone: Evaluation | None,
        seconds: dict[str, float],
    ) -> RoundResult:
        config, server = self.config, self.state.server
        loss, correct, images = (sum(answers[c][1][f"train_{name}"] for c in used) for name in SCORES[:3])
        up = [self.arena.shared, *self.method.extra_upload(self.arena).values()]
        down = [self.arena.shared, *(server.state[name] for name in self.method.broadcast)]
        sizes = [sum(unpadded(x, self.arena) * x.element_size() for x in values) for values in (up, down)]
        cohorts = (sample_clients(config, number) for number in range(1, round + 1))
        return RoundResult(
            round=round,
            sampled=tuple(sampled),
            dropped=tuple(client for client in sampled if client not in used),
            train_loss=loss / images if images else None,
            train_accuracy=100.0 * correct / images if images else None,
            train_images=sum(words["train_images"] for _, words in answers.values()),
            local=_evaluation(answers) if answers else None,
            personalised=everyone,
            mixed=None,
            bytes_up=len(answers) * sizes[0],
            bytes_down=len(sampled) * sizes[1],
            seconds=seconds,
            clients=config.clients,
            epsilon=None if config.dp == "none" else spent(config, cohorts),
        )

    def _start(self) -> _State:
        """The state of the run that is in the folder, or that of a new one."""
        arena, config = self.arena, self.config
        parameters = min(arena.statistics.start, arena.shared.numel())
        backend = "auto" if config.fused else "reference"
        own = self.method.server_state(arena)
        server = Server(arena.shared.clone(), arena.shared_layout, own, backend, parameters)
        none, noise = [0] * config.clients, secrets.randbits(_SECRET_BITS)
        state = _State(server, none, none.copy(), 0, secrets.token_hex(8), noise)
        path = self.folder / STATE
        self.folder.mkdir(parents=True, exist_ok=True)
        if path.exists():
            self._resume(path, state)
            metrics.keep_rounds(self.folder, state.round)
            remove_parts(self.folder)
        return state

    def _resume(self, path: Path, state: _State) -> None:
        try:
            tensors, words = read_tensors(FORMAT, path)
        except TensorsError as error:
            raise ConfigError(f"flower_server_dir: {error}") from error
        places = self._places(state.server)
        if words.get("config") != config_digest(self.config) or tensors.keys() != {*places, _KEPT, _SIZES}:
            raise ConfigError(f"flower_server_dir: '{self.folder}' has another run; name another folder")
        for name, place in places.items():
            place.copy_(tensors[name])
        state.kept, state.sizes = tensors[_KEPT].tolist(), tensors[_SIZES].tolist()
        state.round, state.token, state.noise_seed = int(words["round"]), words["token"], int(words["noise_seed"])
        if state.round > self.config.rounds:
            raise ConfigError(
                f"--rounds: got {self.config.rounds}, but the run in '{self.folder}' has {state.round}; give more"
            )
        self.log(f"goes on after round {state.round}")

    def _save(self) -> None:
        state = self.state
        tensors = dict(self._places(state.server))
        tensors |= {_KEPT: torch.tensor(state.kept), _SIZES: torch.tensor(state.sizes)}
        words = {"round": str(state.round), "token": state.token, "noise_seed": str(state.noise_seed)}
        words["config"] = config_digest(self.config)
        secret = self.config.dp == "central"
        write_tensors(FORMAT, self.folder / STATE, tensors, words, private=secret)

    def _places(self, server: Server) -> dict[str, Tensor]:
        views = server.layout.views(server.shared)
        return {
            **{f"{_GLOBAL}{name}": view for name, view in views.items()},
            **{f"{SERVER}{name}": value for name, value in server.state.items()},
        }


def check_description(words: Mapping[str, Any]) -> str | None:
    """What is wrong with what a node says of itself (`Node.describe`); None if nothing is."""
    if type(words.get("client")) is not int:
        return "it does not say which client it is"
    if not _is_size(words.get("train")):
        return f"it says that it has {words.get('train')} training images"
    try:
        shape, classes = json.loads(words["shape"]), json.loads(words["classes"])
        sides = shape.get("image_hw", ())
        images = _is_size(shape.get("channels")) and len(sides) == 2 and all(map(_is_size, sides))
        texts = shape.keys() == {"num_tokens", "length"} and all(map(_is_size, shape.values()))
        named = bool(classes) and all(type(name) is str for name in classes)
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
        return "it does not say what its inputs and classes are"
    return None if (images or texts) and named else "it does not say what its inputs and classes are"


def _wrong_scores(part: str, words: Mapping[str, Any]) -> str | None:
    """What is wrong with a client's `train` or `test` scores; None if nothing is. A loss may be infinite or NaN."""
    correct, images = (words.get(f"{part}_{name}") for name in ("correct", "images"))
    if not _is_size(images) or type(correct) is not int or not 0 <= correct <= images:
        return f"it says that {correct} of its {images} answers ({part}) are right"
    for name in ("loss",) if part == "train" else ("loss", "auc", "f1"):
        value = words.get(f"{part}_{name}")
        number = type(value) in (int, float)
        undefined = number and name == "auc" and math.isnan(value)
        if not number or not (name == "loss" or undefined or 0 <= value <= 100):
            return f"its {part}_{name} is {str(value)[:40]}"
    return None


def _is_size(value: object) -> bool:
    return type(value) is int and 0 < value < _LARGEST


def _stacked(values: Sequence[Tensor], like: Tensor) -> Tensor:
    return torch.stack(list(values)) if values else like.new_empty(0, *like.shape)


def _evaluation(answers: Mapping[int, Answer]) -> Evaluation:
    clients = sorted(answers)
    columns = {name: np.array([answers[client][1][f"test_{name}"] for client in clients]) for name in SCORES}
    columns |= {name: columns[name].astype(np.int64) for name in ("correct", "images")}
    return Evaluation(tuple(clients), **columns)


def _model(config: TrainConfig, shape: Mapping[str, Any], classes: int) -> torch.nn.Module:
    if "num_tokens" in shape:
        return create_text_model(config, **shape, num_classes=classes)
    hw = tuple(shape["image_hw"])
    return create_model(config, channels=shape["channels"], num_classes=classes, image_hw=hw)
