"""Clients side by side: the bits of one after the other, and what happens when one of them fails."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from fedperfix.config import ConfigError, parse_args
from fedperfix.engine.client import Client, Worker
from fedperfix.engine.parallel import MOST_STEP_FLOPS, add_workers, obstacle, parallel_clients, side_by_side
from fedperfix.engine.round import run_round
from fedperfix.engine.stopwatch import Stopwatch
from fedperfix.methods import METHODS
from fedperfix.run.interrupt import Interrupted
from tests.fedperfix import tiny
from tests.fedperfix.test_stacked import federation, with_dropout
from tests.fedperfix.test_train_cli import curves


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """The number of threads that a test begins with; it may change it."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def crew(count: int) -> Worker:
    """A worker with others beside it, each of which has one thread."""
    torch.set_num_threads(count)
    worker, _, _ = tiny.federation()
    add_workers(worker, count)
    return worker


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_the_bits_of_one_client_after_the_other(method: str) -> None:
    results, states = [], []
    for count in (1, 3):
        torch.set_num_threads(count)
        worker, state, config = federation(method, momentum=0.9, fedtp_hidden=4, protocol="both")
        add_workers(worker, count)
        results.append([run_round(worker, state, config, evaluate_all=True) for _ in range(2)])
        states.append(state.tensors())
    for name, value in states[0].items():
        assert torch.equal(states[1][name], value), name
    for expected, found in zip(*results, strict=True):
        assert found.train_loss == expected.train_loss
        for test in ("local", "personalised", "mixed"):
            assert getattr(found, test).loss.tolist() == getattr(expected, test).loss.tolist()
            assert getattr(found, test).clients == getattr(expected, test).clients


@pytest.mark.parametrize("options", [{"precision": "bf16"}, {"clients_per_step": "2"}, {"evaluation": "shared"}])
def test_so_do_half_precision_stacked_clients_and_shared_batches(options: dict[str, str]) -> None:
    states = []
    for count in (1, 2):
        torch.set_num_threads(count)
        worker, state, config = federation("fedperfix", precision=options.get("precision", "fp32"))
        worker.clients_per_step = int(options.get("clients_per_step", "1"))
        worker.shared_batches = "evaluation" in options
        add_workers(worker, count)
        found = run_round(worker, state, config, evaluate_all=True)
        states.append({**state.tensors(), "loss": torch.from_numpy(found.personalised.loss)})
    for name, value in states[0].items():
        assert torch.equal(states[1][name], value), name


def test_a_worker_has_a_model_and_a_method_of_its_own() -> None:
    worker, _, _ = federation("fedala")
    add_workers(worker, 3)
    models = [one.model for one in (worker, *worker.beside)]
    flats = [one.arena.flat for one in (worker, *worker.beside)]
    assert len({id(model) for model in models}) == len({flat.data_ptr() for flat in flats}) == 3
    assert len({id(one.method) for one in (worker, *worker.beside)}) == 3
    assert all(torch.equal(flat, flats[0]) for flat in flats)


def test_every_job_is_done_once_and_none_shares_a_worker() -> None:
    worker, busy, most, lock = crew(3), set(), [], threading.Lock()

    def work(one: Worker, job: int) -> tuple[int, int]:
        with lock:
            assert id(one) not in busy
            busy.add(id(one))
            most.append(len(busy))
        time.sleep(0.02)
        assert torch.get_num_threads() == 1
        with lock:
            busy.remove(id(one))
        return job, threading.get_ident()

    done: list[tuple[int, int]] = []
    told_in = set()
    side_by_side(worker, range(7), work, lambda result: (done.append(result), told_in.add(threading.get_ident())))
    assert sorted(job for job, _ in done) == list(range(7))
    assert max(most) == 3
    assert told_in == {threading.get_ident()}
    assert threading.get_ident() not in {thread for _, thread in done}
    assert torch.get_num_threads() == 3


def test_a_failure_ends_the_others_and_nothing_new_begins() -> None:
    worker, begun, polled = crew(2), [], []

    def work(one: Worker, job: int) -> None:
        begun.append(job)
        if job == 0:
            raise ZeroDivisionError("mine")
        while True:
            time.sleep(0.01)
            one.poll()
            polled.append(job)

    before = [one.poll for one in (worker, *worker.beside)]
    with pytest.raises(ZeroDivisionError, match="mine"):
        side_by_side(worker, range(6), work, lambda result: None)
    assert 5 not in begun
    assert [one.poll for one in (worker, *worker.beside)] == before
    assert torch.get_num_threads() == 2


