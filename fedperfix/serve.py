"""`python -m fedperfix.serve RUN DIR`: write the models of a run's clients for use elsewhere.

DIR gets `model.safetensors`, what all clients share and how the model is built, and `clients/NUMBER.safetensors`,
what is one client's own. Then, in Python, one batch with images of many clients:

    from fedperfix.serve import load
    model = load("DIR")
    logits = model(images, clients)
"""

from __future__ import annotations

import argparse
import json
import operator
import re
import shutil
import sys
import tempfile
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedperfix.config import ConfigError, TrainConfig, parse_args
from fedperfix.config.command_line import Parser
from fedperfix.config.options import FIELDS, KINDS, typed
from fedperfix.data import Preprocess
from fedperfix.engine.device import autocast_dtype, resolve_device
from fedperfix.engine.evaluate import obstacle
from fedperfix.methods import METHODS, Method, method_class
from fedperfix.models import create_model, create_text_model, input_shape
from fedperfix.models.batched import forward_clients
from fedperfix.run import checkpoint
from fedperfix.run.cli import cli
from fedperfix.run.folder import CONFIG
from fedperfix.run.tensors import Format, TensorsError, read_tensors, write_tensors

MODEL, CLIENTS = "model.safetensors", "clients"
FORMAT = Format("fedperfix-serving")
_ABOUT = {"round": int, "config": dict, "shape": dict, "classes": list, "own": list}
# The options from which a model is built: no files, as its weights are there, and no seed, which may be a secret.
_BUILDING = {"fused", *(name for name, item in FIELDS.items() if item.metadata["group"] in ("Method", "Model"))}
_BUILDING -= {"pretrained", "pretrained_file"}


class ServingError(ValueError):
    """Files that cannot be served, or a request that cannot be answered; the message is one sentence."""


@cli
def main(argv: list[str]) -> int:
    """Run the command line.

    Args:
        argv: arguments without the program's name; None is the process's own.

    Returns:
        The exit code: 0, or 2 for wrong input (one sentence on stderr).
    """
    parser = Parser(
        prog="python -m fedperfix.serve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of a run")
    parser.add_argument("target", metavar="DIR", type=Path, help="a new folder")
    parser.add_argument("--clients", type=int, nargs="+", metavar="N", help="only these (default: all)")
    parser.add_argument("--data-dir", help="where the run's data are now, if they were moved")
    arguments = parser.parse_args(argv)
    moved = [] if arguments.data_dir is None else ["--data-dir", arguments.data_dir]
    if not (arguments.run / CONFIG).exists():
        raise ConfigError(f"RUN: got '{arguments.run}', takes the folder of a run")
    config = parse_args(["--resume", str(arguments.run), "--device", "cpu", *moved])
    count = export(config, arguments.run, arguments.target, arguments.clients)
    print(f"written      {arguments.target / MODEL}, and {count:,} clients in {arguments.target / CLIENTS}")
    return 0


