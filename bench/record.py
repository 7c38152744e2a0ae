"""Measure everything on this device and write one record: `python -m bench.record`.

The record is `bench/results/<device>.json`, written after every comparison; the same command goes on with it if
device, versions and commit are the same. A variant whose results fail their check in the same run gets no speed.

Exit status: 0 if everything was measured and passed its check, 1 if not, 3 if the time limit came first.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench.comparison import Comparison, Plan
from bench.comparisons import all_plans
from bench.report import comparison_table
from bench.targets import evaluate, summary
from bench.timing import Spread, copy_bandwidth, device_times, matrix_rate, peak_memory, wall_times

RESULTS = Path(__file__).parent / "results"
INCOMPLETE = 3
Record = dict[str, Any]


def main(argv: list[str] | None = None) -> int:
    """Command line; the module says what it returns."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device)
    started = time.perf_counter()
    machine = describe_machine(device)
    if arguments.commit:
        machine["commit"] = arguments.commit
    if machine["load"] > 0.5:
        print(f"the machine is busy (load {machine['load']:.1f}): these figures will be too slow", file=sys.stderr)
    path = arguments.output or (None if arguments.match else RESULTS / f"{slug(machine['device'])}.json")
    if path:
        check_writable(parser, path, "--output")
    record = resumed(path, machine) or new_record(machine, device)
    before = record["seconds"]
    plans = [plan for plan in all_plans(device) if arguments.match in plan.name]
    done = {entry["name"] for entry in record["comparisons"]}
    broken, left = [], [plan for plan in plans if plan.name not in done]
    for entry, error in _entries(left, device, arguments, started, record["ceilings"]):
        if entry is None:
            broken.append(error)
            print(error, file=sys.stderr)
            continue
        record["comparisons"].append(entry)
        record["seconds"] = round(before + time.perf_counter() - started, 1)
        if path:
            write(record, path)
        print(comparison_table(entry), flush=True)
    return _conclude(record, path, plans, broken)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.record", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--match", default="", help="only comparisons whose name contains this; writes no record")
    parser.add_argument("--budget", type=float, default=0.5, help="seconds of wall-clock timing per comparison")
    parser.add_argument(
        "--time-limit", type=float, metavar="SECONDS", help="start no other comparison after so many seconds"
    )
    parser.add_argument(
        "--output", type=Path, help="where to write the record (default: bench/results/<device>.json)"
    )
    parser.add_argument("--commit", help="what is measured, where git does not say (default: git describe)")
    return parser


def new_record(machine: Record, device: torch.device) -> Record:
    """A record without comparisons: the machine and its ceilings, measured now."""
    return machine | {"ceilings": ceilings(device), "comparisons": [], "seconds": 0.0}


def resumed(path: Path | None, machine: Record) -> Record | None:
    """The record at `path` if it was begun on this device with these versions and this commit, else None.

    A commit that git does not know, or with changes that are not committed, may be another one each time.

    Args:
        path: of the record, None for none.
        machine: as `describe_machine` says now.
    """
    if path is None or not path.exists():
        return None
    record = json.loads(path.read_text())
    same = all(record.get(key) == machine[key] for key in ("device", "threads", "versions", "commit"))
    if not same or machine["commit"] == "unknown" or machine["commit"].endswith("-dirty"):
        return None
    print(f"going on with {path}: {len(record['comparisons'])} comparisons are there", flush=True)
    return record | {"load": max(record["load"], machine["load"]), "date": machine["date"]}


def _entries(
    plans: list[Plan],
    device: torch.device,
    arguments: argparse.Namespace,
    started: float,
    limits: dict[str, float],
) -> Iterator[tuple[Record | None, str]]:
    """Measure one plan after the other: its entry, or None and why there is none; stops at the time limit."""
    for plan in plans:
        if arguments.time_limit is not None and time.perf_counter() - started >= arguments.time_limit:
            return
        torch._dynamo.reset()
        try:
            yield measure(plan.build(), device, arguments.budget, limits), ""
        except Exception as error:  # the others can still be measured; this one is tried again by the next run
            yield None, f"not measured: {plan.name}: {type(error).__name__}: {error}"
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _conclude(record: Record, path: Path | None, plans: list[Plan], broken: list[str]) -> int:
    """Say what was written, what failed and what is left; the exit status."""
    entries = record["comparisons"]
    if path:
        print(f"{path}: {len(entries)} comparisons, {record['seconds']:.0f} s")
    verdicts = [verdict for entry in entries for verdict in entry["targets"]]
    if verdicts:
        print(f"targets: {summary(verdicts)}")
    failed = [(e["name"], n, v["failed"]) for e in entries for n, v in e["variants"].items() if "failed" in v]
    for name, variant, reason in failed:
        print(f"failed its check: {variant} in {name}: {reason}", file=sys.stderr)
    left = len({plan.name for plan in plans} - {entry["name"] for entry in entries}) - len(broken)
    if left:
        print(f"the time limit came first: {left} comparisons left, run the same command again", file=sys.stderr)
        return INCOMPLETE
    return 1 if failed or broken else 0


