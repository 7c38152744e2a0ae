"""The folder of a run: made when everything else is known to be right, never overwritten."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import platform
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import fedperfix
import fedperfix_kernels
from fedperfix import __version__
from fedperfix.config import ConfigError, TrainConfig, to_toml
from fedperfix.engine.client import Worker
from fedperfix.engine.device import device_name
from fedperfix.methods import method_label
from fedperfix.run.files import write_text
from fedperfix.run.lock import locked
from fedperfix_kernels import explain

CONFIG = "config.toml"
ENVIRONMENT = "environment.json"
RUNS = Path("runs")


def choose_folder(config: TrainConfig) -> Path:
    """Where a new run goes: `--run-dir`, else runs/<dataset>-<method>-seed<seed> with the next free number.

    Raises:
        ConfigError: `--run-dir` is a file, or a folder with something in it.
    """
    if config.run_dir is None:
        name = re.sub(r"[^\w.-]+", "-", f"{config.dataset}-{method_label(config.method)}-seed{config.seed}")
        names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
        return next(RUNS / name for name in names if not (RUNS / name).exists())
    folder = Path(config.run_dir)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--run-dir: '{folder}' is a file; takes a folder that is new or empty")
    if folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(
            f"--run-dir: '{folder}' is not empty; takes a folder that is new or empty, "
            f"or use --resume {folder} to continue the run in it"
        )
    return folder


@contextmanager
def created(folder: Path, held: ExitStack) -> Iterator[None]:
    """Make a run's folder; if the block fails, it and the parents that were made for it are gone again.

    Args:
        folder: as from `choose_folder`.
        held: keeps other processes out of it until it is closed.

    Raises:
        ConfigError: another process has it now.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    ours = False
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held.enter_context(locked(folder, "--run-dir"))
        if any(folder.iterdir()):
            raise ConfigError(f"--run-dir: '{folder}' has got another run in this moment; name another folder")
        ours = True
        yield
    except BaseException:
        if not ours:
            made = [path for path in made if path.is_dir() and not any(path.iterdir())]
        elif folder not in made:
            for path in folder.iterdir():
                path.unlink()
        for path in made:
            if path == folder:
                shutil.rmtree(path, ignore_errors=True)
            elif path.is_dir() and not any(path.iterdir()):
                path.rmdir()
        raise


def write_config(folder: Path, config: TrainConfig) -> None:
    """Write the resolved configuration, from which the run can be repeated or resumed."""
    write_text(folder / CONFIG, to_toml(config))


def write_environment(
    folder: Path, config: TrainConfig, worker: Worker, first_round: int, processes: int = 1
) -> None:
    """Record what computes the rounds from `first_round` on: an entry for the start and for every resumption."""
    path = folder / ENVIRONMENT
    entries = read_environment(folder) if path.exists() else []
    backend = explain("auto" if config.fused else "reference", worker.device)
    entries.append(
        {
            "first_round": first_round,
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "device": device_name(worker.device),
            "processes": processes,
            "backend": backend,
            "linear": worker.linear,
            "platform": platform.platform(),
            "processors": os.cpu_count(),
            "python": platform.python_version(),
            "fedperfix": __version__,
            "source": source_digest(),
            **{name: _version(name) for name in ("torch", "triton", "timm", "numpy", "safetensors")},
        }
    )
    write_text(path, json.dumps(entries, indent=2) + "\n")


def source_digest() -> str:
    """A short digest of this program's sources: runs with another one may differ by more than rounding."""
    digest = hashlib.sha256()
    for package in (fedperfix, fedperfix_kernels):
        root = Path(package.__file__).parent
        for file in sorted(path for path in root.rglob("*") if path.suffix in (".py", ".c", ".h")):
            digest.update(f"{package.__name__}/{file.relative_to(root).as_posix()}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def read_environment(folder: Path) -> list[dict[str, Any]]:
    """What `write_environment` recorded, in order.

    Raises:
        ConfigError: the file is damaged.
    """
    path = folder / ENVIRONMENT
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        entries = None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ConfigError(f"'{path}' is damaged; delete it, and what computed the run until now is not known")
    return entries


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
