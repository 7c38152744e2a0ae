"""The run's configuration as Flower carries it: one flat table of scalars, the same names as `TrainConfig`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

from fedperfix.config import ConfigError, TrainConfig
from fedperfix.config.options import KINDS
from fedperfix.methods import Method, method_class

# Options about one process that plays all clients. They keep their defaults.
_NOT_HERE = (
    "run_dir", "resume", "tensorboard", "reduction", "process_timeout", "personal_table", "clients_per_step",
    "parallel_clients", "evaluation", "eval_clients", "checkpoint_every",
)  # fmt: skip
_PREFIX = "flower_"


@dataclass(frozen=True)
class FlowerSettings:
    """What a deployment needs besides the training's configuration.

    Args:
        flower_server_dir: the server's folder: its state and the metrics. A run goes on with what is in it.
        flower_state_dir: where a node keeps its client's states, if the node's own configuration does not say.
        flower_wait: seconds to wait for all nodes before the first round goes on without those that are missing.
        flower_timeout: seconds to wait for the answers of a round.
        flower_patience: seconds after which an order without an answer is sent again.
    """

    flower_server_dir: str = "flower-run"
    flower_state_dir: str = "flower-nodes"
    flower_wait: float = 120.0
    flower_timeout: float = 3600.0
    flower_patience: float = 900.0

    def validate(self) -> FlowerSettings:
        """These settings.

        Raises:
            ConfigError: a folder without a name, or a time that is no number of seconds.
        """
        for name in ("flower_server_dir", "flower_state_dir"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value:
                raise ConfigError(f"{name}: got {value!r}, takes the name of a folder")
        for name in ("flower_wait", "flower_timeout", "flower_patience"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
                raise ConfigError(f"{name}: got {value!r}, takes a number of seconds above 0")
        return self


def to_run_config(config: TrainConfig, settings: FlowerSettings) -> dict[str, bool | int | float | str]:
    """The table for the app; an option that is not set is an empty text."""
    table = {item.name: getattr(config, item.name) for item in fields(config) if item.name not in _NOT_HERE}
    table |= {item.name: getattr(settings, item.name) for item in fields(settings)}
    return {name: "" if value is None else value for name, value in table.items()}


def from_run_config(table: Mapping[str, bool | int | float | str]) -> tuple[TrainConfig, FlowerSettings]:
    """The configuration of a run, checked.

    Raises:
        ConfigError: an unknown key, a wrong value, or a method whose state does not allow it.
    """
    names = {item.name for item in fields(FlowerSettings)}
    own = {name: value for name, value in table.items() if name in names}
    rest = {name: value for name, value in table.items() if name not in names}
    unknown = sorted(rest.keys() - KINDS.keys() | rest.keys() & set(_NOT_HERE))
    if unknown:
        raise ConfigError(f"{unknown[0]}: is no option of a run with Flower; remove it from pyproject.toml")
    values = {name: _value(name, value) for name, value in rest.items()}
    config = TrainConfig(**values).validate()
    check(config)
    return config, FlowerSettings(**own).validate()


def check(config: TrainConfig) -> None:
    """Refuse what one server and nodes that keep their own state cannot do.

    Raises:
        ConfigError: with the option's name.
    """
    method = method_class(config.method)
    if method.download is not Method.download:
        raise ConfigError(
            f"--method: got {method.name}, takes another with Flower: its clients need the server's own state"
        )
    if config.protocol != "final":
        raise ConfigError(f"--protocol: got {config.protocol}, takes final with Flower")


def refuse_local_options(words: Sequence[str]) -> None:
    """Refuse options of the command line that have no meaning with Flower.

    Raises:
        ConfigError: with the option's name.
    """
    for word in words:
        name = word.split("=")[0]
        if name.removeprefix("--").removeprefix("no-").replace("-", "_") in _NOT_HERE and name.startswith("--"):
            raise ConfigError(f"{name}: is no option of a run with Flower; leave it out")


def _value(name: str, value: bool | int | float | str) -> bool | int | float | str | None:
    kind = KINDS[name]
    if kind.optional and value == "":
        return None
    return float(value) if kind.base is float and type(value) is int else value
