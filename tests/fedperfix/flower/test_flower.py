"""The app in Flower's simulation and in a deployment with TLS and node authentication: the bits of one process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="needs fedperfix[flower]")

from fedperfix.flower.__main__ import main as init
from fedperfix.flower.__main__ import simulation_command
from tests.fedperfix.flower.deployment import BIN, Deployment, environment, kill, make_key, until
from tests.fedperfix.flower.test_server import shared
from tests.fedperfix.test_train_cli import ROOT

CLIENTS, ROUNDS = 3, 2
OPTIONS = (
    f"--clients={CLIENTS}", "--sampled=2", f"--rounds={ROUNDS}", "--samples=200", "--local-steps=2",
    "--eval-every=2", "--bottleneck=4", "--precision=fp32", "--device=cpu",
)  # fmt: skip


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, float]:
    """Digest of the shared parameters, and accuracy, of the same run in one process."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    command = [sys.executable, "-m", "fedperfix.train", *OPTIONS, f"--run-dir={folder}"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=ROOT, env=env, check=True, capture_output=True)
    return shared(str(folder), "checkpoint.safetensors"), accuracy(folder)


def accuracy(folder: Path) -> float:
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["all_mean"]


def rounds(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def written(folder: Path, *options: str) -> Path:
    assert init(["init", str(folder / "app"), *OPTIONS, *options]) == 0
    return folder / "app"


def folders(folder: Path) -> str:
    return f'flower_server_dir="{folder / "server"}" flower_state_dir="{folder / "nodes"}" flower_patience=20.0'


def app_processes(word: str, folder: Path) -> list[int]:
    """Processes of this deployment whose command has a word."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            command = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            own = f"FLWR_HOME={folder / 'home'}".encode() in (path / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if own and word in command:
            found.append(int(path.name))
    return found


@pytest.mark.slow
def test_a_simulation_has_the_bits_of_one_process(alone: tuple[str, float], tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="needs flwr[simulation]")
    app, env = written(tmp_path), environment(tmp_path / "home")
    (tmp_path / "home" / "config.toml").write_text(
        '[superlink]\ndefault = "local"\n[superlink.local]\naddress = ":local:"\n'
    )
    command = [BIN / "flwr", *simulation_command(app, CLIENTS)[1:], "--run-config", folders(tmp_path)]
    try:
        run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    finally:
        for process in app_processes("flower-super", tmp_path):
            os.kill(process, signal.SIGTERM)
    assert (tmp_path / "server").exists(), run.stdout + run.stderr
    assert rounds(tmp_path / "server") == ROUNDS, run.stdout
    assert (shared(str(tmp_path / "server")), accuracy(tmp_path / "server")) == pytest.approx(alone)


@pytest.mark.slow
def test_a_deployment_has_the_bits_of_one_process_and_lets_no_stranger_in(
    alone: tuple[str, float], tmp_path: Path
) -> None:
    with Deployment(tmp_path) as there:
        for client in range(CLIENTS):
            there.register(f"key-{client}")
            there.node(f"key-{client}", client)
        make_key(tmp_path, "stranger")
        strangers = {  # and what the server answers
            "stranger": (there.node("stranger", 0, "--max-retries=1"), "Failed to activate SuperNode"),
            "no-key": (there.node("no-key", 0, "--max-retries=1"), "All SuperNodes must be registered"),
            "no-tls": (there.node("no-tls", 0, "--max-retries=1", secure=False), "Server disconnected"),
        }
        output = there.flwr("run", str(written(tmp_path)), "mine", "--stream", "--run-config", folders(tmp_path),
                            seconds=900)  # fmt: skip
        assert rounds(tmp_path / "server") == ROUNDS, output
        for name, (process, answer) in strangers.items():
            assert process.wait(60) != 0, f"the node {name} stays"
            assert answer in there.log(f"node-{name}")
        assert "left out" not in output
    assert (shared(str(tmp_path / "server")), accuracy(tmp_path / "server")) == pytest.approx(alone)
    states = list((tmp_path / "nodes").rglob("round-*.safetensors"))
    assert states
    assert {path.parent.name for path in states} <= {f"client-{number}" for number in range(CLIENTS)}


@pytest.mark.long
@pytest.mark.skipif(not Path("/usr/sbin/nginx").exists(), reason="needs nginx")
def test_behind_the_proxy_of_the_docs_nodes_work_and_nobody_registers_a_key(
    alone: tuple[str, float], tmp_path: Path
) -> None:
    text = (ROOT / "docs" / "flower.md").read_text(encoding="utf-8")
    with Deployment(tmp_path) as there:
        there.proxy(text.split("```nginx\n")[1].split("```")[0])
        for client in range(CLIENTS):
            there.register(f"key-{client}")
            there.node(f"key-{client}", client)
        app = written(tmp_path)
        make_key(tmp_path, "stranger")
        for words in (("supernode", "register", "stranger.pub", "outside"), ("run", str(app), "outside")):
            refused = there.try_flwr(*words, seconds=60)
            assert refused.returncode != 0
            assert "403" in refused.stdout + refused.stderr
        there.flwr("run", str(app), "mine", "--stream", "--run-config", folders(tmp_path), seconds=900)
        assert there.log("nginx") == ""
        there.flwr("supernode", "register", "stranger.pub", "mine", seconds=60)  # why the port must not be open
    assert (shared(str(tmp_path / "server")), accuracy(tmp_path / "server")) == pytest.approx(alone)


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc").exists(), reason="finds processes in Linux's /proc")
@pytest.mark.parametrize("victim", ["node", "server"])
def test_a_deployment_that_is_killed_goes_on_to_the_same_bits(
    victim: str, alone: tuple[str, float], tmp_path: Path
) -> None:
    with Deployment(tmp_path) as there:
        for client in range(CLIENTS):
            there.register(f"key-{client}")
        nodes = [there.node(f"key-{client}", client) for client in range(CLIENTS)]
        app = written(tmp_path)
        there.flwr("run", str(app), "mine", "--run-config", folders(tmp_path), seconds=60)
        if victim == "node":
            for client in range(CLIENTS):  # whichever is drawn first
                log = f"node-key-{client}"
                if client == 0:
                    until(
                        lambda: any("Receiving: train" in there.log(f"node-key-{c}") for c in range(CLIENTS)),
                        300,
                        "no order",
                    )
                if "Receiving: train" in there.log(log):
                    kill(nodes[client])
                    for process in app_processes("flwr-clientapp", tmp_path):
                        os.kill(process, signal.SIGKILL)
                    _until_it_stays(there, client)
                    break
        else:
            until(lambda: rounds(tmp_path / "server") == 1, 300, "no round")
            for process in app_processes("flwr-serverapp", tmp_path):
                os.kill(process, signal.SIGKILL)
            time.sleep(5)
            there.flwr("run", str(app), "mine", "--run-config", folders(tmp_path), seconds=60)
        until(lambda: rounds(tmp_path / "server") == ROUNDS, 500, there.log("link"))
        time.sleep(2)
    assert (shared(str(tmp_path / "server")), accuracy(tmp_path / "server")) == pytest.approx(alone)


def _until_it_stays(there: Deployment, client: int) -> None:
    """Start a killed node again; it is refused until the server notices that the old one is gone."""
    end = time.monotonic() + 240
    while time.monotonic() < end:
        process = there.node(f"key-{client}", client, "--max-retries=1")
        time.sleep(12)
        if process.poll() is None:
            return
    raise AssertionError(there.log(f"node-key-{client}"))


@pytest.mark.parametrize(
    ("words", "refused"),
    [
        (["start", "x"], "init: got 'start x', takes init and the name of a new folder"),
        (["init"], "init: got 'init', takes init and the name of a new folder"),
        (["init", "x", "--method=fedtp"], "--method: got fedtp, takes another with Flower"),
        (["init", "x", "--rounds=0"], "--rounds: got 0, takes a whole number of at least 1"),
        (["init", "x", "--run-dir=y"], "--run-dir: is no option of a run with Flower; leave it out"),
        (["init", "x", "--parallel-clients", "2"], "--parallel-clients: is no option of a run with Flower"),
        (["init", "x", "--no-tensorboard"], "--no-tensorboard: is no option of a run with Flower"),
        (["init", "."], "DIR: '.' exists; takes the name of a new folder"),
    ],
)
def test_an_app_that_cannot_be_written_is_refused(
    words: list[str], refused: str, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    assert init(words) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert refused in error
    assert not list(tmp_path.iterdir())
