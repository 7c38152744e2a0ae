"""A study: methods times seeds times settings, as the runs that it is made of.

It comes from a command line, or from a TOML file such as

    config = "paper"                 # a preset or a file to start from; optional
    methods = ["fedperfix", "fedavg"]
    seeds = [0, 1, 2]

    [base]                           # for every run; keys are those of `python -m fedperfix.train`
    rounds = 20

    [grid]                           # every combination
    lr = [1e-3, 3e-3]

    [method]                         # for one method; a list is swept, a value replaces what [grid] has
    scaffold = {optimizer = "sgd", lr = 0.05, seeds = [0]}
    concat = {method = "fedperfix", mode = "concat", gate = [0.5, 1.0]}

A name in `[method]` is what the row is called; it is also the method, unless a key `method` says which.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from fedperfix.config import ConfigError, TrainConfig, check_settings, parse_text, read_settings, suggestion
from fedperfix.methods import method_label
from fedperfix.methods.custom import absolute

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# In a study's folder: its title, its rows and the commands that made it.
STUDY = "study.json"
Settings = dict[str, Any]
# What a study says itself, once for all runs or by its rows and seeds.
RESERVED = ("method", "seed", "run_dir", "resume")


@dataclass(frozen=True)
class StudyRun:
    """One run of a study.

    Args:
        name: of its folder.
        row: what the row of a table is called: the method's name in the study.
        settings: what was swept, by option, beside row and seed.
        config: valid, without a folder.
    """

    name: str
    row: str
    settings: Mapping[str, Any]
    config: TrainConfig


@dataclass(frozen=True)
class Study:
    """What to run.

    Args:
        rows: names of the rows, in order.
        seeds: for every row that has none of its own.
        base: settings of every run.
        grid: values to sweep, by option.
        methods: settings of single rows; a list is swept, `seeds` and `method` are the row's own.
        override: settings that win over all others; the command line's.
        title: a line for people, or None.
    """

    rows: tuple[str, ...]
    seeds: tuple[int, ...] = (0,)
    base: Settings = field(default_factory=dict)
    grid: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    methods: Mapping[str, Settings] = field(default_factory=dict)
    override: Settings = field(default_factory=dict)
    title: str | None = None

    def runs(self) -> list[StudyRun]:
        """Every run, validated, seeds outermost so that a study that is stopped has whole seeds.

        Raises:
            ConfigError: a wrong setting; the sentence names the run. Or two runs of the same name.
        """
        plans = [(seed, row) for seed in self._all_seeds() for row in self.rows if seed in self._seeds(row)]
        runs = [self._run(row, seed, point) for seed, row in plans for point in self._points(row)]
        names = [run.name for run in runs]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice:
            raise ConfigError(f"--set: two runs are called '{twice}'; leave out what is there twice")
        if not runs:
            raise ConfigError("--methods: the study has no run; give a method and a seed")
        return runs

    def _seeds(self, row: str) -> tuple[int, ...]:
        return tuple(self.methods.get(row, {}).get("seeds", self.seeds))

    def _all_seeds(self) -> list[int]:
        return list(dict.fromkeys(seed for row in self.rows for seed in self._seeds(row)))

    def _points(self, row: str) -> Iterable[Settings]:
        """The combinations of swept settings of a row."""
        own = {name: value for name, value in self.methods.get(row, {}).items() if name != "seeds"}
        swept = {name: values for name, values in self.grid.items() if name not in own}
        swept |= {name: value for name, value in own.items() if isinstance(value, (list, tuple))}
        return (dict(zip(swept, values, strict=True)) for values in itertools.product(*swept.values()))

    def _run(self, row: str, seed: int, point: Settings) -> StudyRun:
        own = {
            name: value
            for name, value in self.methods.get(row, {}).items()
            if name != "seeds" and not isinstance(value, (list, tuple))
        }
        label = method_label(row)  # of a method in the user's file its name, not the path
        name = "-".join(
            [_safe(label), *(f"{_short(key)}{_safe(value)}" for key, value in point.items()), f"seed{seed}"]
        )
        settings = merged(self.base, {"method": absolute(row)}, own, point, self.override, {"seed": seed})
        try:
            return StudyRun(name, label, point, TrainConfig(**settings).validate())
        except ConfigError as error:
            raise ConfigError(f"run {name}: {error}") from error


def merged(*layers: Settings) -> Settings:
    """Settings in which later layers win; epochs of a later layer also win over steps of an earlier one."""
    result: Settings = {}
    for layer in layers:
        if "local_epochs" in layer and "local_steps" not in layer:
            result.pop("local_steps", None)
        result |= layer
    return result


def read_study(path: Path) -> Study:
    """Read a study file.

    Raises:
        ConfigError: cannot be read, not TOML, an unknown key or a value of a wrong type.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise ConfigError(f"STUDY: cannot read '{path}' ({reason}), takes a TOML file") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not a TOML file: {error}") from error
    kinds = {
        "title": str,
        "config": str,
        "methods": list,
        "seeds": list,
        "base": dict,
        "grid": dict,
        "method": dict,
    }
    for key, value in content.items():
        if key not in kinds:
            raise ConfigError(f"{path}: unknown key '{key}'" + suggestion(key, kinds))
        if not isinstance(value, kinds[key]):
            raise ConfigError(f"{path}: {key}: got {value!r}, takes a {_TOML_WORDS[kinds[key]]}")
    methods = content.get("method", {})
    for row, settings in methods.items():
        if not isinstance(settings, dict):
            raise ConfigError(f"{path}: method.{row}: got {settings!r}, takes a table of settings")
    preset = read_settings(content["config"]) if "config" in content else {}
    listed = content.get("methods", [])
    _check_list(listed, str, f"{path}: methods", "names")
    return Study(
        rows=tuple(dict.fromkeys([*listed, *methods])),
        seeds=_seeds(content.get("seeds", [0]), f"{path}: seeds"),
        base=merged(preset, _checked(content.get("base", {}), f"{path}: base")),
        grid=_checked_lists(content.get("grid", {}), f"{path}: grid"),
        methods={row: _method_settings(settings, f"{path}: method.{row}") for row, settings in methods.items()},
        title=content.get("title"),
    )


