"""Server and nodes without Flower: the bits of a run in one process, bad answers, and crashes."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fedperfix.config import ConfigError, TrainConfig, parse_args
from fedperfix.flower.node import Answer, Node, NodeError
from fedperfix.flower.server import STATE, Coordinator, NoAnswers, Silence
from fedperfix.flower.settings import FlowerSettings, from_run_config, to_run_config
from fedperfix.run import checkpoint
from tests.fedperfix.flower.local import Change, LocalNodes
from tests.fedperfix.killed import KILLS
from tests.fedperfix.test_train_cli import (
    ROOT,
    SMALL,
    _small,  # noqa: F401  (a fixture)
    curves,
)
from tests.fedperfix.test_train_cli import run as train

METHODS = {
    "fedperfix": (), "fedavg": (), "scaffold": ("--optimizer", "sgd"), "fedprox": (), "ditto": (), "apfl": (),
    "pfedme": (), "fedrep": (), "fedala": (), "fedbabu": (),
}  # fmt: skip


def configured(*options: str, rounds: int = 3) -> TrainConfig:
    given = parse_args([*SMALL, "--precision", "fp32", "--rounds", str(rounds), *options])
    return from_run_config(to_run_config(given, FlowerSettings()))[0]


def coordinated(
    config: TrainConfig, folder: str = "server", change: Change | None = None, nodes: str = "nodes"
) -> tuple[list[str], LocalNodes]:
    log: list[str] = []
    there = LocalNodes(config, Path(nodes), *([change] if change else []))
    Coordinator(config, Path(folder), there, wait=1, timeout=1, log=log.append).run()
    return log, there


def shared(folder: str, file: str = STATE) -> str:
    """SHA-256 of the shared parameters."""
    found = {name: x for name, x in load_file(Path(folder) / file).items() if name.startswith("global.")}
    assert found
    digest = hashlib.sha256()
    for name in sorted(found):
        digest.update(name.encode())
        digest.update(found[name].contiguous().numpy().tobytes())
    return digest.hexdigest()


def figures(folder: str) -> list[dict[str, Any]]:
    """The metrics that do not depend on who draws them up."""
    return [{k: v for k, v in row.items() if not k.startswith(("bytes", "images"))} for row in curves(folder)]


@pytest.mark.parametrize("method", METHODS)
def test_the_bits_of_a_run_in_one_process(method: str) -> None:
    options = ("--method", method, *METHODS[method])
    assert train("--run-dir", "one", "--precision", "fp32", "--checkpoint-every", "1", *options, rounds=3) == 0
    config = configured(*options)
    coordinated(config)
    assert shared("server") == shared("one", checkpoint.CHECKPOINT)
    for found, expected in zip(figures("server"), figures("one"), strict=True):
        numbers = {name for name, value in expected.items() if isinstance(value, float)}
        assert {name: found[name] for name in numbers} == pytest.approx({name: expected[name] for name in numbers})
        assert [found[name] for name in found.keys() - numbers] == [
            expected[name] for name in found.keys() - numbers
        ]
    for path in Path("nodes").rglob("round-*.safetensors"):
        if path == max(path.parent.iterdir()):
            own = checkpoint.read_client(Path("one"), int(path.parent.name.removeprefix("client-")))
            flat = [x for name, x in own.items() if name.startswith("personal.")]
            assert float(load_file(path)["personal"].double().sum()) == pytest.approx(
                float(sum(x.double().sum() for x in flat)), rel=1e-9, abs=1e-12
            )


@pytest.mark.parametrize(("dp", "dropped"), [("central", 0), ("local", 1)])
def test_privacy_has_the_bits_of_a_run_in_one_process(
    dp: str, dropped: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the secrets are the seed; also where a client sends far too much.

    With central noise it is clipped, and otherwise left out.
    """
    monkeypatch.setattr("secrets.randbits", lambda bits: 0)
    pytest.importorskip("dp_accounting", reason="needs fedperfix[privacy]")
    options = ("--method", "fedavg", "--dp", dp, "--attack", "scale", "--attack-scale", "1e6", "--sampled", "4")
    options = (*options, "--clients", "4", "--attackers", "0.25")
    assert train("--run-dir", "one", "--precision", "fp32", "--checkpoint-every", "1", *options, rounds=2) == 0
    coordinated(configured(*options, rounds=2))
    assert shared("server") == shared("one", checkpoint.CHECKPOINT)
    for folder in ("server", "one"):
        assert [row["dropped"] for row in curves(folder)] == [dropped] * 2
    assert [row["epsilon"] for row in curves("server")] == [row["epsilon"] for row in curves("one")]


