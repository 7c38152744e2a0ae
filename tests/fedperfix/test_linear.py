"""`--linear`: what multiplies in a run's linear layers, the same in all of its workers, and recorded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from fedperfix.config import ConfigError, TrainConfig
from fedperfix.engine.device import linear_implementation
from fedperfix.engine.group import Group
from fedperfix.engine.parallel import add_workers
from fedperfix.models import create_model
from fedperfix.train import main
from fedperfix_kernels.linear import onednn_obstacle
from fedperfix_kernels.nn import ChosenLinear
from tests.fedperfix import tiny

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SMALL = ["--samples=200", "--clients=4", "--sampled=2", "--rounds=1", "--local-steps=1", "--device=cpu"]
needs_onednn = pytest.mark.skipif(bool(onednn_obstacle()), reason="this PyTorch has no oneDNN operator")


@needs_onednn
def test_a_choice_is_obeyed_where_it_is_of_use(monkeypatch: pytest.MonkeyPatch) -> None:
    assert linear_implementation("onednn", CPU, None) == "onednn"
    assert linear_implementation("torch", CPU, None) == "torch"
    monkeypatch.setattr("fedperfix.engine.device.resolve_linear", lambda: "onednn")
    assert linear_implementation("auto", CPU, None) == "onednn"
    assert linear_implementation("auto", CPU, torch.bfloat16) == "torch"
    assert linear_implementation("auto", CUDA, None) == "torch"
    with pytest.raises(
        ConfigError, match="--linear: got onednn, but the device is cuda, and .*; use --linear auto"
    ):
        linear_implementation("onednn", CUDA, None)
    with pytest.raises(ConfigError, match="--linear: got onednn, but the precision is bfloat16, "):
        linear_implementation("onednn", CPU, torch.bfloat16)


def test_it_is_refused_where_pytorch_lacks_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedperfix.engine.device.onednn_obstacle", lambda: "this build has none")
    assert linear_implementation("auto", CPU, None) == "torch"
    with pytest.raises(ConfigError, match="--linear: got onednn, but this build has none; use --linear auto"):
        linear_implementation("onednn", CPU, None)
    monkeypatch.setattr("fedperfix_kernels.linear.onednn_obstacle", lambda: "this build has none")
    worker, _, _ = tiny.federation()
    with pytest.raises(ConfigError, match="--linear: got 'onednn', but this build has none; "):
        worker.use_linear("onednn")


@needs_onednn
def test_workers_side_by_side_compute_alike() -> None:
    worker, state, _ = tiny.federation(linear="onednn", batch_size=4)
    add_workers(worker, 2)
    trained = []
    for one in (worker, *worker.beside):
        assert one.linear == "onednn"
        assert all(type(x) is ChosenLinear for x in one.model.modules() if isinstance(x, nn.Linear))
        one.load(2, state, 1).train(epochs=2)
        trained.append(one.arena.flat.clone())
    assert torch.equal(*trained)
    plain, state, _ = tiny.federation(linear="torch", batch_size=4)
    plain.load(2, state, 1).train(epochs=2)
    torch.testing.assert_close(trained[0], plain.arena.flat, rtol=1e-5, atol=1e-6)


@needs_onednn
def test_lora_layers_take_part(monkeypatch: pytest.MonkeyPatch) -> None:
    config = TrainConfig(method="lora", lora_rank=2)
    model = create_model(config, channels=1, num_classes=3, image_hw=(28, 28))
    worker, _, _ = tiny.federation(model=model, linear="onednn")
    monkeypatch.setattr(torch.nn.functional, "linear", lambda *_: pytest.fail("computed by F.linear"))
    worker.model(torch.zeros(2, 1, 28, 28))


@needs_onednn
@pytest.mark.parametrize("choice", ["torch", "onednn"])
def test_a_run_says_and_records_it(choice: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = tmp_path / "run"
    arguments = [*SMALL, f"--linear={choice}", "--precision=fp32", f"--run-dir={folder}"]
    assert main(arguments) == 0
    said = {"torch": "F.linear", "onednn": "oneDNN"}[choice]
    assert f"linear       {said}\n" in capsys.readouterr().out
    assert json.loads((folder / "environment.json").read_text())[0]["linear"] == choice
    assert f'linear = "{choice}"' in (folder / "config.toml").read_text()


@needs_onednn
def test_process_0_chooses_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that would take F.linear takes what it is told."""
    monkeypatch.setattr("fedperfix.engine.device.resolve_linear", lambda: "torch")
    monkeypatch.setattr(Group, "share_text", lambda _, text, source=0: "onednn" if text == "torch" else text)
    assert main([*SMALL, "--precision=fp32", f"--run-dir={tmp_path / 'run'}"]) == 0
    assert json.loads((tmp_path / "run/environment.json").read_text())[0]["linear"] == "onednn"


def test_an_unknown_name_is_refused(capsys: pytest.CaptureFixture) -> None:
    assert main([*SMALL, "--linear=mkl"]) == 2
    assert "--linear: got 'mkl', takes one of auto, torch, onednn" in capsys.readouterr().err