def test_an_interruption_ends_all_at_the_next_batch() -> None:
    worker, asked = crew(2), threading.Event()

    def poll() -> None:
        if asked.is_set():
            raise Interrupted

    def work(one: Worker, job: int) -> None:
        asked.set()
        while True:
            time.sleep(0.01)
            one.poll()

    worker.poll = poll
    with pytest.raises(Interrupted):
        side_by_side(worker, range(4), work, lambda result: None)


def test_a_round_that_fails_in_one_client_never_happened(monkeypatch: pytest.MonkeyPatch) -> None:
    worker, state, config = federation("fedperfix")
    torch.set_num_threads(2)
    add_workers(worker, 2)
    before = {name: value.clone() for name, value in state.tensors().items()}
    whole = Client.train

    def train(self: Client, *arguments: object, **options: object) -> int:
        if self.index == 1:
            raise RuntimeError("client 1")
        return whole(self, *arguments, **options)

    monkeypatch.setattr(Client, "train", train)
    with pytest.raises(RuntimeError, match="client 1"):
        run_round(worker, state, config, evaluate_all=True)
    assert state.round == 0
    assert all(torch.equal(value, before[name]) for name, value in state.tensors().items())


def test_phases_side_by_side_add_up_to_the_clock() -> None:
    turns = []
    for train, evaluate in ((3.0, 1.0), (2.0, 2.0)):
        turn = Stopwatch(tiny.CPU)
        turn.seconds = {"train": train, "evaluate": evaluate}
        turns.append(turn)
    watch = Stopwatch(tiny.CPU)
    watch.add(turns, whole=4.0)
    assert watch.seconds == {"train": 2.5, "evaluate": 1.5}
    watch.add(turns[:1], whole=5.0)  # one after the other: what is beside the phases is in neither
    assert watch.seconds == {"train": 5.5, "evaluate": 2.5}
    watch.add([], whole=1.0)
    assert watch.seconds == {"train": 5.5, "evaluate": 2.5}


def test_auto_gives_each_client_a_core_where_a_step_is_short() -> None:
    worker, _, config = federation(batch_size=4)
    short, long = MOST_STEP_FLOPS / 4, MOST_STEP_FLOPS / 4 + 1
    torch.set_num_threads(3)
    assert parallel_clients(worker, lambda: short) == 3
    assert parallel_clients(worker, lambda: long) == 1
    torch.set_num_threads(8)
    assert parallel_clients(worker, lambda: short) == config.sampled == 4
    for options in ({"compile": True}, {"sampled": 1}, {"method": "mine.py:Mine"}):
        worker.config = replace(config, **options)
        assert parallel_clients(worker, lambda: short) == 1
    torch.set_num_threads(1)
    worker.config = config
    assert parallel_clients(worker, lambda: pytest.fail("counted in vain")) == 1


def test_a_number_is_taken_or_refused_in_a_sentence() -> None:
    torch.set_num_threads(2)
    worker, _, config = federation()
    worker.config = replace(config, parallel_clients="2", compile=True)
    assert parallel_clients(worker, lambda: 10**15) == 2
    worker.config = replace(config, parallel_clients="3")
    with pytest.raises(ConfigError, match="--parallel-clients: got 3, takes at most the number of thr"):
        parallel_clients(worker, lambda: 0)
    with_dropout(worker)
    assert obstacle(worker) == "the model draws random numbers in 'blocks.0.attn.proj_drop'"
    with pytest.raises(ConfigError, match="--parallel-clients: got 3, takes 1 here, as the model draws"):
        parallel_clients(worker, lambda: 0)
    worker.config = config
    assert parallel_clients(worker, lambda: 0) == 1
    worker.device = torch.device("cuda")
    assert obstacle(worker) == "--device is cuda, where --clients-per-step does that"
    for wrong in ("0", "9", "two"):
        with pytest.raises(ConfigError, match=f"--parallel-clients: got {wrong}, takes auto, or a number from 1"):
            parse_args([f"--parallel-clients={wrong}"])


def test_the_program_trains_clients_side_by_side(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    from fedperfix.train import main

    command = ["--samples=200", "--clients=5", "--sampled=3", "--alpha=1", "--local-steps=2", "--batch-size=8"]
    command += ["--rounds=2", "--bottleneck=4", "--device=cpu", "--precision=fp32"]
    for threads in (1, 2):
        torch.set_num_threads(threads)
        assert main([*command, f"--run-dir={tmp_path / str(threads)}"]) == 0
        assert ("2 clients at a time" in capsys.readouterr().out) == (threads == 2)
    one, two = (curves(tmp_path / threads) for threads in "12")
    assert one == two
