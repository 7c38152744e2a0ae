"""Clients side by side on a processor: each worker in a thread of its own, with a model and a part of the cores.

A training step of a small model is a few hundred short operations. Divided among cores, every one of them waits for
the slowest core; a client that has a core to itself does not wait, and PyTorch computes without Python's lock.

What a client finds depends on how many cores it has, not on which worker it is with, nor on who is beside it.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from queue import SimpleQueue
from typing import TypeVar

import torch

from fedperfix.config import ConfigError
from fedperfix.engine.client import Worker
from fedperfix.engine.stacked import random_module
from fedperfix.methods.custom import is_custom
from fedperfix.run.interrupt import Interrupted

# A longer step is divided among the cores about as well as clients are, and its activations want memory.
MOST_STEP_FLOPS = 64e9
_PERIOD = 0.2
_Job = TypeVar("_Job")
_Result = TypeVar("_Result")


def obstacle(worker: Worker) -> str | None:
    """Why the clients of this run can take only one turn at a time; None if they can take several."""
    if worker.device.type != "cpu":
        return f"--device is {worker.device.type}, where --clients-per-step does that"
    drawn = random_module(worker.model)
    return None if drawn is None else f"the model draws random numbers in '{drawn}'"


def parallel_clients(worker: Worker, flops: Callable[[], int]) -> int:
    """How many clients train at a time, as `--parallel-clients` says.

    With `auto` as many as there are threads, if a step is short. It is one with `--compile`, which would compile
    every worker's model, and for a user's own method, which may draw numbers from PyTorch's one generator.

    Args:
        worker: of the run.
        flops: counts those of one image's forward pass.

    Raises:
        ConfigError: the configuration names a number, and something is against it.
    """
    config, threads, against = worker.config, torch.get_num_threads(), obstacle(worker)
    if config.parallel_clients != "auto":
        number = int(config.parallel_clients)
        if number > 1 and against is not None:
            raise ConfigError(f"--parallel-clients: got {number}, takes 1 here, as {against}")
        if number > threads:
            raise ConfigError(
                f"--parallel-clients: got {number}, takes at most the number of threads, which is {threads} "
                "(OMP_NUM_THREADS sets it)"
            )
        return number
    most = min(threads, config.sampled)
    if most == 1 or against is not None or config.compile or is_custom(config.method):
        return 1
    return most if flops() * config.batch_size <= MOST_STEP_FLOPS else 1


def add_workers(worker: Worker, count: int) -> None:
    """Put others beside a worker, so that `count` clients can take their turns at a time."""
    worker.beside = tuple(_twin(worker) for _ in range(count - 1))


def _twin(worker: Worker) -> Worker:
    method = type(worker.method)(worker.config)
    twin = Worker(copy.deepcopy(worker.model), worker.data, worker.preprocess, method, worker.config, worker.device)
    twin.clients_per_step, twin.shared_batches = worker.clients_per_step, worker.shared_batches
    return twin


def side_by_side(
    worker: Worker,
    jobs: Sequence[_Job],
    work: Callable[[Worker, _Job], _Result],
    done: Callable[[_Result], None],
) -> None:
    """Do jobs, each with one worker: this one, or those beside it in threads of their own.

    Args:
        worker: the first worker.
        jobs: in the order in which they begin.
        work: does one of them; several at a time, never two with the same worker.
        done: told of every result in this thread, in the order in which they come.

    Raises:
        Whatever a job, `done` or `worker.poll` raises first; no job goes on then.
    """
    if not worker.beside:
        for job in jobs:
            done(work(worker, job))
        return
    crew = (worker, *worker.beside)
    stop, idle = threading.Event(), SimpleQueue[Worker]()
    polls = [one.poll for one in crew]

    def poll() -> None:
        if stop.is_set():
            raise Interrupted

    def take(job: _Job) -> _Result:
        one = idle.get()
        try:
            poll()
            return work(one, job)
        finally:
            idle.put(one)

    for one in crew:
        one.poll = poll
        idle.put(one)
    threads = torch.get_num_threads()
    share = (max(1, threads // len(crew)),)  # also of a client that is alone: its bits must not depend on that
    try:
        with ThreadPoolExecutor(len(crew), initializer=torch.set_num_threads, initargs=share) as pool:
            try:
                running = {pool.submit(take, job) for job in jobs}
                while running:
                    finished, running = wait(running, timeout=_PERIOD, return_when=FIRST_COMPLETED)
                    polls[0]()
                    for future in finished:
                        done(future.result())
            except BaseException:
                stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    finally:
        torch.set_num_threads(threads)  # a new thread takes the number that was set last, in whatever thread
        for one, own in zip(crew, polls, strict=True):
            one.poll = own