def measure(comparison: Comparison, device: torch.device, budget: float, limits: dict[str, float]) -> Record:
    """Check, time and weigh every variant of one comparison, and evaluate its targets.

    Args:
        comparison: with its inputs on `device`.
        device: where it runs.
        budget: seconds of wall-clock timing.
        limits: as `ceilings` returns.

    Returns:
        The record's entry.
    """
    refused = comparison.refused()
    sound = {name: variant for name, variant in comparison.variants.items() if name not in refused}
    checked = replace(comparison, variants=sound)
    wall = wall_times(checked, device, budget) if sound else {}
    on_device, reasons = {}, {}
    if sound and device.type == "cuda" and comparison.capturable:
        on_device, reasons = device_times(checked, device)
    variants: dict[str, Record] = {}
    for name in comparison.variants:
        if name in refused:
            variants[name] = dict(refused[name])
            continue
        peak = None if name in comparison.unweighed else peak_memory(comparison.variants[name], device)
        variants[name] = figures(comparison, wall[name], on_device.get(name), peak, limits)
        if name in reasons:
            variants[name]["no_device_time"] = reasons[name]
    entry = {
        "name": comparison.name,
        "unit": comparison.unit,
        "settings": comparison.settings,
        "variants": variants,
    }
    if comparison.parts:
        entry["shares"] = shares(comparison, device, budget, refused)
    return entry | {"targets": evaluate(entry, device.type)}


def figures(
    comparison: Comparison, wall: Spread, on_device: Spread | None, peak: int | None, limits: dict[str, float]
) -> Record:
    """One variant's part of an entry: both clocks, peak bytes, rate and fraction of the limit."""
    best = (on_device or wall).median
    found: Record = {"wall_seconds": wall.as_dict()}
    if on_device:
        found["device_seconds"] = on_device.as_dict()
    found |= {"peak_bytes": peak, f"{comparison.unit}_per_second": comparison.work / best}
    floor = _floor(comparison, limits)
    return found | ({"fraction_of_limit": round(floor / best, 4)} if floor else {})


def shares(
    comparison: Comparison, device: torch.device, budget: float, refused: dict[str, dict[str, str]]
) -> Record:
    """Seconds of a step and of its parts, each timed alone; `rest` is what they leave of the step.

    On a GPU everything is a replayed CUDA graph, so that no launch is counted; a part that cannot be captured is an
    error. The rest is negative where the parts alone take longer than within the step.
    """
    whole = comparison.whole
    if whole in refused:
        return {"of": whole} | refused[whole]
    step = {whole: comparison.variants[whole]}
    if device.type == "cuda":
        wall = wall_times(replace(comparison, variants=step), device, budget)
        parts, reasons = device_times(replace(comparison, variants=comparison.parts), device)
        if reasons:
            return {"of": whole, "failed": "; ".join(f"{name}: {reason}" for name, reason in reasons.items())}
        times = wall | parts
    else:
        times = wall_times(replace(comparison, variants=step | comparison.parts), device, budget)
    medians = {name: times[name].median for name in comparison.parts}
    rest = times[whole].median - sum(medians.values())
    return {"of": whole, "seconds": times[whole].median, "parts": medians, "rest": rest}


def _floor(comparison: Comparison, limits: dict[str, float]) -> float:
    """Seconds of the fewest bytes or the fewest operations at the measured ceilings, whichever is longer."""
    rate = limits.get(f"matrix_{str(comparison.dtype).removeprefix('torch.')}")
    seconds = comparison.bytes_moved / limits["copy_bytes_per_second"]
    return max(seconds, comparison.flops / rate if rate else 0.0)


def ceilings(device: torch.device) -> dict[str, float]:
    """The device's measured copy bandwidth and matrix rates."""
    limits = {"copy_bytes_per_second": copy_bandwidth(device)}
    for dtype in (torch.float32, torch.bfloat16):
        limits[f"matrix_{str(dtype).removeprefix('torch.')}"] = matrix_rate(dtype, device)
    return limits


def describe_machine(device: torch.device) -> Record:
    """Device, versions, date and commit."""
    packages = ("torch", "triton", "timm", "numpy")
    versions = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "none"
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else 0.0,
        "versions": versions,
        "date": datetime.date.today().isoformat(),
        "commit": _commit(),
    }


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's with its cores and with what one of its name may have or lack."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        match = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text())
        model = match.group(1).strip() if match else model
    has = torch.cpu.get_capabilities()
    if has.get("amx_tile"):
        model += " with AMX"
    elif not has.get("avx512_f", True):
        model += " without AVX-512"
    return f"{model}, {os.cpu_count()} cores"


def slug(name: str) -> str:
    """A file name for a device's name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def check_writable(parser: argparse.ArgumentParser, path: Path, option: str) -> None:
    """End the command line, before anything is measured, if a record cannot be written; makes its folder."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        parser.error(f"{option}: '{path}' cannot be written ({error.strerror}); name another file")
    if path.is_dir():
        parser.error(f"{option}: '{path}' is a folder; takes the name of a file")


def write(record: Record, path: Path) -> None:
    """Write the record at once or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with temporary.open("w") as file:
        json.dump(record, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _commit() -> str:
    """The commit, with `-dirty` if tracked files other than records have changed; `unknown` without git."""
    commit = _git("describe", "--always", "--abbrev=12")
    if not commit:
        return "unknown"
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(exclude,top)bench/results")
    return f"{commit}-dirty" if changed else commit


def _git(*command: str) -> str:
    """What git says, nothing where it is not installed or this is no repository."""
    if shutil.which("git") is None:
        return ""
    here = Path(__file__).parent
    return subprocess.run(["git", *command], capture_output=True, text=True, check=False, cwd=here).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
