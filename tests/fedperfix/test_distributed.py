"""Several processes: the bits of one, one end for all of them, and who does what."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file

from fedperfix.config import ConfigError, parse_args
from fedperfix.engine.group import ALONE, Group, Spread, join
from fedperfix.engine.round import data_weights, run_round, sample_clients
from fedperfix.run.checkpoint import read_client
from fedperfix.train import main
from tests.fedperfix import tiny
from tests.fedperfix.processes import CASES, play
from tests.fedperfix.test_train_cli import curves

ROOT = Path(__file__).parents[2]
GROUPS = [(size, rank) for size in (2, 3) for rank in range(size)]
needs_gloo = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs Gloo")


def torchrun(processes: int, *command: str, hosts: tuple[str, ...] = ("--standalone",)) -> subprocess.Popen[str]:
    """Start a module under torchrun on this host, one thread for each process."""
    launcher = [sys.executable, "-m", "torch.distributed.run", *hosts, f"--nproc-per-node={processes}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [*launcher, "-m", *command], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int], dict]:
    """What each process of a group holds after the rounds of all cases, by (size, rank)."""
    folder = tmp_path_factory.mktemp("processes")
    run = torchrun(3, "tests.fedperfix.processes", str(folder))
    output, _ = run.communicate(timeout=300)
    assert run.returncode == 0, output
    return {(size, rank): json.loads((folder / f"{size}-{rank}.json").read_text()) for size, rank in GROUPS}


@needs_gloo
@pytest.mark.parametrize("case", [name for name in CASES if "sum" not in name])
def test_every_process_of_two_and_three_has_the_bits_of_one(found, case: str, tmp_path: Path) -> None:
    alone = json.loads(json.dumps(play(case, tmp_path)))
    for place in GROUPS:
        assert found[place][case]["digests"] == alone["digests"], place
        if place[1] == 0:
            assert found[place][case]["metrics"] == alone["metrics"], place
    if case == "diverging":
        assert alone["metrics"][0]["dropped_clients"] == "3"


@needs_gloo
@pytest.mark.parametrize(("case", "same"), [("sum", "fedavg"), ("diverging sum", "diverging")])
def test_partial_sums_are_equal_within_rounding(found, case: str, same: str, tmp_path: Path) -> None:
    exact = play(same, tmp_path)
    for results in (play(case, tmp_path), *(found[place][case] for place in GROUPS)):
        np.testing.assert_allclose(results["shared"], exact["shared"], rtol=0, atol=1e-6)
    for size, rank in GROUPS:
        leader = found[size, 0][case]
        assert found[size, rank][case]["digests"] == leader["digests"]
        assert [row["dropped"] for row in leader["metrics"]] == [row["dropped"] for row in exact["metrics"]]


@needs_gloo
@pytest.mark.parametrize("size", [2, 3])
def test_an_error_of_one_process_ends_all_with_one_message(found, size: int) -> None:
    last = size - 1
    for rank in range(size):
        wrong, interrupted, fault, exited, stopped = found[size, rank]["failures"]
        assert wrong == (f"PeerError: --lr: got 0 (in process {last})" if rank == 0 else "Ended: 2")
        assert interrupted == "Interrupted: "
        faults = {last: "KeyError: 'fault'", 0: f"ProcessLost: process {last} failed"}
        assert fault == faults.get(rank, "Ended: 1")
        assert exited == ("SystemExit: 0" if rank == last else "Ended: 0")
        assert stopped == ("KeyboardInterrupt: " if rank == last else "Ended: 130")
        assert found[size, rank]["text"] == "wörter\n"


def test_partial_sums_of_one_process_are_the_weighted_mean_in_float64() -> None:
    worker, state, config = tiny.federation(reduction="sum")
    rows = {}
    train_client = worker.method.train_client

    def record(client) -> None:
        train_client(client)
        rows[client.index] = client.arena.shared.double().clone()

    worker.method.train_client = record
    run_round(worker, state, config, evaluate_all=False)
    clients = sample_clients(config, 1)
    weights = data_weights(worker, clients)
    expected = sum(weight * rows[client] for client, weight in zip(clients, weights, strict=True))
    torch.testing.assert_close(state.server.shared.double(), expected, rtol=6e-8, atol=0)
    assert state.round == 1


def test_partial_sums_are_for_plain_means_only() -> None:
    with pytest.raises(ConfigError, match="--reduction: got sum, takes exact with --method scaffold, whose aggr"):
        parse_args(["--method", "scaffold", "--optimizer", "sgd", "--reduction", "sum"])
    assert parse_args(["--reduction", "sum"]).reduction == "sum"


def test_the_largest_clients_are_given_first() -> None:
    spread = Spread.of((2, 5, 7, 8, 9), (3, 9, 4, 9, 4), Group(rank=1, size=2))
    assert spread.parts == ((5, 7, 9), (2, 8)) or spread.parts == ((2, 5, 7), (8, 9))
    loads = [sum({2: 3, 5: 9, 7: 4, 8: 9, 9: 4}[client] for client in part) for part in spread.parts]
    assert sorted(loads) == [13, 16]
    assert spread.mine == spread.parts[1]
    restored = [spread.parts[rank][slot] for rank, slot in spread.places()]
    assert restored == [2, 5, 7, 8, 9]


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_no_process_has_more_than_four_thirds_of_the_best_load(processes: int) -> None:
    generator = np.random.default_rng(0)
    for _ in range(20):
        sizes = generator.integers(1, 100, 6).tolist()
        spread = Spread.of(range(6), sizes, Group(size=processes))
        assert sorted(client for part in spread.parts for client in part) == list(range(6))
        longest = max(sum(sizes[client] for client in part) for part in spread.parts)
        best = min(
            max(sum(size for size, rank in zip(sizes, ranks, strict=True) if rank == r) for r in range(processes))
            for ranks in itertools.product(range(processes), repeat=6)
        )
        assert best <= longest <= best * 4 / 3


def test_a_process_may_have_no_client() -> None:
    assert Spread.of((4, 6), (1, 8), Group(size=4)).parts == ((6,), (4,), (), ())


def test_several_processes_need_a_gpu_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    group = Group(rank=0, size=6, local_rank=0, local_size=3)
    with pytest.raises(ConfigError, match="got 'cuda' with 3 processes on a host with 2 GPUs; start at most 2"):
        group._check_gpus("cuda", torch.device("cuda"))
    with pytest.raises(ConfigError, match="got 'cuda:1', takes cuda with several processes: each has its own GPU"):
        group._check_gpus("cuda:1", torch.device("cuda:1"))
    Group(size=4, local_size=2)._check_gpus("cuda", torch.device("cuda"))


def test_one_process_alone_passes_everything_through() -> None:
    value = torch.arange(3)
    assert ALONE.all_rows(value, Spread.of((0, 1, 2), (1, 1, 1), ALONE)) is value
    assert ALONE.first_on_host(lambda: 7) == 7
    with pytest.raises(KeyError), ALONE.together():
        raise KeyError


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"WORLD_SIZE": "x"}, "^WORLD_SIZE: got 'x' in the environment, takes a number of at least 1, as torchrun"),
        ({"WORLD_SIZE": "0"}, "^WORLD_SIZE: got '0'"),
        ({"RANK": "2"}, "^RANK: got '2' in the environment, takes a number from 0 to 1"),
        ({"LOCAL_WORLD_SIZE": "3"}, "^LOCAL_WORLD_SIZE: got '3' .* from 1 to 2"),
        ({"LOCAL_RANK": "-1"}, "^LOCAL_RANK: got '-1' .* from 0 to 1"),
    ],
)
def test_an_environment_that_torchrun_did_not_make_is_named(
    changed: dict[str, str], match: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    made = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in (made | changed).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=match), join(lambda error: None):
        pass
    assert main([]) == 2
    assert capsys.readouterr().err.count("\n") == 1


SMALL = [
    *("--samples=300", "--clients=5", "--sampled=3", "--alpha=1", "--local-steps=1", "--batch-size=8"),
    *("--bottleneck=4", "--device=cpu", "--precision=fp32", "--eval-every=3", "--checkpoint-every=1000"),
]


def member(launcher: subprocess.Popen[str], rank: int) -> int:
    """The process id of one of the processes that torchrun started."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    ranks = {
        child: re.search(rb"\0RANK=(\d+)\0", Path(f"/proc/{child}/environ").read_bytes()) for child in children
    }
    return next(int(child) for child, found in ranks.items() if found and int(found[1]) == rank)


