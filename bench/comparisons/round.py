"""A federated round beside the passes through the model that it consists of: what everything else costs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.comparison import Comparison, Plan, Results
from fedperfix.config import TrainConfig
from fedperfix.data import FederatedData, Preprocess
from fedperfix.engine.client import TEST_BATCH, Worker
from fedperfix.engine.parallel import add_workers, side_by_side
from fedperfix.engine.round import run_round, sample_clients
from fedperfix.engine.state import FederatedState
from fedperfix.methods import method_class
from fedperfix.models import create_model
from fedperfix.run.memory import keep_freed_memory

PASSES, ROUND = "passes alone", "fedperfix"
_CLASSES, _CHANNELS, _SIZE = 10, 1, 28
# Steps so small that a parameter does not change: every call does the same work and has the same result.
_CONFIG = TrainConfig(clients=64, sampled=8, batch_size=32, lr=1e-12, model="vit-mini", precision="fp32")
_TRAIN, _TEST = 64, 16  # images of a client: whole batches


def round_plans(device: torch.device) -> Iterator[Plan]:
    """One round of 8 clients of 64, without a test of all clients: one at a time, and on a processor several."""
    config = replace(_CONFIG, device=device.type)
    title = f"federated round, float32, vit-mini {_SIZE} px, {config.sampled} of {config.clients} clients"
    yield Plan(title, (PASSES, ROUND), partial(_comparison, title, config, device))
    if device.type == "cpu":
        title, most = f"{title} side by side", min(torch.get_num_threads(), config.sampled)
        yield Plan(title, (PASSES, ROUND), partial(_comparison, title, config, device, most))


def _comparison(title: str, config: TrainConfig, device: torch.device, at_a_time: int = 1) -> Comparison:
    worker, state = federation(config, device)
    add_workers(worker, at_a_time)
    clients = sample_clients(config, round=1)

    def passes(_: int) -> Results:
        losses: list[Tensor] = []
        side_by_side(worker, clients, lambda one, client: _training_loss(one, client, torch.float32), losses.append)
        return (torch.stack(losses).mean(),)

    def whole_round(_: int) -> Results:
        state.round = 0  # the same clients and batches in every call
        result = run_round(worker, state, config, evaluate_all=False)
        return (torch.tensor(result.train_loss),)

    def exact() -> Results:
        other, _ = federation(replace(config, fused=False), torch.device("cpu"))
        with torch.no_grad():
            losses = [_training_loss(other, client, torch.float64) for client in clients]
        return (torch.stack(losses).mean(),)

    images = config.sampled * _TRAIN
    return Comparison(
        name=title,
        variants={PASSES: passes, ROUND: whole_round},
        input_sets=1,
        exact=exact,
        work=images,
        unit="images",
        dtype=torch.float32,
        capturable=False,
        settings={
            "model": config.model,
            "image_size": _SIZE,
            "clients": config.clients,
            "sampled": config.sampled,
            "at_a_time": at_a_time,
        },
    )


def federation(config: TrainConfig, device: torch.device) -> tuple[Worker, FederatedState]:
    """A worker with `_TRAIN` and `_TEST` random images per client, and the state before the first round."""
    keep_freed_memory()  # as `fedperfix.train` does, for all that is compared with it
    generator = torch.Generator().manual_seed(0)
    each = _TRAIN + _TEST
    number = config.clients * each
    images = torch.randint(0, 256, (number, _CHANNELS, _SIZE, _SIZE), generator=generator, dtype=torch.uint8)
    starts = range(0, number, each)
    data = FederatedData(
        inputs=images.to(device),
        labels=torch.randint(0, _CLASSES, (number,), generator=generator).to(device),
        train=tuple(torch.arange(start, start + _TRAIN, device=device) for start in starts),
        test=tuple(torch.arange(start + _TRAIN, start + each, device=device) for start in starts),
        class_names=tuple(map(str, range(_CLASSES))),
    )
    method = method_class(config.method)(config)
    model = create_model(config, channels=_CHANNELS, num_classes=_CLASSES, image_hw=(_SIZE, _SIZE))
    worker = Worker(model, data, Preprocess(_SIZE), method, config, device)
    backend = "auto" if config.fused else "reference"
    return worker, FederatedState.initial(worker.arena, method, config.clients, backend)


def _training_loss(worker: Worker, client: int, dtype: torch.dtype) -> Tensor:
    """Mean loss over a client's training images, with gradients if they are on; its test images pass too."""
    model, data = worker.model.to(dtype), worker.data
    total = torch.zeros((), dtype=torch.float64)
    for batch in data.train[client].split(worker.config.batch_size):
        loss = F.cross_entropy(model(worker.preprocess(data.inputs[batch]).to(dtype)), data.labels[batch])
        if torch.is_grad_enabled():
            loss.backward()
        total += loss.detach().double().cpu() * len(batch)
    with torch.no_grad():
        for batch in data.test[client].split(TEST_BATCH):
            model(worker.preprocess(data.inputs[batch]).to(dtype))
    return total / _TRAIN
