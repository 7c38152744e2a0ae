"""`python -m fedperfix.sweep`: a study's runs, each a process of its own, several side by side, resumable."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from fedperfix.config import (
    RESUMABLE,
    ConfigError,
    Parser,
    TrainConfig,
    command_line_settings,
    from_toml,
    option_name,
    suggestion,
    to_toml,
)
from fedperfix.methods import method_label
from fedperfix.run import folder, metrics
from fedperfix.run.checkpoint import config_digest
from fedperfix.run.cli import cli
from fedperfix.run.files import write_text
from fedperfix.run.interrupt import Interrupted, interruptible
from fedperfix.run.progress import clock, print_plain
from fedperfix.study import RESERVED, STUDY, Settings, Study, StudyRun, merged, read_record, read_study, with_set

LOGS = "logs"
SOME_FAILED, OUT_OF_TIME, INTERRUPTED = 1, 124, 130
_DEFAULT_METHODS = ["fedperfix", "fedavg", "local"]
_CHANGEABLE = tuple(name for name in RESUMABLE if name != "run_dir")
_POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Place:
    """A run, its folder, and how many of its rounds that has."""

    run: StudyRun
    folder: Path
    rounds: int | None

    @property
    def state(self) -> str:
        """`new`, `unfinished` or `finished`."""
        if self.rounds is None:
            return "new"
        return "finished" if self.rounds >= self.run.config.rounds else "unfinished"


# What starts a run: the words of a command line.
Command = Callable[[Place, Path], list[str]]


@cli
def main(argv: list[str]) -> int:
    """Run the command line.

    Args:
        argv: arguments without the program's name; None is the process's own.

    Returns:
        The exit code: 0 when every run is finished, 1 when some failed, 2 for wrong input (one sentence on stderr),
        124 at the end of `--time-limit`, 130 when it was interrupted.
    """
    study, arguments = read_command(argv)
    command = shlex.join(["python", "-m", "fedperfix.sweep", *argv])
    return sweep(
        study,
        arguments.out,
        Console(),
        command=command,
        jobs=arguments.jobs,
        time_limit=arguments.time_limit,
        dry_run=arguments.dry_run,
    )


def sweep(
    study: Study,
    out: Path,
    console: Console,
    *,
    command: str,
    jobs: int = 1,
    time_limit: float | None = None,
    dry_run: bool = False,
    start: Command | None = None,
) -> int:
    """Play every run of a study that `out` does not have yet, and go on with those it has in part.

    Args:
        study: what to run.
        out: folder of the runs' folders, their logs and the list of them.
        console: where a line per finished run goes.
        command: what to record as the command that made the study.
        jobs: runs at the same time.
        time_limit: seconds after which the runs are stopped, saved; None is no limit.
        dry_run: list the runs only.
        start: what starts a run; None is `python -m fedperfix.train`.

    Returns:
        The exit code, as in `main`.

    Raises:
        ConfigError: a wrong setting, or a folder in `out` that has a run with other options; nothing was started.
    """
    places = [place(run, out) for run in study.runs()]
    if dry_run:
        for item in places:
            print_plain(console, f"{item.state:<10} {item.folder}  {_describe(item.run)}")
        return 0
    out.mkdir(parents=True, exist_ok=True)
    record(out, study, places, command)
    (out / LOGS).mkdir(exist_ok=True)
    queue = _Queue(places, console, jobs, start or train_command)
    with interruptible() as poll:
        code = queue.play(poll, time_limit)
    if code in (OUT_OF_TIME, INTERRUPTED):
        why = "out of time" if code == OUT_OF_TIME else "interrupted"
        print_plain(console, f"{why}; the runs are saved. The same command goes on.")
    print_plain(console, f"report       python -m fedperfix.report {out}")
    return code


def place(run: StudyRun, out: Path) -> Place:
    """Where a run is, and how far.

    Raises:
        ConfigError: its folder has a run with other options, or no run but something else.
    """
    where = out / run.name
    file = where / folder.CONFIG
    if not where.exists() or (where.is_dir() and not any(where.iterdir())):
        return Place(run, where, None)
    if not file.exists():
        raise ConfigError(
            f"--out: '{where}' has something that is not a run; take another folder, or remove that one"
        )
    saved = from_toml(file.read_text(encoding="utf-8"), str(file))
    if config_digest(saved) != config_digest(run.config):
        raise ConfigError(
            f"--out: '{where}' has a run with other options ({_difference(saved, run.config)}); "
            "take another folder, or remove that one"
        )
    return Place(run, where, len(metrics.read(where)))


def record(out: Path, study: Study, places: Sequence[Place], command: str) -> None:
    """Write the list of runs that the report reads: what each folder is called in tables, and what made it."""
    path = out / STUDY
    known = {"runs": {}, "commands": []} | (read_record(path) if path.exists() else {})
    for item in places:
        known["runs"][item.folder.name] = {
            "row": item.run.row,
            "settings": dict(item.run.settings),
            "seed": item.run.config.seed,
            "rounds": item.run.config.rounds,
        }
    known["title"] = study.title or known.get("title")
    known["commands"] = list(dict.fromkeys([*known["commands"], command]))
    write_text(path, json.dumps(known, indent=2) + "\n")


def train_command(item: Place, config_file: Path) -> list[str]:
    """The command that starts or goes on with a run; `config_file` gets a new run's configuration."""
    words = [sys.executable, "-m", "fedperfix.train"]
    if item.state == "new":
        write_text(config_file, to_toml(item.run.config))
        return [*words, "--config", str(config_file), "--run-dir", str(item.folder)]
    words += ["--resume", str(item.folder)]
    for name in _CHANGEABLE:
        value = getattr(item.run.config, name)
        if isinstance(value, bool):
            words.append(option_name(name) if value else option_name(f"no_{name}"))
        elif value is not None:
            words += [option_name(name), str(value)]
    return words