def with_set(study: Study, texts: Sequence[str]) -> Study:
    """The study with the values of `--set [METHOD.]OPTION=VALUE,VALUE` swept as well.

    Raises:
        ConfigError: a text that is not of this form, an unknown method or option, a value of a wrong type.
    """
    grid, methods = dict(study.grid), {row: dict(settings) for row, settings in study.methods.items()}
    for text in texts:
        target, equals, values = text.partition("=")
        row, dot, option = target.rpartition(".")
        option = option.replace("-", "_")
        if not equals or not option:
            raise ConfigError(f"--set: got '{text}', takes [METHOD.]OPTION=VALUE,VALUE")
        if dot and row not in study.rows:
            raise ConfigError(
                f"--set: got '{text}', but the study has no method '{row}'" + suggestion(row, study.rows)
            )
        parsed = _parse_values(option, values)
        if dot:
            methods.setdefault(row, {})[option] = parsed
        else:
            grid[option] = parsed
    return replace(study, grid=grid, methods=methods)


def _parse_values(option: str, text: str) -> list[Any]:
    _known(option, "--set")
    if not text.startswith("["):
        return [parse_text(option, value.strip(), "--set") for value in text.split(",")]
    try:
        values = tomllib.loads(f"values = {text}")["values"]
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"--set: got '{option}={text}', takes values, or a list as in TOML") from error
    return _checked_lists({option: values}, "--set")[option]


def _method_settings(settings: Settings, where: str) -> Settings:
    """Settings of a row: `method` and `seeds` are its own, lists are swept."""
    settings = dict(settings)
    result: Settings = {}
    if "seeds" in settings:
        result["seeds"] = _seeds(settings.pop("seeds"), f"{where}: seeds")
    if "method" in settings:
        result |= check_settings({"method": settings.pop("method")}, where)
    lists = {name: value for name, value in settings.items() if isinstance(value, list)}
    single = {name: value for name, value in settings.items() if name not in lists}
    return result | _checked(single, where) | _checked_lists(lists, where)


def _checked(settings: Settings, where: str) -> Settings:
    for name in settings:
        _known(name, where)
    return check_settings(settings, where)


def _checked_lists(settings: Mapping[str, Any], where: str) -> dict[str, list[Any]]:
    result = {}
    for name, values in settings.items():
        _known(name, where)
        if not isinstance(values, list) or not values:
            raise ConfigError(f"{where}: {name}: got {values!r}, takes a list of values")
        result[name] = [check_settings({name: value}, where)[name] for value in values]
    return result


def _known(name: str, where: str) -> None:
    if name in RESERVED:
        raise ConfigError(f"{where}: {name}: the study's methods, seeds and --out say it; leave it out")
    options = [item.name for item in fields(TrainConfig)]
    if name not in options:
        raise ConfigError(f"{where}: unknown key '{name}'" + suggestion(name, options))


def _seeds(values: Any, where: str) -> tuple[int, ...]:
    _check_list(values, int, where, "whole numbers")
    return tuple(values)


def _check_list(values: Any, kind: type, where: str, words: str) -> None:
    if not isinstance(values, list) or any(type(value) is not kind for value in values):
        raise ConfigError(f"{where}: got {values!r}, takes a list of {words}")


def _safe(value: object) -> str:
    """A value as part of a folder's name."""
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return "".join(letter if letter.isalnum() or letter in "._+-" else "_" for letter in text)


def _short(option: str) -> str:
    return option.replace("_", "-")


_TOML_WORDS = {str: "text", list: "list", dict: "table"}


def read_record(path: Path) -> dict[str, Any]:
    """What a sweep has written of a study beside its runs: `title`, `commands`, and `runs` by folder.

    Raises:
        ConfigError: it is damaged.
    """
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        sound = (
            isinstance(known, dict)
            and isinstance(known.get("runs", {}), dict)
            and isinstance(known.get("commands", []), list)
            and all(isinstance(entry, dict) for entry in known.get("runs", {}).values())
        )
    except ValueError:
        sound = False
    if not sound:
        raise ConfigError(f"'{path}' is damaged; remove it, and the sweep's command writes it anew")
    return known