def export(config: TrainConfig, run: Path, target: Path, clients: Sequence[int] | None = None) -> int:
    """Write the models of a run's clients, as of its checkpoint.

    Args:
        config: of the run, with `resume`.
        run: its folder; nothing in it changes.
        target: a new folder, which appears when it is complete.
        clients: which; None is all.

    Returns:
        How many clients were written.

    Raises:
        ConfigError, CheckpointError, DataError: `target` exists, no such client, the method's models cannot be
            served in one batch, or the run cannot be read.
        OSError: it cannot be written; nothing is left behind.
    """
    from fedperfix.train import build

    if target.exists():
        raise ConfigError(f"DIR: '{target}' exists; takes the name of a new folder")
    wrong = [index for index in clients or () if not 0 <= index < config.clients]
    if wrong:
        raise ConfigError(f"--clients: got {wrong[0]}, takes numbers from 0 to {config.clients - 1}")
    federation = build(config, torch.device("cpu"))
    worker, dataset = federation.worker, federation.dataset
    against = obstacle(worker)
    if against is not None:
        raise ConfigError(f"RUN: '{run}' cannot be served, as {against}")
    round, shared = checkpoint.read_global(run)
    views = worker.arena.shared_layout.views(worker.arena.shared)
    for name, view in views.items():
        view.copy_(shared[name])
    own = worker.arena.local_layout.names
    state = {name: value for name, value in worker.model.state_dict().items() if name not in own}
    about = {
        "round": round,
        "config": _building(config),
        "shape": _shape(config, dataset),
        "classes": list(dataset.class_names),
        "own": list(own),
    }
    chosen = range(config.clients) if clients is None else sorted(set(clients))
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        (temporary / CLIENTS).mkdir()
        mark = write_tensors(FORMAT, temporary / MODEL, state, {"about": json.dumps(about, sort_keys=True)})
        for index in chosen:
            kept = checkpoint.read_client(run, index)
            mine = {name: kept[f"personal.{name}"] for name in own}
            write_tensors(
                FORMAT, temporary / CLIENTS / f"{index}.safetensors", mine, {"client": str(index), "model": mark}
            )
        temporary.chmod(0o755)
        temporary.rename(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return len(chosen)


class PersonalizedModel:
    """The models of many clients as one: what they share is in memory once, what is their own comes from disk.

    Args:
        folder: as `export` wrote it.
        device: where to compute.
        precision: as `--precision`.
        cached: own parameters of at most so many clients stay in memory; the longest unused go first.

    Attributes:
        classes: names of the classes, in the order of the outputs.
        round: after which round of training.

    Raises:
        ServingError: the folder's files cannot be used.
    """

    def __init__(self, folder: Path, device: torch.device, precision: str, cached: int) -> None:
        state, metadata = _read(folder / MODEL)
        about = _about(metadata, folder / MODEL)
        self.folder = folder
        self.device = device
        self.cached = cached
        self.classes: tuple[str, ...] = tuple(about["classes"])
        self.round: int = about["round"]
        self._shape: dict[str, Any] = about["shape"]
        self._dtype = autocast_dtype(precision, device)
        self._own: tuple[str, ...] = tuple(about["own"])
        self._mark = metadata["checksum"]
        self._kept: OrderedDict[int, dict[str, Tensor]] = OrderedDict()
        self._model = _build(about, state).to(device).eval()
        self._own_shapes = {name: self._model.state_dict()[name].shape for name in self._own}
        self._preprocess = Preprocess(self._shape.get("image_size"))

    @property
    def clients(self) -> tuple[int, ...]:
        """The clients that can be asked for."""
        stems = [path.stem for path in (self.folder / CLIENTS).glob("*.safetensors")]
        return tuple(sorted(int(stem) for stem in stems if re.fullmatch("[0-9]+", stem)))

    @torch.no_grad()
    def __call__(self, inputs: Tensor, clients: Iterable[int] | Tensor) -> Tensor:
        """What each client's model says about its images.

        Args:
            inputs: uint8 images [B, channels, height, width], which are resized and normalised as in training; or
                token ids [B, tokens].
            clients: whose image each of them is, [B], in any order.

        Returns:
            Float32 [B, classes] on the model's device.

        Raises:
            ServingError: inputs of another shape or type, as many clients as there are not inputs, an unknown
                client, or a client's file that is damaged or belongs to another model.
        """
        owners = _whole_numbers(clients)
        self._check(inputs)
        if len(inputs) != len(owners):
            raise ServingError(f"clients: got {len(owners)} of them for {len(inputs)} inputs, takes one for each")
        if not owners:
            return torch.empty(0, len(self.classes), device=self.device)
        inputs = inputs.to(self.device, torch.int64 if "num_tokens" in self._shape else torch.uint8)
        return forward_clients(self._model, self._rows, self._preprocess(inputs), owners, self._dtype)

    def _check(self, inputs: Tensor) -> None:
        if "num_tokens" in self._shape:
            self._check_texts(inputs)
            return
        if not isinstance(inputs, Tensor) or inputs.dtype != torch.uint8:
            raise ServingError(f"inputs: got {_type(inputs)}, takes a tensor of uint8 pixels")
        channels = self._shape["channels"]
        if inputs.dim() != 4 or inputs.shape[1] != channels or 0 in inputs.shape[2:]:
            raise ServingError(f"inputs: got shape {list(inputs.shape)}, takes [B, {channels}, height, width]")

    def _check_texts(self, inputs: Tensor) -> None:
        if not isinstance(inputs, Tensor) or inputs.dtype.is_floating_point or inputs.dtype == torch.bool:
            raise ServingError(f"inputs: got {_type(inputs)}, takes a tensor of token ids, which are whole numbers")
        length, most = self._shape["length"], self._shape["num_tokens"] - 1
        if inputs.dim() != 2 or not 0 < inputs.shape[1] <= length:
            raise ServingError(f"inputs: got shape {list(inputs.shape)}, takes [B, 1 to {length} tokens]")
        if inputs.numel() and not 0 <= int(inputs.min()) <= int(inputs.max()) <= most:
            got = f"{int(inputs.min())} to {int(inputs.max())}"
            raise ServingError(f"inputs: got token ids from {got}, takes 0 to {most}")

    def _rows(self, clients: list[int]) -> dict[str, Tensor]:
        for client in dict.fromkeys(clients):
            if client in self._kept:
                self._kept.move_to_end(client)
            else:
                self._kept[client] = self._load(client)
        rows = [self._kept[client] for client in clients]
        while len(self._kept) > self.cached:
            self._kept.popitem(last=False)
        return {name: torch.stack([row[name] for row in rows]) for name in self._own}

    def _load(self, client: int) -> dict[str, Tensor]:
        path = self.folder / CLIENTS / f"{client}.safetensors"
        if not path.exists():
            raise ServingError(f"clients: got {client}, which has no file in '{self.folder / CLIENTS}'")
        tensors, metadata = _read(path)
        if metadata.get("client") != str(client) or metadata.get("model") != self._mark:
            raise ServingError(f"'{path}' is of another client or model than '{self.folder / MODEL}'; export both")
        if {name: value.shape for name, value in tensors.items()} != self._own_shapes:
            raise ServingError(f"'{path}' does not fit the model in '{self.folder / MODEL}'; export both")
        return {name: value.to(self.device) for name, value in tensors.items()}


def _whole_numbers(clients: Iterable[int] | Tensor) -> list[int]:
    numbers = clients.tolist() if isinstance(clients, Tensor) else list(clients)
    try:
        return [operator.index(number) for number in numbers]
    except TypeError as error:
        raise ServingError(f"clients: got {clients!r:.80}, takes a whole number for each input") from error


def _type(value: object) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        return read_tensors(FORMAT, path)
    except FileNotFoundError as error:
        raise ServingError(f"there is no '{path}'; python -m fedperfix.serve RUN DIR writes it") from error
    except TensorsError as error:
        raise ServingError(f"{error}; export it again") from error


def _about(metadata: Mapping[str, str], path: Path) -> dict[str, Any]:
    """What a model's file says of itself: all that `export` writes, each of its type."""
    try:
        about = json.loads(metadata["about"])
        if {name: type(about[name]) for name in _ABOUT} == _ABOUT and all(
            type(text) is str for text in (*about["classes"], *about["own"])
        ):
            return about
    except (KeyError, TypeError, ValueError):
        pass
    raise ServingError(f"'{path}' does not say what model it is; export it again")


def load(
    folder: str | Path, *, device: str = "auto", precision: str = "auto", cached: int = 1024
) -> PersonalizedModel:
    """Load what `python -m fedperfix.serve` wrote.

    Args:
        folder: the one it wrote.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        precision: `auto`, `fp32`, `bf16` or `fp16`.
        cached: own parameters of at most so many clients stay in memory.

    Raises:
        ServingError: the folder's files cannot be used.
        ConfigError: no such device or precision, or a negative `cached`.
    """
    TrainConfig(device=device, precision=precision).validate()
    if cached < 0:
        raise ConfigError(f"cached: got {cached}, takes 0 or more clients")
    return PersonalizedModel(Path(folder), resolve_device(device), precision, cached)


def _building(config: TrainConfig) -> dict[str, Any]:
    """What of a run's configuration its model is built from, where it is not the default."""
    method = method_class(config.method)
    if config.method not in METHODS and method.adapt.__func__ is not Method.adapt.__func__:
        raise ConfigError(
            f"RUN: its method {method.name} changes the model by code of a user's file, which is not exported"
        )
    plain, own = asdict(TrainConfig()), asdict(config)
    settings = {name: own[name] for name in sorted(_BUILDING) if own[name] != plain[name]}
    return settings | {"method": config.method if config.method in METHODS else "fedavg"}


def _built_from(settings: Mapping[str, Any]) -> TrainConfig:
    unknown = sorted(settings.keys() - FIELDS.keys())
    if unknown:
        raise ConfigError(f"{unknown[0]}: is no option of this version")
    chosen = sorted(settings.keys() & _BUILDING)
    return TrainConfig(**{name: typed(KINDS[name], settings[name], name) for name in chosen})


def _shape(config: TrainConfig, dataset: Any) -> dict[str, Any]:
    if dataset.is_text:
        return {"num_tokens": dataset.num_tokens, "length": input_shape(config, dataset)[0]}
    channels, size, _ = input_shape(config, dataset)
    return {"channels": channels, "image_size": size}


def _build(about: Mapping[str, Any], state: Mapping[str, Tensor]) -> nn.Module:
    shape, classes = about["shape"], len(about["classes"])
    if about["config"].get("method") not in METHODS:  # a name of a file would be run
        raise ServingError("model: it names a method that is not of this package; export it again")
    try:
        config = _built_from(about["config"])
        if "num_tokens" in shape:
            model = create_text_model(config, **shape, num_classes=classes)
        else:
            hw = (shape["image_size"], shape["image_size"])
            model = create_model(config, channels=shape["channels"], num_classes=classes, image_hw=hw)
    except (TypeError, KeyError, ConfigError) as error:
        reason = " ".join(str(error).split())
        raise ServingError(
            f"model: this version of fedperfix cannot build it ({reason}); export it again"
        ) from error
    shapes = {name: value.shape for name, value in model.state_dict().items() if name not in about["own"]}
    if {name: value.shape for name, value in state.items()} != shapes:
        raise ServingError("model: its tensors do not fit what this version of fedperfix builds; export it again")
    model.load_state_dict(state, strict=False)
    return model


if __name__ == "__main__":
    sys.exit(main())
