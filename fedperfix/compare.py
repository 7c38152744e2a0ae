"""`python -m fedperfix.compare`: methods times seeds, one run after the other, and their table in Markdown."""

from __future__ import annotations

import fedperfix.run.threads  # noqa: F401  # isort: skip  (before torch)

import argparse
import shlex
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import NoReturn

from rich.console import Console

from fedperfix.config import ConfigError, TrainConfig, from_toml, given, parse_args, to_toml
from fedperfix.methods import METHODS
from fedperfix.run import folder, metrics
from fedperfix.run.files import write_text
from fedperfix.run.metrics import RoundMetrics
from fedperfix.run.progress import print_plain
from fedperfix.train import USER_ERRORS, sentence, train

TABLE = "README.md"
_OWN_OPTIONS = ("method", "seed", "run_dir", "resume")


@dataclass(frozen=True)
class Finished:
    """A finished run: its configuration, what computed it, and its metrics."""

    config: TrainConfig
    device: str
    torch: str
    rounds: list[RoundMetrics]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments without the program's name; None is the process's own.

    Returns:
        The exit code: 0, 2 for wrong input (one sentence on stderr), 130 when it was interrupted.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        return _compare(argv, Console())
    except USER_ERRORS as error:
        print(f"fedperfix: error: {sentence(error)}", file=sys.stderr)
        return 2


def _compare(argv: list[str], console: Console) -> int:
    arguments, train_options = _parser().parse_known_args(argv)
    own = given(train_options) & set(_OWN_OPTIONS)
    if own:
        raise ConfigError(f"--{min(own).replace('_', '-')}: --methods, --seeds and --out say it; leave it out")
    base = parse_args(train_options)
    configs = [
        replace(base, method=method, seed=seed, run_dir=str(arguments.out / f"{method}-seed{seed}")).validate()
        for method in arguments.methods
        for seed in arguments.seeds
    ]
    for config in configs:
        code = _run(config, console)
        if code:
            return code
    finished = [read_run(Path(config.run_dir)) for config in configs]
    command = shlex.join(["python", "-m", "fedperfix.compare", *argv])
    write_text(arguments.out / TABLE, table(finished, command))
    print_plain(console, f"table        {arguments.out / TABLE}")
    return 0


def _run(config: TrainConfig, console: Console) -> int:
    """One run, unless its folder has it already, whole or in part."""
    where = Path(config.run_dir)
    if not (where / folder.CONFIG).exists():
        return train(config, console)
    saved = from_toml((where / folder.CONFIG).read_text(encoding="utf-8"), str(where / folder.CONFIG))
    if to_toml(saved) != to_toml(config):
        raise ConfigError(f"--out: '{where}' has a run with other options; take another folder, or remove that one")
    if len(metrics.read(where)) == config.rounds:
        print_plain(console, f"finished     {where}")
        return 0
    return train(replace(config, resume=str(where)), console)


def read_run(where: Path) -> Finished:
    """Read a finished run from its folder."""
    config = from_toml((where / folder.CONFIG).read_text(encoding="utf-8"), str(where / folder.CONFIG))
    facts = folder.read_environment(where)[-1]
    return Finished(config, facts["device"], facts["torch"], metrics.read(where))


def table(runs: Sequence[Finished], command: str) -> str:
    """The runs as a Markdown page: a row per method, means over seeds, and how it was made.

    Args:
        runs: of the same options except for method and seed.
        command: that made them.

    Returns:
        The page. Accuracies are percent, means over all clients with the last global parameters and their own; ± is
        the sample standard deviation over seeds.
    """
    config = runs[0].config
    methods = list(dict.fromkeys(run.config.method for run in runs))
    seeds = list(dict.fromkeys(run.config.seed for run in runs))
    lines = [
        f"# {', '.join(methods)} on {config.dataset}",
        "",
        f"Test accuracy (%) over all {config.clients} clients after the last of {config.rounds} rounds, with the "
        "global parameters and each client's own: mean over clients, then mean ± standard deviation over the seeds "
        f"{', '.join(map(str, seeds))}. Std and worst 10 % are over clients, averaged over seeds; `local` is after "
        "local training, over the clients sampled in the last round.",
        "",
        "| method | local | global + personal | each seed | std | worst 10 % | sent per round | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [_row(method, [run for run in runs if run.config.method == method]) for method in methods]
    lines += [
        "",
        f"Made on {date.today().isoformat()} with PyTorch {runs[0].torch} on {runs[0].device}: {config.model}, "
        f"{config.clients} clients, {config.sampled} sampled, Dirichlet {config.alpha:g}, {config.rounds} rounds. "
        "Seconds are of a whole run, sent per round is up and down together.",
        "",
        "```",
        command,
        "```",
    ]
    return "\n".join(lines) + "\n"


def _row(method: str, runs: Sequence[Finished]) -> str:
    last = [run.rounds[-1] for run in runs]
    seconds = [sum(_seconds(record) for record in run.rounds) for run in runs]
    sent = statistics.mean(record.bytes_up + record.bytes_down for record in last) / 1e6
    cells = [
        method,
        _mean_std([record.local_mean for record in last]),
        f"**{_mean_std([record.all_mean for record in last])}**",
        " / ".join(f"{record.all_mean:.1f}" for record in last),
        f"{statistics.mean(record.all_std for record in last):.1f}",
        f"{statistics.mean(record.all_worst for record in last):.1f}",
        f"{sent:.1f} MB",
        f"{statistics.mean(seconds):.0f}",
    ]
    return "| " + " | ".join(cells) + " |"


def _mean_std(values: Sequence[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


def _seconds(record: RoundMetrics) -> float:
    return record.seconds_train + record.seconds_aggregate + record.seconds_evaluate + record.seconds_other


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message.removeprefix("argument "))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m fedperfix.compare",
        description="Run methods times seeds, one after the other, and write their table. Runs that --out has "
        "already are not repeated; unfinished ones go on.",
        epilog="All other options are those of python -m fedperfix.train, for every run.",
        allow_abbrev=False,
    )
    names = tuple(METHODS)
    parser.add_argument(
        "--methods", nargs="+", choices=names, default=["fedperfix", "fedavg", "local"], metavar="NAME"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/compare"), metavar="DIR", help="folder of runs and table"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
