"""PrefixAttention under PyTorch's own wrappers for several processes: the same steps as one process."""

from __future__ import annotations

import gc
import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from fedperfix_kernels import PrefixAttention

WORLD = 2

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs Gloo"),
]


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(PrefixAttention(32, num_heads=2, bottleneck=8, init="default"), nn.Linear(32, 4))


def batch() -> torch.Tensor:
    return torch.randn(2 * WORLD, 7, 32, generator=torch.Generator().manual_seed(1))


def step(network: nn.Module, x: torch.Tensor) -> None:
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        network(x).square().mean().backward()
        optimizer.step()


def train(rank: int, wrapper: str, port: int, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    torch.set_num_threads(1)
    state = trained(wrapper, batch().chunk(WORLD)[rank])
    if rank == 0:
        torch.save(state, os.path.join(folder, "state.pt"))
    # Gloo's threads end with the last reference to their group: DDP's must be gone before the interpreter is, or a
    # thread that frees a tensor then aborts the process.
    gc.collect()
    dist.destroy_process_group()


def trained(wrapper: str, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The parameters after some steps of the wrapped model, of which each process passes its own batch."""
    network = model()
    if wrapper == "DDP":
        network = nn.parallel.DistributedDataParallel(network)
        step(network, x)
        return {name: value.clone() for name, value in network.module.state_dict().items()}
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import init_device_mesh

    mesh = init_device_mesh("cpu", (WORLD,))
    fully_shard(network[0], mesh=mesh)
    fully_shard(network, mesh=mesh)
    step(network, x)
    return {name: value.full_tensor().clone() for name, value in network.state_dict().items()}


@pytest.mark.parametrize("wrapper", ["DDP", "FSDP"])
def test_two_processes_take_the_steps_of_one(wrapper: str, tmp_path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.start_processes(train, (wrapper, port, str(tmp_path)), nprocs=WORLD, start_method="spawn")
    found = torch.load(tmp_path / "state.pt", weights_only=True)
    alone = model()
    step(alone, batch())
    for name, expected in alone.state_dict().items():
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-6, msg=name)