class _Queue:
    """The runs of a study, on their way through a fixed number of processes."""

    def __init__(self, places: Sequence[Place], console: Console, jobs: int, start: Command) -> None:
        self._waiting = [item for item in places if item.state != "finished"]
        self._running: dict[subprocess.Popen[bytes], tuple[Place, float]] = {}
        self._console = console
        self._jobs = jobs
        self._start_command = start
        self._total = len(places)
        self._done = self._failed = 0
        self._environment = {"OMP_NUM_THREADS": str(max(1, _cores() // jobs)), **os.environ}
        for item in places:
            if item.state == "finished":
                self._say(item, "was finished before")

    def play(self, poll: Callable[[], None], time_limit: float | None) -> int:
        """Start, watch and report until all are done, the time is over, or `poll` raises `Interrupted`."""
        end = time.monotonic() + time_limit if time_limit is not None else float("inf")
        code = 0
        try:
            while self._waiting or self._running:
                while self._waiting and len(self._running) < self._jobs:
                    self._start(self._waiting.pop(0))
                time.sleep(_POLL_SECONDS)
                self._collect()
                poll()
                if time.monotonic() > end and (self._waiting or self._running):
                    code = OUT_OF_TIME
                    break
        except Interrupted:
            code = INTERRUPTED
        finally:
            self._stop()
        return code or (SOME_FAILED if self._failed else 0)

    def _start(self, item: Place) -> None:
        logs = item.folder.parent / LOGS
        words = self._start_command(item, logs / f"{item.run.name}.toml")
        with open(logs / f"{item.run.name}.log", "ab") as log:
            # A session of its own, so that Ctrl-C reaches it once, from here, and not from the terminal as well.
            process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment,
                start_new_session=True,
            )
        self._running[process] = (item, time.monotonic())

    def _collect(self, stopping: bool = False) -> None:
        for process in [process for process in self._running if process.poll() is not None]:
            item, since = self._running.pop(process)
            if process.returncode == 0:
                self._say(item, f"finished after {clock(time.monotonic() - since)}")
            elif stopping:
                print_plain(self._console, f"stopped      {item.run.name}")
            else:
                self._fail(item, process.returncode)

    def _fail(self, item: Place, code: int) -> None:
        self._done += 1
        self._failed += 1
        log = item.folder.parent / LOGS / f"{item.run.name}.log"
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        why = lines[-1].removeprefix("fedperfix: error: ") if lines else "it said nothing"
        print_plain(self._console, f"{self._count()} {item.run.name}  FAILED (exit code {code}): {why}; see {log}")

    def _say(self, item: Place, what: str) -> None:
        self._done += 1
        print_plain(self._console, f"{self._count()} {item.run.name}  {what}{_accuracy(item.folder)}")

    def _count(self) -> str:
        width = len(str(self._total))
        return f"[{self._done:>{width}}/{self._total}]"

    def _stop(self) -> None:
        """End what still runs, saved; when that is interrupted too, at once."""
        for process in self._running:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGINT)
        try:
            while self._running:
                self._collect(stopping=True)
                time.sleep(_POLL_SECONDS if self._running else 0)
        finally:
            for process in self._running:
                process.kill()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _accuracy(where: Path) -> str:
    found = metrics.headline_rounds(metrics.read(where))
    return f", {found[0].headline_mean:.2f} % over all clients in round {found[0].round}" if found else ""


def _describe(run: StudyRun) -> str:
    swept = "".join(f", {name} {value}" for name, value in run.settings.items())
    return f"{method_label(run.config.method)}, seed {run.config.seed}{swept}, {run.config.rounds} rounds"


def _difference(saved: TrainConfig, asked: TrainConfig) -> str:
    name = next(
        name for name, value in vars(saved).items() if value != getattr(asked, name) and name not in _CHANGEABLE
    )
    return f"{option_name(name)} is {getattr(saved, name)} there, {getattr(asked, name)} here"


def read_command(
    argv: Sequence[str], prog: str = "fedperfix.sweep", methods: Mapping[str, Settings] | None = None
) -> tuple[Study, argparse.Namespace]:
    """The study that a command line asks for, and its own options.

    Args:
        argv: arguments without the program's name.
        prog: the program's name, for its help and its default folder.
        methods: rows and their settings where neither the file nor an option names any.

    Raises:
        ConfigError: a wrong option or file.
        SystemExit: after `--help`.
    """
    # argparse would take the value of an option that it does not know for the study
    file, rest = (Path(argv[0]), argv[1:]) if argv and not argv[0].startswith("-") else (None, argv)
    arguments, train_options = _parser(prog).parse_known_args(list(rest))
    preset, override = command_line_settings(train_options)
    own = set(override) & set(RESERVED)
    if own:
        raise ConfigError(f"{option_name(min(own))}: --methods, --seeds and --out say it; leave it out")
    study = read_study(file) if file else Study(rows=())
    if not study.rows:
        if file and not methods and not arguments.methods:
            raise ConfigError(
                f"{file}: names no methods; give --methods, or take python -m fedperfix.sensitivity for layers"
            )
        methods = methods or {name: {} for name in _DEFAULT_METHODS}
        study = replace(study, rows=tuple(methods), methods=methods)
    study = _choose(study, arguments)
    study = replace(study, base=merged(study.base, preset), override=override)
    if arguments.out is None:
        arguments.out = folder.RUNS / (file.stem if file else prog.rpartition(".")[2])
    return with_set(study, arguments.set), arguments


def _choose(study: Study, arguments: argparse.Namespace) -> Study:
    """The study with the rows and seeds of the command line in place of its own."""
    if arguments.methods:
        from fedperfix.methods import METHODS
        from fedperfix.methods.custom import is_custom

        known = [*study.rows, *METHODS]
        for name in arguments.methods:
            if name not in known and not is_custom(name):
                raise ConfigError(
                    f"--methods: got '{name}', takes {', '.join(dict.fromkeys(known))}" + suggestion(name, known)
                )
        study = replace(study, rows=tuple(dict.fromkeys(arguments.methods)))
    if arguments.seeds:
        methods = {row: {k: v for k, v in own.items() if k != "seeds"} for row, own in study.methods.items()}
        study = replace(study, seeds=tuple(dict.fromkeys(arguments.seeds)), methods=methods)
    return study


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = Parser(
        prog=f"python -m {prog}",
        usage="%(prog)s [STUDY.toml] [options]",
        description="Run methods times seeds times settings, as a file (docs/studies.md) or the options say. Runs "
        "that --out has already are not repeated, unfinished ones go on, a failed one does not stop the others. "
        "Ctrl-C saves all.",
        epilog="All other options are those of python -m fedperfix.train, for every run; they win over the file.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--methods", nargs="+", metavar="NAME", help="rows of the study (default: the file's, or a few)")
    add("--seeds", nargs="+", type=_whole(0), metavar="N", help="seeds of every method (default: 0)")
    add("--set", action="append", default=[], metavar="[METHOD.]OPTION=VALUE,VALUE", help="sweep an option")
    add(
        "--jobs",
        type=_whole(1),
        default=1,
        metavar="N",
        help="runs at the same time; they divide the cores (default: 1)",
    )
    add("--out", type=Path, metavar="DIR", help="folder of the runs (default: runs/ and the study's name)")
    add(
        "--time-limit",
        type=_seconds,
        metavar="SECONDS",
        help="stop and save after this time; the same command goes on",
    )
    add("--dry-run", action="store_true", help="list the runs and do nothing")
    return parser


def _whole(least: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"got '{text}', takes a whole number of at least {least}")
        return int(text)

    return read


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"got '{text}', takes a number of seconds above 0")
    return seconds


if __name__ == "__main__":
    sys.exit(main())
