"""Images of many clients through their own models in shared batches, beside one pass of them through one model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from bench.comparison import Comparison, Plan, Results
from bench.comparisons.round import federation
from fedperfix.config import TrainConfig
from fedperfix.engine.client import TEST_BATCH, Worker
from fedperfix.engine.state import FederatedState
from fedperfix.models.batched import forward_clients

ONE_MODEL, ONE_BY_ONE, SHARED = "one model", "one by one", "fedperfix"
_CONFIG = TrainConfig(clients=64, sampled=8, batch_size=32, model="vit-mini", precision="fp32")
_IMAGES = (4, 16)  # of every client


def serving_plans(device: torch.device) -> Iterator[Plan]:
    """64 clients, few images each."""
    config = replace(_CONFIG, device=device.type)
    for images in _IMAGES:
        title = f"serving in shared batches, float32, {config.model}, {config.clients} clients with {images} images"
        yield Plan(title, (ONE_MODEL, ONE_BY_ONE, SHARED), partial(_comparison, title, config, images, device))


def _comparison(title: str, config: TrainConfig, images: int, device: torch.device) -> Comparison:
    worker, state = _federation(config, device)
    chosen = [test[:images] for test in worker.data.test]
    owners = [client for client, test in enumerate(chosen) for _ in test]
    everything = torch.cat(chosen)

    @torch.no_grad()
    def one_model(_: int) -> Results:
        worker.load(0, state, 0)
        return (torch.cat([worker.logits(_pixels(worker, part)) for part in everything.split(TEST_BATCH)]),)

    @torch.no_grad()
    def one_by_one(_: int) -> Results:
        outputs = []
        for client, test in enumerate(chosen):
            worker.load(client, state, 0)
            outputs.append(worker.logits(_pixels(worker, test)))
        return (torch.cat(outputs),)

    def shared_batches(_: int) -> Results:
        worker.arena.shared.copy_(state.server.shared)

        def own(clients: list[int]) -> dict[str, Tensor]:
            return worker.arena.local_layout.row_views(state.personal[clients].to(device))

        return (forward_clients(worker.model, own, _pixels(worker, everything), owners),)

    @torch.no_grad()
    def exact() -> Results:
        other, start = _federation(replace(config, fused=False), torch.device("cpu"))
        other.load(0, start, 0)
        return (other.model.double()(_pixels(other, everything.cpu()).double()).to(device),)

    return Comparison(
        name=title,
        variants={ONE_MODEL: one_model, ONE_BY_ONE: one_by_one, SHARED: shared_batches},
        input_sets=1,
        exact=exact,
        work=len(owners),
        unit="images",
        dtype=torch.float32,
        capturable=False,
        settings={"model": config.model, "clients": config.clients, "images": images, "method": config.method},
    )


def _federation(config: TrainConfig, device: torch.device) -> tuple[Worker, FederatedState]:
    """A worker that tests, and clients whose own parameters are random but alike: every variant's result is one."""
    worker, state = federation(config, device)
    worker.model.eval()
    for name, view in worker.arena.local_layout.views(worker.arena.local).items():
        noise = torch.randn(view.shape, generator=torch.Generator().manual_seed(len(name)))
        view.copy_(0.05 * noise)
    clients = range(config.clients)
    state.keep(clients, worker.arena.local.expand(len(clients), -1), {})
    return worker, state


def _pixels(worker: Worker, images: Tensor) -> Tensor:
    return worker.preprocess(worker.data.inputs[images])
