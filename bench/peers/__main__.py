"""`python -m bench.peers`: the same work by this package and by its peers, in turns, and the ratios."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bench.peers.session import ContestantError, Timings, difference, hold
from bench.peers.work import MODELS, Work
from bench.record import check_writable, describe_machine
from fedperfix.config import ConfigError
from fedperfix.engine.device import autocast_dtype, resolve_device
from fedperfix.run.files import write_text

OURS, EXACT = "ours", "ours fp32"
# Part of the way from the start by which two float32 computations of the same rounds may end apart by rounding.
SAME = 1e-3
_CHANGES = ("model", "clients", "sampled", "images", "epochs", "batch_size", "threads", "device")


@dataclass(frozen=True)
class Peer:
    """What this package is measured against.

    Args:
        title: what it is.
        work: what is done in a round.
        modules: what must be importable.
        install: the command that installs them.
        targets: how many times faster this package is to be, by device type.
        also: contestants besides, such as the peer in another precision.
    """

    title: str
    work: Work
    modules: tuple[str, ...]
    install: str
    targets: dict[str, float]
    also: tuple[str, ...] = ()


# The paper's recipe: 10 epochs, batch 64, SGD with step size 0.01.
_PERSONAL = Work("fedperfix", "vit-tiny", clients=64, sampled=8, images=60, epochs=10)
_PLAIN = Work("fedavg", "vit-mini", clients=64, sampled=8, images=120, batch_size=32)
PEERS = {
    "authors-pattern": Peer(
        "a loop in the pattern of the authors' code, our own reimplementation",
        _PERSONAL,
        ("torchvision",),
        "pip install torchvision",
        {"cpu": 3.0, "cuda": 10.0},
    ),
    "pfl-research": Peer(
        "pfl-research", _PLAIN, ("pfl",), "pip install pfl==0.6.0", {"cpu": 1.5}, ("pfl-research bf16",)
    ),
    "flower": Peer(
        "Flower simulation", _PLAIN, ("flwr", "ray"), "pip install 'flwr[simulation]>=1.41,<1.43'", {"cpu": 3.0}
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Command line.

    Returns:
        0 if every session was held, or its peer is not installed; 1 if one failed. The record is written after
        every session.
    """
    parser = _parser()
    arguments = parser.parse_args(argv)
    names = arguments.peer or list(PEERS)
    try:
        device = resolve_device(arguments.device)
        works = {name: _work(PEERS[name], arguments) for name in names}
    except ConfigError as error:
        parser.error(str(error))
    if arguments.out:
        check_writable(parser, arguments.out, "--out")
    torch.set_num_threads(arguments.threads)
    record = describe_machine(device) | {"sessions": []}
    print(f"{record['device']}, {arguments.threads} threads, load {record['load']}")
    for name in names:
        entry = _session(name, works[name], arguments.rounds)
        record["sessions"].append(entry)
        print(text(entry), flush=True)
        if arguments.out:
            write_text(arguments.out, json.dumps(record, indent=1) + "\n")
    return int(any("failed" in entry for entry in record["sessions"]))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.peers", description=__doc__)
    parser.add_argument("--peer", nargs="+", choices=PEERS, metavar="NAME", help=f"some of {', '.join(PEERS)}")
    parser.add_argument("--rounds", type=_count, default=5, help="rounds that count, after one that does not")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="where to write what was measured")
    parser.add_argument("--model", choices=MODELS, help="instead of vit-tiny, and vit-mini with FedAvg")
    parser.add_argument("--clients", type=_count, help="instead of 64")
    parser.add_argument("--sampled", type=_count, help="clients that train in a round, instead of 8")
    parser.add_argument("--images", type=_images, help="of an average client, instead of 60 and 120")
    parser.add_argument("--epochs", type=_count, help="of a client in a round, instead of 10 and 1")
    parser.add_argument("--batch-size", type=_count, help="instead of 64 and 32")
    parser.add_argument("--threads", type=_count, default=torch.get_num_threads(), help="of PyTorch on a CPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    return parser


def _count(text: str, at_least: int = 1) -> int:
    number = int(text)
    if number < at_least:
        raise argparse.ArgumentTypeError(f"got {number}, takes a whole number of at least {at_least}")
    return number


def _images(text: str) -> int:
    return _count(text, at_least=8)  # the smallest client then has a test image


def missing(peer: Peer) -> str | None:
    """Why a peer cannot take part, with the command that mends it; None if it can."""
    absent = [module for module in peer.modules if importlib.util.find_spec(module) is None]
    return f"not installed ({', '.join(absent)}); {peer.install}" if absent else None


def _work(peer: Peer, arguments: argparse.Namespace) -> Work:
    """A peer's work with what the command line changes in it.

    Raises:
        ConfigError: a value that does not fit, such as more sampled clients than there are.
    """
    given = {key: getattr(arguments, key) for key in _CHANGES}
    work = replace(peer.work, **{key: value for key, value in given.items() if value is not None})
    work.config()
    return work


def _session(name: str, work: Work, rounds: int) -> dict[str, Any]:
    """Hold the session of one peer: its entry in the record."""
    peer = PEERS[name]
    entry = {"peer": name, "title": peer.title, "work": asdict(work)}
    reason = missing(peer)
    if reason:
        return entry | {"unavailable": reason}
    # Where the default precision is float32, one contestant is both.
    reduced = autocast_dtype("auto", torch.device(work.device))
    names = [OURS, EXACT, name, *peer.also] if reduced else [EXACT, name]
    print(f"{peer.title}: {_describe(work)}", flush=True)
    try:
        timings = hold(work, names, rounds, lambda line: print(f"  {line}", flush=True))
    except ContestantError as error:
        return entry | {"failed": str(error)}
    return entry | figures(name, timings, work, peer.targets.get(work.device), str(reduced or torch.float32))


def figures(
    peer: str, timings: dict[str, Timings], work: Work, target: float | None, precision: str
) -> dict[str, Any]:
    """The ratios of a session, whether the work was the same, and whether the target is met.

    Args:
        peer: its name.
        timings: of all contestants, by name.
        work: what was done.
        target: how many times faster this package is to be; None for no target.
        precision: in which `ours` computes.
    """
    contestants = {name: found.as_dict() for name, found in timings.items()}
    start = dict(work.new_model().named_parameters())
    apart = difference(timings[peer].shared, timings[EXACT].shared, start)
    found: dict[str, Any] = {
        "precision": precision,
        "contestants": contestants,
        "ratios": {name: ratios(contestants[name], contestants[peer]) for name in contestants if name != peer},
        "difference": apart,
        "same_work": apart <= SAME,
    }
    if target is not None:
        own = {name: by["seconds"] for name, by in found["ratios"].items() if name in (OURS, EXACT)}
        met = {name: found["same_work"] and ratio >= target for name, ratio in own.items()}
        found["target"] = {"at_least": target, "met": met}
    return found


def ratios(own: dict[str, Any], other: dict[str, Any]) -> dict[str, float]:
    """How many times as much the other took: medians of seconds and processor seconds, and peak memory."""
    found = {
        key: other[key]["median"] / own[key]["median"]
        for key in ("seconds", "cpu_seconds")
        if own[key] and other[key]
    }
    for key in ("peak_bytes", "gpu_bytes"):
        if own[key] and other[key]:
            found[key] = other[key] / own[key]
    return {key: round(value, 3) for key, value in found.items()}


def text(entry: dict[str, Any]) -> str:
    """An entry of a record for people."""
    if "unavailable" in entry or "failed" in entry:
        return f"{entry['peer']}: {entry.get('unavailable') or entry['failed']}"
    lines = [f"ours computes in {entry['precision']}, the others in float32 unless their names say otherwise"]
    lines += [f"{'':>18} {'s a round (range)':>26} {'CPU s':>8} {'memory':>9} {'faster by':>10} {'CPU by':>7}"]
    for name, found in entry["contestants"].items():
        lines.append(_row(name, found, entry["ratios"].get(name, {})))
    verdict = "the same work" if entry["same_work"] else "NOT the same work: no ratio holds"
    lines.append(f"shared parameters differ by {entry['difference']:.1e} of the way from the start: {verdict}")
    if "target" in entry:
        met = ", ".join(f"{name} {'met' if met else 'missed'}" for name, met in entry["target"]["met"].items())
        lines.append(f"target, at least {entry['target']['at_least']}x: {met}")
    return "\n".join(lines)


def _row(name: str, found: dict[str, Any], by: dict[str, float]) -> str:
    seconds, cpu, peak = found["seconds"], found["cpu_seconds"], found["peak_bytes"]
    spread = f"{seconds['median']:.2f} ({seconds['lowest']:.2f} – {seconds['highest']:.2f})"
    cells = [f"{name:>18}", f"{spread:>26}", f"{cpu['median']:8.2f}" if cpu else f"{'–':>8}"]
    cells.append(f"{peak / 2**20:6.0f} MB" if peak else f"{'–':>9}")
    cells += [f"{by['seconds']:9.2f}x" if by else "", f"{by['cpu_seconds']:6.2f}x" if "cpu_seconds" in by else ""]
    phases = ", ".join(f"{phase} {value:.2f}" for phase, value in found["phases"].items())
    return " ".join(cells).rstrip() + (f"  ({phases})" if phases else "")


def _describe(work: Work) -> str:
    tested = "all tested" if work.method == "fedperfix" else "the cohort tested"
    return (
        f"{work.method}, {work.model} at 32 px, {work.clients} clients, {work.sampled} train, {tested}; "
        f"{work.images} images each, {work.epochs} epochs, batch {work.batch_size}, {work.device}"
    )


if __name__ == "__main__":
    sys.exit(main())
