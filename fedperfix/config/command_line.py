"""Configurations from a command line, also one that continues a run."""

from __future__ import annotations

import argparse
import typing
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedperfix.config.options import (
    FIELDS,
    GROUPS,
    KINDS,
    RESUMABLE,
    WORDS,
    ConfigError,
    TrainConfig,
    option_name,
    suggestion,
)
from fedperfix.config.toml import from_toml, presets, read_settings, with_absolute_method

# What has no meaning while another option is `none`: who gives it believes to be protected, or attacked.
_NEEDS = {"dp_clip": "dp", "dp_noise": "dp", "dp_delta": "dp", "attackers": "attack", "attack_scale": "attack"}


def parse_args(argv: Sequence[str] | None = None) -> TrainConfig:
    """The configuration that a command line asks for.

    With `--resume DIR` it is the one in DIR/config.toml, in which the command line may change `RESUMABLE`
    only; `run_dir` is DIR unless `--run-dir` says otherwise.

    Args:
        argv: arguments without the program's name; None is the process's own.

    Returns:
        A valid configuration.

    Raises:
        ConfigError: a wrong, unknown or contradicting option, or a wrong file.
        SystemExit: after `--help`.
    """
    values, source = _read_command_line(argv)
    if "resume" in values:
        return _resumed(values, source).validate()
    settings = read_settings(source) if source is not None else {}
    if "local_epochs" in values:  # else steps of the file would silently win over epochs of the command line
        settings.pop("local_steps", None)
    config = TrainConfig(**(settings | values)).validate()
    for name, switch in _NEEDS.items():
        if name in values and getattr(config, switch) == "none":
            option, needed = option_name(name), option_name(switch)
            raise ConfigError(
                f"{option}: got {values[name]:g}, but {needed} is none; give {needed} too, or leave this out"
            )
    return config


def given(argv: Sequence[str] | None = None) -> frozenset[str]:
    """Names of the fields that a command line sets itself (not through `--config`).

    Raises:
        ConfigError: as `parse_args`, for the command line alone.
    """
    return frozenset(_read_command_line(argv)[0])


def command_line_settings(argv: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a command line sets: through `--config`, and itself.

    Raises:
        ConfigError: a wrong or unknown option, or a wrong file.
    """
    values, source = _read_command_line(argv)
    return (read_settings(source) if source is not None else {}), values


def parse_text(name: str, text: str, where: str) -> Any:
    """The value of a field as a command line gives it: a number, a text, true or false.

    Raises:
        ConfigError: not of the field's type.
    """
    kind = KINDS[name].base
    try:
        return {"true": True, "false": False}[text] if kind is bool else kind(text)
    except (KeyError, ValueError):
        raise ConfigError(f"{where}: {name}: got '{text}', takes {WORDS[kind]}") from None


def _resumed(values: dict[str, Any], source: str | None) -> TrainConfig:
    folder = values["resume"]
    if source is not None:
        raise ConfigError(f"--config: a resumed run takes its configuration from '{folder}'; leave --config out")
    path = Path(folder) / "config.toml"
    try:
        saved = from_toml(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"--resume: got '{folder}', takes the folder of a run, with a readable config.toml in it"
        ) from error
    for name, value in values.items():
        if name not in (*RESUMABLE, "resume") and value != getattr(saved, name):
            allowed = ", ".join(map(option_name, RESUMABLE))
            raise ConfigError(
                f"{option_name(name)}: got {value}, but the run in '{folder}' has {getattr(saved, name)}; "
                f"a resumed run takes new values of {allowed} only"
            )
    return replace(saved, **({"run_dir": folder} | values))


class Parser(argparse.ArgumentParser):
    """A parser whose errors are `ConfigError`."""

    def error(self, message: str) -> typing.NoReturn:
        raise ConfigError(message.removeprefix("argument "))


def _read_command_line(argv: Sequence[str] | None) -> tuple[dict[str, Any], str | None]:
    """The fields that the command line sets, and its `--config`."""
    parser = _build_parser()
    namespace, unknown = parser.parse_known_args(argv)
    if unknown:
        options = [option for action in parser._actions for option in action.option_strings]
        raise ConfigError(f"{unknown[0]}: unknown option" + suggestion(unknown[0].split("=")[0], options))
    values = vars(namespace)
    source = values.pop("config", None)
    if "local_epochs" in values and "local_steps" in values:
        raise ConfigError("--local-steps: takes the place of --local-epochs; give one of the two")
    return with_absolute_method(values), source


def _build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m fedperfix.train",
        usage="%(prog)s [--config FILE] [options]",
        description="Personalised federated learning of Vision Transformers. Without options it trains FedPerfix "
        "on images that are part of the package.",
        epilog="Accuracies, curves, the resolved configuration and a checkpoint go to the folder of the run.",
        argument_default=argparse.SUPPRESS,  # so that what the command line leaves out is absent, not a default
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        help=f"TOML file or preset ({', '.join(presets())}); other options win over it",
    )
    for title in GROUPS:
        group = parser.add_argument_group(title)
        for name, item in FIELDS.items():
            if item.metadata["group"] == title:
                _add_option(group, name)
    return parser


def _add_option(group: argparse._ArgumentGroup, name: str) -> None:
    rules, kind, default = FIELDS[name].metadata, KINDS[name], FIELDS[name].default
    if kind.base is bool:
        action = group.add_argument(option_name(name), action=argparse.BooleanOptionalAction)
        shown = "yes" if default else "no"
    else:
        choices = rules["choices"]
        metavar = "{" + ",".join(choices()) + "}" if choices else {int: "N", float: "X", str: "NAME"}[kind.base]
        if name.endswith("_dir") or name == "resume":
            metavar = "DIR"
        elif name.endswith("_file"):
            metavar = "FILE"
        action = group.add_argument(option_name(name), metavar=metavar, type=_reader(kind.base))
        shown = str(default)
    text = rules["help"] if default is None else f"{rules['help']} (default: {shown})"
    action.help = text.replace("%", "%%")


def _reader(base: type) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        try:
            return base(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"got '{text}', takes {WORDS[base]}") from None

    return read