@pytest.mark.parametrize("dp", ["central", "local"])
def test_the_noise_does_not_come_from_the_seed_that_all_know(dp: str) -> None:
    pytest.importorskip("dp_accounting", reason="needs fedperfix[privacy]")
    config = configured("--method", "fedavg", "--dp", dp, rounds=2)
    coordinated(config)
    coordinated(config, "again", nodes="again-nodes")
    assert shared("server") != shared("again")
    secret = {path.name for path in Path("nodes").glob("*.noise-seed")}
    assert bool(secret) == (dp == "local")
    for path in Path("nodes").glob("*.noise-seed") if dp == "local" else [Path("server") / STATE]:
        assert path.stat().st_mode & 0o077 == 0
    if dp == "local":  # an order that comes twice has the same answer, in another process too
        order = {"round": 1, "kept": 0, "token": "0123456789abcdef"}
        start = Node(config, 0, Path("nodes")).federation.state.server.shared.clone()
        first, second = (Node(config, 0, Path("nodes")).train(order, {"shared": start})[0] for _ in range(2))
        assert torch.equal(first["shared"], second["shared"])
        Path("nodes/client-0.noise-seed").write_text("x")
        with pytest.raises(ConfigError, match=r"state-dir: 'nodes/client-0.noise-seed' is damaged; delete it"):
            Node(config, 0, Path("nodes"))


