"""What a report says of its runs' settings and software: what they have in common, and what a row has by itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from fedperfix.config import RESUMABLE, TrainConfig
from fedperfix.methods import method_label
from fedperfix.methods.custom import short_name
from fedperfix.report.runs import ReportedRun
from fedperfix.report.tables import Table

VERSIONS = ("fedperfix", "source", "python", "torch", "triton", "timm", "numpy")
_MAIN = (
    "dataset", "clients", "alpha", "model", "rounds", "sampled", "local_epochs", "batch_size", "lr", "optimizer",
)  # fmt: skip
_NOT_A_SETTING = ("method", "seed", "resume", *(name for name in RESUMABLE if name != "rounds"))
# Options that one method alone reads, by the beginning of their names.
_OWNERS = {
    "prox_": "fedprox", "scaffold_": "scaffold", "fedrep_": "fedrep", "finetune": "fedbabu", "lg_": "lg-fedavg",
    "apfl_": "apfl", "perfedavg_": "per-fedavg", "ditto_": "ditto", "pfedme_": "pfedme", "fedala_": "fedala",
    "prompt_": "prompts", "lora_": "lora", "fedtp_": "fedtp",
}  # fmt: skip
_WITH_ALPHA = ("dirichlet", "dirichlet-domains", "quantity")


def common_settings(rows: Mapping[str, Sequence[ReportedRun]]) -> dict[str, object]:
    """The value of every option that most rows have."""
    configs = [runs[0].config for runs in rows.values()]
    return {name: Counter(getattr(config, name) for config in configs).most_common(1)[0][0] for name in _options()}


def common_text(rows: Mapping[str, Sequence[ReportedRun]]) -> str:
    """The main options and those that are not the default, as most rows have them."""
    common, default = common_settings(rows), TrainConfig()
    partition = common["partition"]
    shown = [
        name
        for name, value in common.items()
        if value is not None
        and _owner(name) is None
        and (name in _MAIN or value != getattr(default, name))
        and (name != "alpha" or partition in _WITH_ALPHA)
    ]
    return ", ".join(f"{name} {_text(common[name])}" for name in shown)


def settings_table(rows: Mapping[str, Sequence[ReportedRun]]) -> Table | None:
    """The rows with settings of their own, each with these; None if there are none."""
    common, default = common_settings(rows), TrainConfig()
    lines = []
    for row, runs in rows.items():
        config = runs[0].config
        label = method_label(config.method)
        own = [] if row.split(",")[0] == label else [f"method {short_name(config.method)}"]
        for name in _options():
            value, owner = getattr(config, name), _owner(name)
            usual = common[name] if owner is None else getattr(default, name)
            if value != usual and owner in (None, label):
                own.append(f"{name} {_text(value)}")
        if own:
            lines.append((row, ", ".join(own)))
    return Table(("method", "settings of its own"), tuple(lines)) if lines else None


def software(rows: Mapping[str, Sequence[ReportedRun]]) -> list[str]:
    """The versions that computed the runs; of several, a line for each with the rows that it computed."""
    made: dict[str, list[str]] = {}
    for row, runs in rows.items():
        for run in runs:
            for entry in run.environments:
                text = ", ".join(f"{name} {entry[name]}" for name in VERSIONS if entry.get(name))
                made.setdefault(text, []).append(row)
    if len(made) == 1:
        return [f"Versions: {next(iter(made))}."]
    lines = [f"{text}: {', '.join(dict.fromkeys(names))}" for text, names in made.items()]
    return ["Versions differ, and with them the rounding of a run, which moves it as much as another seed:", *lines]


def _options() -> list[str]:
    return [name for name in vars(TrainConfig()) if name not in _NOT_A_SETTING]


def _owner(name: str) -> str | None:
    return next((method for beginning, method in _OWNERS.items() if name.startswith(beginning)), None)


def _text(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
