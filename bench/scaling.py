"""What a round costs with 100, 1,000 and 10,000 clients: `python -m bench.scaling`.

The cohort is 8 clients and every client has the same number of images, so that the work of a round is the same at
every size. Each row is a process of its own, which starts a run as the command line does, with the clients' rows on
disk or in memory. The record is `bench/results/scaling/<device>.json`.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from bench.record import RESULTS, check_writable, describe_machine, slug, write
from fedperfix.config import TrainConfig
from fedperfix.engine.round import run_round
from fedperfix.run import checkpoint
from fedperfix.run.slots import TABLE
from fedperfix.train import Federation, Run, build, start

CLIENTS = (100, 1_000, 10_000)
COHORT, IMAGES, SIDE, CLASSES = 8, 12, 16, 10
_WARM_UP, _ROUNDS, _EVERY = 3, 20, 5
_NEEDED = 4  # times its rows: what a checkpoint of a table in memory takes


def main(argv: list[str] | None = None) -> int:
    """Measure every size and write the record."""
    parser = argparse.ArgumentParser(prog="python -m bench.scaling", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--clients", type=int, nargs="+", default=CLIENTS, help=f"numbers of clients, {COHORT} or more"
    )
    parser.add_argument("--tables", nargs="+", default=("disk", "memory"), choices=("disk", "memory"))
    parser.add_argument("--output", type=Path, help="file of the record")
    parser.add_argument("--row", nargs=2, metavar=("CLIENTS", "TABLE"), help="print the measurements of one row")
    arguments = parser.parse_args(argv)
    if arguments.row:
        print(json.dumps(measure(int(arguments.row[0]), arguments.row[1])))
        return 0
    if min(arguments.clients) < COHORT:
        parser.error(f"--clients: got {min(arguments.clients)}, takes at least {COHORT}, which train in a round")
    machine = describe_machine(torch.device("cpu"))
    output = arguments.output or RESULTS / "scaling" / f"{slug(machine['device'])}.json"
    check_writable(parser, output, "--output")
    rows: list[dict[str, Any]] = []
    for table in arguments.tables:
        for clients in arguments.clients:
            command = [sys.executable, "-m", "bench.scaling", "--row", str(clients), table]
            run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            rows.append(json.loads(run.stdout.splitlines()[-1]))
            print(rows[-1], file=sys.stderr)
    setting = {"cohort": COHORT, "images_per_client": IMAGES, "image_side": SIDE, "rounds": _ROUNDS}
    record = {"machine": machine, "setting": setting, "rows": rows}
    write(record, output)
    print(table_of(record))
    return 0


def measure(clients: int, table: str) -> dict[str, Any]:
    """One row: a run with so many clients, measured in this process.

    Returns:
        Seconds to start, per round (median) and per checkpoint (median), resident bytes before the rounds and at
        most in them, bytes of a client's row, of the checkpoint and on disk; `skipped` if the memory is too small.
    """
    with tempfile.TemporaryDirectory() as where:
        data = Path(where) / "synthetic.npz"
        images = np.random.default_rng(0).integers(0, 256, (clients * IMAGES, SIDE, SIDE, 1), dtype=np.uint8)
        np.savez(data, images=images, labels=np.arange(len(images)) % CLASSES)
        del images
        config = TrainConfig(
            dataset="npz",
            data_dir=str(data),
            partition="iid",
            clients=clients,
            sampled=COHORT,
            local_steps=1,
            device="cpu",
            precision="fp32",
            personal_table=table,
            run_dir=str(Path(where) / "run"),
        ).validate()
        begin = time.perf_counter()
        if table == "memory":
            row = build(
                TrainConfig(**{**vars(config), "personal_table": "disk"}), torch.device("cpu")
            ).state.table.row_size
            if row * clients * _NEEDED > available_memory():
                return {"clients": clients, "table": table, "skipped": "not enough memory"}
            gc.collect()
            begin = time.perf_counter()
        federation = build(config, torch.device("cpu"))
        with contextlib.ExitStack() as held:
            return _rounds(federation, start(federation, held), begin)


def _rounds(federation: Federation, run: Run, begin: float) -> dict[str, Any]:
    config, worker, state = federation.config, federation.worker, federation.state
    file = run.folder / checkpoint.CHECKPOINT
    started = time.perf_counter() - begin
    rounds, checkpoints, resident = [], [], []
    for round in range(_WARM_UP + _ROUNDS):
        if round == _WARM_UP:
            before = resident_bytes()
        clock = time.perf_counter()
        run_round(worker, state, config, evaluate_all=False)
        rounds.append(time.perf_counter() - clock)
        resident.append(resident_bytes())
        if state.round % _EVERY == 0:
            clock = time.perf_counter()
            checkpoint.save(file, state, worker.arena, config)
            checkpoints.append(time.perf_counter() - clock)
            resident.append(resident_bytes())
    on_disk = run.folder / TABLE
    columns = state.table.columns.values()
    return {
        "clients": config.clients,
        "table": config.personal_table,
        "seconds_start": round_to(started),
        "seconds_round": round_to(median(rounds[_WARM_UP:])),
        "seconds_round_fastest": round_to(min(rounds[_WARM_UP:])),
        "seconds_checkpoint": round_to(median(checkpoints)),
        "resident_before_rounds": before,
        "resident_in_rounds": max(resident[_WARM_UP:]),
        "row_bytes": sum(column[0].numel() * column.dtype.itemsize for column in columns),
        "data_bytes": worker.data.inputs.numel(),
        "checkpoint_bytes": file.stat().st_size,
        "table_bytes_on_disk": on_disk.stat().st_blocks * 512 if on_disk.exists() else 0,
    }


def table_of(record: dict[str, Any]) -> str:
    """The record as Markdown."""
    lines = [
        "| clients | rows | start | round, median (fastest) | checkpoint | resident before / in rounds | "
        "checkpoint file | table on disk |",
        "|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in record["rows"]:
        if "skipped" in row:
            lines.append(f"| {row['clients']:,} | {row['table']} | {row['skipped']} | | | | | |")
            continue
        before, during, file, disk = (
            row[key] / 1e6
            for key in ("resident_before_rounds", "resident_in_rounds", "checkpoint_bytes", "table_bytes_on_disk")
        )
        lines.append(
            f"| {row['clients']:,} | {row['table']} | {row['seconds_start']:.1f} s | "
            f"{row['seconds_round']:.2f} s ({row['seconds_round_fastest']:.2f} s) | "
            f"{row['seconds_checkpoint']:.3f} s | {before:,.0f} / {during:,.0f} MB | {file:,.1f} MB | "
            f"{disk:,.0f} MB |"
        )
    return "\n".join(lines)


def resident_bytes() -> int:
    """What this process has in memory now; 0 where the system does not say."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0


def available_memory() -> float:
    """Bytes that this machine can still give, infinity where it does not say."""
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES"))
    except (AttributeError, OSError, ValueError):
        return float("inf")


def round_to(seconds: float) -> float:
    """Seconds with the digits that a clock has."""
    return round(seconds, 6)


if __name__ == "__main__":
    sys.exit(main())
