"""Rounds of tiny federations by several processes: `torchrun -m tests.fedperfix.processes DIR`.

For the groups of the first two, three, ... processes, each writes what it holds to DIR/<processes>-<rank>.json.
"""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.distributed as dist
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from fedperfix.config import ConfigError
from fedperfix.engine.client import Client
from fedperfix.engine.distributed import share_state
from fedperfix.engine.group import ALONE, Group
from fedperfix.engine.round import run_round
from fedperfix.engine.table import DiskTable
from fedperfix.methods import METHODS, Method
from fedperfix.run.interrupt import Interrupted
from fedperfix.run.metrics import RoundMetrics
from tests.fedperfix import tiny

SIZES = (5, 9, 12, 40, 3, 7)


class Diverging(METHODS["fedavg"]):
    """FedAvg in which client 3, the largest, sends infinity."""

    def train_client(self, client: Client) -> None:
        super().train_client(client)
        if client.index == 3:
            client.arena.flat[0] = torch.inf


CASES: dict[str, tuple[str | type[Method], dict[str, object]]] = {
    "fedperfix": ("fedperfix", {"bottleneck": 3, "protocol": "both"}),
    "scaffold": ("scaffold", {}),
    "apfl": ("apfl", {}),
    "fedtp": ("fedtp", {"fedtp_embedding": 2, "fedtp_hidden": 3}),
    "diverging": (Diverging, {"sampled": 5}),
    "fedavg": ("fedavg", {}),
    "one client a round": ("fedavg", {"sampled": 1}),
    "rows on disk": ("apfl", {"personal_table": "disk"}),
    "sum": ("fedavg", {"reduction": "sum"}),
    "diverging sum": (Diverging, {"reduction": "sum", "sampled": 5}),
}


def play(case: str, folder: Path, group: Group = ALONE) -> dict[str, object]:
    """Digests of the state after three rounds, and the metrics of all without what a clock says.

    Rows on disk are in `folder`, which is then all of the group's own.
    """
    method, options = CASES[case]
    torch.manual_seed(1)
    shape = {"img_size": tiny.SIDE, "patch_size": 1, "in_chans": 1, "num_classes": tiny.CLASSES}
    vit = VisionTransformer(**shape, embed_dim=4, num_heads=2, depth=2, mlp_ratio=1.0)
    options = {"clients": len(SIZES), "sampled": 4, "lr": 0.2, "batch_size": 4, **options}
    if isinstance(method, str):
        METHODS[method].adapt(vit, replace(tiny.CONFIG, method=method, **options))
    table = str(options.get("personal_table", "memory"))
    worker, state, config = tiny.federation(
        method, model=vit, client_data=tiny.data(SIZES), table=table, group=group, **options
    )
    if isinstance(state.table, DiskTable) and group.leader:
        state.table.seal(folder, 0)
    share_state(group, state, folder)
    rounds = []
    for _ in range(3):
        result = run_round(worker, state, config, evaluate_all=True, group=group)
        if group.leader:
            record = asdict(RoundMetrics.of(result, 1.0))
            rounds.append({key: value for key, value in record.items() if "second" not in key})
        if state.round == 2:  # as if there had been a checkpoint: the third round must leave these rows
            state.table.checkpointed(2)
    with group.together():
        pass  # the last rows are written
    digests = {name: digest(value) for name, value in state.tensors().items()}
    return {"digests": digests, "metrics": rounds, "shared": state.server.shared.tolist()}


def digest(value: Tensor) -> str:
    return hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest()


def fail(group: Group, error: BaseException) -> str:
    """What a process gets of an error that the last one raises."""
    try:
        with group.together():
            if group.rank == group.size - 1:
                raise error
    except BaseException as got:
        return f"{type(got).__name__}: {got}"
    return "nothing"


def failures(group: Group) -> list[str]:
    errors = (ConfigError("--lr: got 0"), Interrupted(), KeyError("fault"), SystemExit(0), KeyboardInterrupt())
    return [fail(group, error) for error in errors]


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    for members in range(2, size + 1):
        handle = dist.new_group(range(members))
        if rank >= members:
            continue
        explain = lambda error: str(error) if isinstance(error, ConfigError) else None  # noqa: E731
        group = Group(rank, members, rank, members, explain, handle)
        own = folder / str(members)
        own.mkdir(exist_ok=True)
        found = {case: play(case, own, group) for case in CASES}
        found["failures"] = failures(group)
        found["text"] = group.share_text("wörter\n" if rank == 1 else "", source=1)
        (folder / f"{members}-{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