def stopped_run(folder: Path, *options: str, act: Callable[[subprocess.Popen[str]], None]) -> tuple[str, int]:
    """What a run of two processes prints after `act`, which comes after its first round, and its rounds."""
    run = torchrun(2, "fedperfix.train", *SMALL, "--rounds=10000", f"--run-dir={folder}", *options)
    assert run.stdout is not None
    printed = list(itertools.takewhile(lambda line: not line.startswith("round"), run.stdout))
    assert run.poll() is None, printed
    act(run)
    output, _ = run.communicate(timeout=120)
    assert run.returncode != 0
    saved = re.search(r"after round (\d+); the run is saved. To go on:\n.* --resume", output)
    assert saved, output
    return output, int(saved[1])


def check_resumed(folder: Path, rounds: int) -> None:
    """A run of two processes that ended early goes on in one, as one that was never interrupted."""
    whole = folder.parent / "whole"
    assert main(["--resume", str(folder), f"--rounds={rounds + 1}"]) == 0
    assert main([*SMALL, f"--rounds={rounds + 1}", f"--run-dir={whole}"]) == 0
    found, expected = (load_file(path / "checkpoint.safetensors") for path in (folder, whole))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    last = [curves(path)[-1] for path in (folder, whole)]
    assert last[0] == last[1]
    environment = json.loads((folder / "environment.json").read_text())
    assert [entry["processes"] for entry in environment] == [2, 1]


