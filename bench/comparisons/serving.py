"""A test of 64 clients over one backbone, beside one pass of the same images through one model."""

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
from fedperfix.engine.evaluate import client_outputs

ONE, LOOP, SHARED = "one model", "one by one", "fedperfix"
_SIZE = 28
_CONFIG = TrainConfig(clients=64, sampled=8, batch_size=32, model="vit-mini")
_DTYPES = {"float32": ("fp32", torch.float32), "bfloat16": ("bf16", torch.bfloat16)}


def serving_plans(device: torch.device) -> Iterator[Plan]:
    """All clients' test images, 16 each, with their own prefixes and heads."""
    for name, (precision, dtype) in _DTYPES.items():
        config = replace(_CONFIG, device=device.type, precision=precision)
        title = f"test of all clients, {name}, vit-mini {_SIZE} px, {config.clients} clients"
        yield Plan(title, (ONE, LOOP, SHARED), partial(_comparison, title, config, device, dtype))


def _comparison(title: str, config: TrainConfig, device: torch.device, dtype: torch.dtype) -> Comparison:
    worker, state = federation(config, device)
    # All clients' own parameters have the same values, so that one model has the outputs of all.
    generator = torch.Generator().manual_seed(1)
    state.personal.copy_(state.personal[0].cpu() + 0.02 * torch.randn(state.personal.shape[1], generator=generator))
    everything = torch.cat(worker.data.test)
    clients = range(config.clients)

    def one(_: int) -> Results:
        worker.load(0, state, 1)
        return (_one_model(worker, everything),)

    def tested(together: bool) -> Tensor:
        worker.shared_batches = together
        found = client_outputs(worker, state, clients, round=1)
        return torch.cat([found[client] for client in clients])

    def exact() -> Results:
        other, start = federation(replace(config, fused=False, precision="fp32"), torch.device("cpu"))
        start.personal.copy_(state.personal)
        other.load(0, start, 1)
        other.model.double()
        pixels = other.preprocess(other.data.inputs[torch.cat(other.data.test)]).double()
        with torch.no_grad():
            return (other.model.eval()(pixels),)

    return Comparison(
        name=title,
        variants={ONE: one, LOOP: lambda _: (tested(False),), SHARED: lambda _: (tested(True),)},
        input_sets=1,
        exact=exact,
        work=len(everything),
        unit="images",
        dtype=dtype,
        capturable=False,
        settings={"model": config.model, "image_size": _SIZE, "clients": config.clients, "dtype": str(dtype)},
    )


@torch.no_grad()
def _one_model(worker: Worker, images: Tensor) -> Tensor:
    worker.model.eval()
    pixels = (worker.preprocess(worker.data.inputs[chosen]) for chosen in images.split(TEST_BATCH))
    outputs = torch.cat([worker.logits(batch) for batch in pixels])
    worker.model.train()
    return outputs