@pytest.mark.parametrize("method", ["fedperfix", "fedper", "ditto", "apfl"])
def test_nothing_that_is_a_clients_own_is_in_an_answer(method: str) -> None:
    config = configured("--method", method, rounds=2)
    _, nodes = coordinated(config)
    own = Node(config, 0, Path("other")).federation.worker.arena
    for kind, _, (arrays, words) in nodes.sent:
        assert set(arrays) == ({"shared"} if kind == "train" else set())
        assert all(value.numel() == own.shared.numel() for value in arrays.values())
        marks = {"model", "data"}
        assert all(type(value) in (int, float) for name, value in words.items() if name not in marks)
    kept = [x for path in Path("nodes").rglob("*.safetensors") for x in load_file(path).values() if x.numel() > 1]
    sent = b"".join(x.numpy().tobytes() for _, _, (arrays, _) in nodes.sent for x in arrays.values())
    assert kept
    for values in kept:
        numbers = values[values != 0]
        for begin in range(0, len(numbers) - 16, max(1, len(numbers) // 20)):
            assert numbers[begin : begin + 16].numpy().tobytes() not in sent


def spoiled(kind: str) -> Change:
    """Client 1 answers something else in round 2."""

    def change(asked: str, client: int, round: int, answer: Answer) -> Answer | str:
        if client != 1 or round != 2 or asked != "train":
            return answer
        arrays, words = dict(answer[0]), dict(answer[1])
        update = arrays["shared"]
        bad: dict[str, Answer | str] = {
            "silent": "no answer within 1 s",
            "nan": ({"shared": update.clone().fill_(torch.nan)}, words),
            "inf": ({"shared": torch.cat((update[:-1], torch.tensor([torch.inf])))}, words),
            "large": ({"shared": 1e6 * update}, words),
            "shape": ({"shared": update[:-1]}, words),
            "rank": ({"shared": update[None]}, words),
            "dtype": ({"shared": update.double()}, words),
            "missing": ({}, words),
            "key": ({"shared": update, "personal": update}, words),
            "counts": ({"shared": update}, {**words, "train_images": -1}),
            "text": ({"shared": update}, {**words, "test_loss": "low"}),
            "none": ({"shared": update}, {}),
            "weight": ({"shared": update}, {**words, "train": 10**6}),
            "model": ({"shared": update}, {**words, "model": "x"}),
            "other": ({"shared": update}, {**words, "client": 2}),
            "data": ({"shared": update}, {**words, "data": "x"}),
            "right": ({"shared": update}, {**words, "test_correct": 10**6}),
            "huge": ({"shared": update}, {**words, "train": 2**62}),
            "f1": ({"shared": update}, {**words, "test_f1": float("nan")}),
            "auc": ({"shared": update}, {**words, "test_auc": -1.0}),
        }
        return bad[kind]

    return change


KINDS = (
    "silent",
    "nan",
    "inf",
    "large",
    "shape",
    "rank",
    "dtype",
    "missing",
    "key",
    "counts",
    "text",
    "none",
    "other",
    "weight",
    "model",
    "data",
    "right",
    "huge",
    "f1",
    "auc",
)


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_client_must_not_send_is_left_out_and_the_run_goes_on(kind: str) -> None:
    config = configured("--method", "fedper", "--sampled", "3")
    log, _ = coordinated(config, change=spoiled(kind))
    (line,) = [text for text in log if "left out" in text]
    assert "round 2: left out client 1" in line
    assert [row["dropped_clients"] for row in curves("server")] == ["", "1", ""]
    coordinated(config, "silent", spoiled("silent"), "silent-nodes")
    assert shared("server") == shared("silent")  # as if it had not answered
    assert curves("server")[-1]["all_mean"] == curves("silent")[-1]["all_mean"]
    assert shared("server") != _clean(config)


def _clean(config: TrainConfig) -> str:
    coordinated(config, "clean", nodes="clean-nodes")
    return shared("clean")


# What is left after a crash -------------------------------------------------------------------------------------


class Killed(Exception):
    pass


def killed_in(round: int, client: int) -> Change:
    """The server's process ends in a round, once this client's node and those before have kept their states."""

    def change(kind: str, asked: int, number: int, answer: Answer) -> Answer:
        if kind == "train" and (number, asked) == (round, client):
            raise Killed
        return answer

    return change


@pytest.mark.parametrize("client", [0, 2])
@pytest.mark.parametrize("round", [1, 2, 3])
def test_a_server_that_was_killed_goes_on_to_the_same_bits(round: int, client: int) -> None:
    config = configured("--method", "fedperfix", "--sampled", "3", rounds=4)
    with pytest.raises(Killed):
        coordinated(config, change=killed_in(round, client))
    log, _ = coordinated(config)
    if round > 1:
        assert log[0] == f"goes on after round {round - 1}"
        coordinated(config, "whole", nodes="whole-nodes")
        assert shared("server") == shared("whole")
        assert figures("server") == figures("whole")


def test_metrics_that_were_written_without_their_state(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = configured("--method", "fedperfix")
    with monkeypatch.context() as patch:
        saves = []

        def save(coordinator: Coordinator) -> None:
            saves.append(1)
            if len(saves) == 2:
                raise Killed
            original(coordinator)

        original = Coordinator._save
        patch.setattr(Coordinator, "_save", save)
        with pytest.raises(Killed):
            coordinated(config)
    assert len(curves("server")) == 2
    log, _ = coordinated(config)
    assert log[0] == "goes on after round 1"
    coordinated(config, "whole", nodes="whole-nodes")
    assert figures("server") == figures("whole")
    assert shared("server") == shared("whole")


def test_a_round_without_answers_ends_the_run_and_loses_nothing() -> None:
    config = configured("--method", "fedperfix")

    def silent(kind: str, client: int, round: int, answer: Answer) -> Answer | str:
        return Silence("no answer") if round == 2 else answer

    with pytest.raises(NoAnswers, match="round 2: none of 2 clients answered; run the app again to go on"):
        coordinated(config, change=silent)
    coordinated(config)
    coordinated(config, "whole", nodes="whole-nodes")
    assert shared("server") == shared("whole")


@pytest.mark.long
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize("method", ["fedperfix", "scaffold"])
def test_nodes_and_a_server_killed_at_20_random_moments_lose_nothing(method: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.fedperfix.flower.killed", str(tmp_path / "runs"), method]
    Path("runs").mkdir()
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout + run.stderr
    of_nodes, of_servers = map(int, run.stdout.splitlines()[-1].split()[:2])
    assert of_nodes == KILLS
    assert of_servers > KILLS / 2
    kept = own_states("runs/whole")
    assert len(kept) == 3
    for name in ("node", "server"):
        assert shared(f"runs/{name}/server") == shared("runs/whole/server")
        assert curves(f"runs/{name}/server") == curves("runs/whole/server")
        assert own_states(f"runs/{name}") == kept


def own_states(folder: str) -> dict[str, str]:
    """SHA-256 of the tensors of the states that count at the end, by client."""
    with safe_open(Path(folder) / "server" / STATE, framework="pt") as file:
        kept, run = file.get_tensor("kept").tolist(), Path(folder) / "nodes" / file.metadata()["token"]
    files = {f"client-{client}": f"round-{round:06}.safetensors" for client, round in enumerate(kept) if round}
    found = {name: load_file(run / name / file) for name, file in files.items()}
    return {
        name: hashlib.sha256(
            b"".join(key.encode() + state[key].numpy().tobytes() for key in sorted(state))
        ).hexdigest()
        for name, state in found.items()
    }


@pytest.mark.parametrize("dp", ["none", "central"])
def test_a_round_in_which_every_answer_is_refused_counts_and_the_run_goes_on(dp: str) -> None:
    if dp != "none":
        pytest.importorskip("dp_accounting", reason="needs fedperfix[privacy]")
    config = configured("--method", "fedavg", "--dp", dp)

    def refused(kind: str, client: int, round: int, answer: Answer) -> Answer | str:
        return ({}, answer[1]) if (kind, round) == ("train", 2) else answer

    log, _ = coordinated(config, change=refused)
    assert [row["dropped"] for row in curves("server")] == [0, 2, 0]
    assert curves("server")[1]["local_mean"] is None
    assert curves("server")[1]["train_loss"] is None
    assert any(line.startswith("round 2/3: all ") or line == "round 2/3: no client could be used" for line in log)


def test_a_node_that_lost_its_state_says_so() -> None:
    config = configured("--method", "fedper", "--sampled", "3", rounds=2)
    coordinated(config)
    for path in Path("nodes").rglob("client-1/*"):
        path.unlink()
    later = configured("--method", "fedper", "--sampled", "3", rounds=3)
    log, _ = coordinated(later)
    assert any("left out client 1 (train): client 1: has no state of round 2 in" in line for line in log)
    for path in Path("nodes").rglob("client-2/*"):
        path.write_bytes(path.read_bytes()[:-10])
    log, _ = coordinated(configured("--method", "fedper", "--sampled", "3", rounds=4))
    assert any("left out client 2 (train): client 2: 'nodes/" in line and "is damaged" in line for line in log)


def test_a_folder_with_another_run_is_left_as_it_is() -> None:
    config = configured("--method", "fedper", rounds=1)
    coordinated(config)
    before = (Path("server") / STATE).read_bytes()
    with pytest.raises(ConfigError, match="flower_server_dir: 'server' has another run; name another folder"):
        coordinated(configured("--method", "fedper", "--seed", "7", rounds=1))
    tensors = load_file(Path("server") / STATE)
    assert (Path("server") / STATE).read_bytes() == before
    save_file(tensors, Path("server") / STATE)
    with pytest.raises(ConfigError, match="flower_server_dir: 'server/server.safetensors' is no file of the kind"):
        coordinated(config)


def test_a_node_with_other_classes_is_left_out_whenever_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    config = configured("--method", "fedper", "--sampled", "3")
    there = LocalNodes.describe
    marked = Node._data

    def other(node: Node) -> dict[str, str]:
        return {**marked(node), **({"classes": '["x"]'} if node.client == 0 else {})}

    monkeypatch.setattr(Node, "_data", other)
    log, _ = coordinated(config)
    assert log[0].startswith('client 0 has another classes than most (["x"], ["')
    assert log[0].endswith(" and is left out; give all nodes like data")
    assert [row["dropped_clients"] for row in curves("server")] == ["0"] * 3
    late = {1: there(LocalNodes(config, Path("other")), 3, 1)[1]}
    monkeypatch.setattr(LocalNodes, "describe", lambda self, clients, seconds: late)
    log, _ = coordinated(config, "late", nodes="late-nodes")
    assert "round 1: left out client 0 (train): its inputs or classes are not those of the others" in log
    assert shared("late") == shared("server")
    monkeypatch.setattr(LocalNodes, "describe", lambda self, clients, seconds: {})
    with pytest.raises(ConfigError, match="nodes: none of 3 clients answered in 1 s; start them first"):
        coordinated(config)


def test_fewer_rounds_than_there_are() -> None:
    coordinated(configured("--method", "fedper", rounds=2))
    with pytest.raises(ConfigError, match="--rounds: got 1, but the run in 'server' has 2; give more"):
        coordinated(configured("--method", "fedper", rounds=1))


def test_a_client_that_was_not_there_at_the_start_counts_by_its_images(monkeypatch: pytest.MonkeyPatch) -> None:
    config = configured("--method", "fedperfix", "--sampled", "3")
    coordinated(config, "whole", nodes="whole-nodes")
    everyone = LocalNodes.describe
    monkeypatch.setattr(LocalNodes, "describe", lambda *given: {0: everyone(*given)[0]})
    log, _ = coordinated(config)
    assert log[0] == "2 of 3 clients are not there: 1, 2"
    assert log[1].startswith("1 clients are there, with ")
    assert shared("server") == shared("whole")


def test_a_node_with_data_of_its_own() -> None:
    config = configured("--method", "fedper", "--clients", "3")
    node = Node(config, 2, Path("nodes"), own_data=True)
    assert node.describe()["train"] + len(node.federation.worker.data.test[2]) == 240
    assert [len(own) for own in node.federation.worker.data.train[:2]] == [0, 0]
    shared = node.federation.state.server.shared
    update, words = node.train({"round": 1, "kept": 0, "token": "0123456789abcdef"}, {"shared": shared.clone()})
    assert words["client"] == 2
    assert not torch.equal(update["shared"], shared)
    with pytest.raises(ConfigError, match="partition-id: got 3, takes 0 to 2"):
        Node(config, 3, Path("nodes"))


@pytest.mark.parametrize(
    ("order", "arrays", "match"),
    [
        ({"token": "../../etc"}, {}, "does not fit this model"),
        ({"token": "../../etc"}, None, "has no token of a run"),
        ({"kept": 1}, None, "has no state of round 1"),
        ({}, {"shared": torch.zeros(3)}, r"does not fit this model \('shared'\)"),
        ({}, {"shared": None, "server.control": torch.zeros(1)}, r"does not fit this model \('server.control'\)"),
    ],
)
def test_orders_that_a_node_cannot_carry_out(order: dict, arrays: dict | None, match: str) -> None:
    node = Node(configured("--method", "fedper"), 0, Path("nodes"))
    good = node.federation.state.server.shared.clone()
    arrays = {"shared": good} if arrays is None else {k: good if v is None else v for k, v in arrays.items()}
    with pytest.raises(NodeError, match=match):
        node.train({"round": 1, "kept": 0, "token": "0123456789abcdef", **order}, arrays)


# Configuration --------------------------------------------------------------------------------------------------


def test_the_configuration_is_carried_as_scalars() -> None:
    given = parse_args(["--method", "fedper", "--lr", "0.25", "--local-steps", "3", "--seed", "9"])
    table = to_run_config(given, FlowerSettings(flower_timeout=7.0))
    assert all(type(value) in (bool, int, float, str) for value in table.values())
    config, settings = from_run_config({**table, "momentum": 0})  # Flower's parser makes whole numbers of 0.0
    assert (config.method, config.lr, config.local_steps, config.seed, config.momentum) == (
        "fedper",
        0.25,
        3,
        9,
        0.0,
    )
    assert config.depth is None
    assert settings.flower_timeout == 7.0


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"method": "fedtp"}, "--method: got fedtp, takes another with Flower"),
        ({"protocol": "both"}, "--protocol: got both, takes final with Flower"),
        ({"learning_rate": 1.0}, "learning_rate: is no option of a run with Flower"),
        ({"resume": "x"}, "resume: is no option of a run with Flower"),
        ({"rounds": 0}, "--rounds: got 0, takes a whole number of at least 1"),
        ({"flower_wait": -1}, "flower_wait: got -1, takes a number of seconds above 0"),
        ({"flower_patience": "long"}, "flower_patience: got 'long', takes a number of seconds"),
        ({"flower_timeout": float("nan")}, "flower_timeout: got nan, takes a number of seconds"),
        ({"flower_server_dir": ""}, "flower_server_dir: got '', takes the name of a folder"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(changes: dict, match: str) -> None:
    table = to_run_config(parse_args([]), FlowerSettings())
    with pytest.raises(ConfigError, match=match):
        from_run_config({**table, **changes})