@needs_gloo
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes in /proc")
def test_a_killed_process_ends_the_others_and_the_run_goes_on_in_one(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    output, rounds = stopped_run(folder, act=lambda run: os.kill(member(run, 1), signal.SIGKILL))
    assert output.count("another process ended after round") == 1
    check_resumed(folder, rounds)


@needs_gloo
@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes in /proc")
def test_when_process_0_is_killed_the_run_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    options = ("--rounds=10000", "--checkpoint-every=1", f"--run-dir={folder}")
    run = torchrun(2, "fedperfix.train", *SMALL, *options)
    assert run.stdout is not None
    assert any(line.startswith("round") for line in run.stdout)
    os.kill(member(run, 0), signal.SIGKILL)
    run.communicate(timeout=120)
    assert run.returncode != 0
    with safe_open(folder / "checkpoint.safetensors", framework="pt") as file:
        rounds = int(file.metadata()["round"])
    assert rounds >= 1
    check_resumed(folder, rounds)


@needs_gloo
@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes in /proc")
def test_a_process_that_does_not_answer_ends_the_others(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    output, rounds = stopped_run(
        folder, "--process-timeout=3", act=lambda run: os.kill(member(run, 1), signal.SIGSTOP)
    )
    assert "another process did not answer for 3 s after round" in output
    check_resumed(folder, rounds)


@needs_gloo
@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_all_processes_and_saves(tmp_path: Path, number: int) -> None:
    folder = tmp_path / "run"
    output, rounds = stopped_run(folder, act=lambda run: run.send_signal(number))
    assert output.count("interrupted after round") == 1
    check_resumed(folder, rounds)


@needs_gloo
@pytest.mark.slow
def test_two_processes_share_a_file_of_rows_and_one_goes_on_with_it(tmp_path: Path) -> None:
    """With a checkpoint in every round, both must agree on which of a client's two slots counts."""
    folder, whole = tmp_path / "run", tmp_path / "whole"
    often = [*SMALL, "--eval-every=1", "--checkpoint-every=1"]
    for rounds, command in (
        (2, [*often, f"--run-dir={folder}", "--personal-table=disk"]),
        (4, [f"--resume={folder}"]),
    ):
        run = torchrun(2, "fedperfix.train", *command, f"--rounds={rounds}")
        output, _ = run.communicate(timeout=120)
        assert run.returncode == 0, output
        assert "5 rows of" in output
    assert main([f"--resume={folder}", "--rounds=5"]) == 0
    assert main([*often, "--rounds=5", f"--run-dir={whole}"]) == 0
    found, expected = (curves(path) for path in (folder, whole))
    assert found == expected
    for client in range(5):
        kept, wanted = (read_client(path, client) for path in (folder, whole))
        assert all(torch.equal(kept[name], wanted[name]) for name in wanted)


def on_two_hosts(*options: list[str]) -> list[str]:
    """What the processes of two hosts print, one process each, started with these options."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        meeting = ("--nnodes=2", "--master-addr=127.0.0.1", f"--master-port={probe.getsockname()[1]}")
    runs = [
        torchrun(1, "fedperfix.train", *own, hosts=(*meeting, f"--node-rank={rank}"))
        for rank, own in enumerate(options)
    ]
    return [run.communicate(timeout=120)[0] for run in runs]


@needs_gloo
@pytest.mark.long
def test_two_hosts_have_the_bits_of_one_and_take_the_same_arguments(tmp_path: Path) -> None:
    command = [*SMALL, "--rounds=2", f"--run-dir={tmp_path / 'two'}"]
    output = on_two_hosts(command, command)
    assert "processes    2, reduction exact\n" in output[0]
    assert output[1] == ""
    assert main([*SMALL, "--rounds=2", f"--run-dir={tmp_path / 'one'}"]) == 0
    found, expected = (load_file(tmp_path / name / "checkpoint.safetensors") for name in ("two", "one"))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert curves(tmp_path / "two") == curves(tmp_path / "one")
    output = on_two_hosts([*SMALL, "--rounds=2"], [*SMALL, "--rounds=3"])
    assert "fedperfix: error: the arguments differ between the hosts; start torchrun with the same" in output[0]
    assert "fedperfix: error" not in output[1]


@needs_gloo
@pytest.mark.long
def test_wrong_input_is_one_sentence_and_three_processes_resume_what_one_began(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert main([*SMALL, "--rounds=2", f"--run-dir={folder}"]) == 0
    run = torchrun(3, "fedperfix.train", "--resume", str(folder), "--lr=2")
    output, _ = run.communicate(timeout=120)
    assert run.returncode != 0
    assert output.count("fedperfix: error: --lr: got 2.0, but the run in") == 1
    assert output.count("fedperfix: error") == 1
    run = torchrun(3, "fedperfix.train", "--resume", str(folder), "--rounds=4")
    output, _ = run.communicate(timeout=120)
    assert run.returncode == 0, output
    assert "processes    3, reduction exact\n" in output
    assert main([*SMALL, "--rounds=4", f"--run-dir={tmp_path / 'whole'}"]) == 0
    found, expected = (load_file(path / "checkpoint.safetensors") for path in (folder, tmp_path / "whole"))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
