"""This package's engine, as `fedperfix.train` calls it."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from bench.peers.contestant import Turns
from bench.peers.work import SIDE, Work
from fedperfix.costs import count_flops
from fedperfix.data import Preprocess
from fedperfix.engine.client import Worker
from fedperfix.engine.parallel import add_workers, parallel_clients
from fedperfix.engine.round import run_round
from fedperfix.engine.state import FederatedState
from fedperfix.methods import METHODS
from fedperfix.run.memory import keep_freed_memory


def play(work: Work, rounds: int, turns: Turns) -> dict[str, Tensor]:
    """All rounds; arguments and result as `bench.peers.contestant.play`."""
    keep_freed_memory()  # as `fedperfix.train` does
    config, device, data = work.config(turns.precision), torch.device(work.device), work.data
    on_device = {name: getattr(data, name).to(device) for name in ("inputs", "labels")}
    parts = {name: tuple(x.to(device) for x in getattr(data, name)) for name in ("train", "test")}
    method = METHODS[work.method](config)
    worker = Worker(work.new_model(), replace(data, **on_device, **parts), Preprocess(SIDE), method, config, device)
    pixels = torch.zeros(1, 3, SIDE, SIDE)
    add_workers(worker, parallel_clients(worker, lambda: count_flops(work.new_model(), pixels)[0]))
    state = FederatedState.initial(worker.arena, method, work.clients, "auto")
    for _ in range(rounds):
        turns.begin()
        result = run_round(worker, state, config, evaluate_all=work.method != "fedavg")
        tested = result.mixed or result.local
        turns.end(float(tested.accuracy.mean()), result.seconds)
    return worker.arena.shared_layout.views(state.server.shared)
